"""engine.provider=cuda on a GPU; benchmarks/onnxruntime_gpu.py does the same on real networks and measures."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, save
from small_network import images, network

from recon.compare import compare
from recon.config import option
from recon.engines.onnxruntime import OnnxRuntime
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Ranges, Recipe
from recon.network import Network, TensorSpec
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quantise import make_recipe, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="needs a CUDA GPU and onnxruntime-gpu",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export(network(), path, ExportOptions())
    return path


def cuda(**knobs: object) -> OnnxRuntime:
    return OnnxRuntime(name="onnxruntime", provider="cuda", **knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 5e-3), ("int8", 5e-2), ("fp8", 5e-2)])
def test_numbers_of_the_cpu_provider(base: Path, tmp_path: Path, precision: str, limit: float) -> None:
    graph = base
    if precision != "fp32":
        mode, asked = option("quant_mode", "none"), option("precision", precision)
        assert isinstance(mode, QuantMode)
        assert isinstance(asked, Precision)
        asked.rest, graph = "fp32", tmp_path / "written.onnx"
        ranges = Ranges({"qkv": 4.0, "out": 4.0}, {}, "max", "", 1, "test")
        write(network(), base, make_recipe(network(), mode, asked, ranges), graph)
    cuda().optimise(graph, tmp_path / "small.engine")
    with OnnxRuntime(name="onnxruntime").open(graph, "basic") as cpu, cuda().load(tmp_path / "small.engine") as session:
        assert session.device.startswith("cuda")
        for error in compare(cpu, session, [images(1), images(2)]).values():
            assert error.passes(limit), error


def test_bf16_with_an_operator_that_has_no_bf16_kernel(tmp_path: Path) -> None:
    """Resize is computed in FP32 between Casts, which the facts say; the products are BF16."""
    write_bf16(tmp_path)
    facts = cuda().optimise(tmp_path / "bf16.onnx", tmp_path / "bf16.engine")
    assert any(line.startswith("Resize in FP32 between Casts") for line in facts["held_back"])
    assert {layer.compute for layer in cuda().inspect(tmp_path / "bf16.engine").layers} == {"bf16"}
    reference = OnnxRuntime(name="onnxruntime").open(tmp_path / "base.onnx", "basic")
    with reference as cpu, cuda().load(tmp_path / "bf16.engine") as session:
        for error in compare(cpu, session, [images(1), images(2)]).values():
            assert error.passes(3e-2), error
            assert error.rel_l2 > 1e-4, "BF16 keeps 8 bits"


def write_bf16(folder: Path) -> None:
    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return Resized().eval()

    net = Network("resized", {"images": TensorSpec((2, 3, 32, 32))}, ("out",), "seed-0", load, images)
    export(net, folder / "base.onnx", ExportOptions())
    write(net, folder / "base.onnx", Recipe(rest="bf16"), folder / "bf16.onnx")


class Resized(torch.nn.Module):
    """A product, bilinear resizing, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Upsample(size=(40, 48), mode="bilinear")
        self.last = torch.nn.Conv2d(8, 4, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(self.up(self.stem(images).relu())),)


def test_nothing_is_printed_when_a_session_opens(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns of a plug-in that was not registered when it is told the device that it takes anyway."""
    with cuda().open(base, "all") as session:
        session.infer(images(1))
    assert capfd.readouterr() == ("", "")


def test_nothing_crosses_to_the_host(base: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with cuda().open(base, "all") as session:
        feeds = {name: value.cuda() for name, value in images(1).items()}
        assert all(value.is_cuda for value in session.infer(feeds).values())
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            session.infer(feeds)
            torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    assert any("gemm" in name.lower() or "cutlass" in name.lower() for name in names), names
    assert not [name for name in names if "HtoD" in name or "DtoH" in name]


def test_an_operator_without_a_kernel_is_refused(tmp_path: Path) -> None:
    sizes = {"x": [3, 3], "y": []}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[name]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "lacking", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "d.onnx"))
    with pytest.raises(ReconError, match="fall"):
        cuda().open(tmp_path / "d.onnx", "basic")
