"""BF16 for a provider without all kernels, what ONNX Runtime's refusals become, and the graph that TensorRT is given."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, shape_inference
from small_network import images, network
from torch import nn

from recon.config import option
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.ort import islands
from recon.engines.ort.failures import explained
from recon.engines.ort.support import rewrites
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Ranges, Recipe
from recon.network import Network, TensorSpec
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quantise import make_recipe, write

FLOAT, BRAIN = TensorProto.FLOAT, TensorProto.BFLOAT16


class Resized(nn.Module):
    """A product, bilinear resizing, a product: Resize in the middle of BF16 values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Upsample(size=(40, 48), mode="bilinear")
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(self.up(self.stem(images).relu())),)


def resized() -> nn.Module:
    torch.manual_seed(0)
    return Resized().eval()


NETWORKS = {
    "resized": Network("resized", {"images": TensorSpec((2, 3, 32, 32))}, ("out",), "seed-0", resized, images),
    "small": network(),
}
LACKING = {"resized_bf16": {"Resize"}, "small_bf16": set(), "small_int8": {"QuantizeLinear", "DequantizeLinear"}}


@pytest.fixture(scope="module", params=[("resized", "bf16"), ("small", "bf16"), ("small", "int8")])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(FP32 graph, the same in BF16, or in INT8 with BF16 around it)."""
    name, asked = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{asked}")
    base, out = folder / "base.onnx", folder / f"{name}_{asked}.onnx"
    export(NETWORKS[name], base, ExportOptions())
    precision, mode = option("precision", asked), option("quant_mode", "none")
    assert isinstance(precision, Precision)
    assert isinstance(mode, QuantMode)
    precision.rest = "bf16"
    recipe = Recipe(rest="bf16")
    if asked == "int8":
        ranges = Ranges({"qkv": 4.0, "out": 4.0}, {}, "max", "", 1, "test")
        recipe = make_recipe(NETWORKS[name], mode, precision, ranges)
    write(NETWORKS[name], base, recipe, out)
    return base, out


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return known | {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}


def test_cuda_is_given_no_bf16_node_that_it_has_no_kernel_for(written: tuple[Path, Path]) -> None:
    source = onnx.load(str(written[1]))
    held_back = rewrites(written[1], "cuda")
    lacking = LACKING[written[1].stem]
    assert bool(held_back.model) == bool(lacking)
    model = onnx.load_from_string(held_back.model) if held_back.model else source
    types = types_of(model)
    for node in model.graph.node:
        if any(types.get(name) == BRAIN for name in (*node.input, *node.output)):
            assert node.op_type in islands.KERNELS["cuda"], node.op_type
    said = [line for line in held_back.facts() if "for want of a BF16 kernel" in line]
    assert {line.split()[0] for line in said} == lacking, "and the manifest names them"
    for node in model.graph.node:
        if node.op_type in lacking:
            assert node.name in " ".join(said)
    before = types_of(source)
    assert all(types[name] == kind for name, kind in before.items() if name in types), "no other value changes its type"
    assert [len(values) for values in (model.graph.input, model.graph.output)] == [1, len(source.graph.output)]


def test_an_island_computes_what_the_bf16_node_does(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Cast as its one BF16 kernel the CPU provider runs the graph: every node becomes an island, and rounds."""
    base, graph = written
    monkeypatch.setitem(islands.KERNELS, "cpu", frozenset({"Cast"}))
    engine = OnnxRuntime(name="onnxruntime")
    facts = engine.optimise(graph, tmp_path / "islands.engine")
    assert any(line.startswith("Conv in FP32") for line in facts["held_back"])
    with engine.open(base, "basic") as reference, engine.load(tmp_path / "islands.engine") as session:
        want, got = reference.infer(images(3)), session.infer(images(3))
    for name, value in want.items():
        error = float((got[name] - value).norm() / value.norm())
        assert 1e-4 < error < 3e-2, f"{name}: {error}: BF16 keeps 8 bits, so its error lies between these"


def test_graphs_without_bf16_and_providers_without_a_list_are_left_alone(written: tuple[Path, Path]) -> None:
    base, graph = written
    assert rewrites(base, "cuda").model == b""
    changes = rewrites(graph, "cpu").changes
    assert not [line for line in changes if "island" in line or "BF16" in line]


def test_a_node_that_states_its_own_type_is_no_island() -> None:
    x = helper.make_tensor_value_info("x", BRAIN, [4])
    y = helper.make_tensor_value_info("y", BRAIN, [4])
    nodes = [
        helper.make_node("RandomUniformLike", ["x"], ["r"], name="own", dtype=BRAIN),
        helper.make_node("Clip", ["r"], ["a"], name="one"),
        helper.make_node("Ceil", ["a"], ["y"], name="two"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 22)])
    said = islands.islands(model, "cuda")
    assert [line.split()[0] for line in said] == ["Ceil", "Clip"]
    assert [node.op_type for node in model.graph.node] == ["RandomUniformLike", *["Cast", "Clip", "Cast"],
                                                           *["Cast", "Ceil", "Cast"]]  # fmt: skip


MESSAGES = {
    "cuda": (
        "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: transformer_memcpy.cc:253 bool"
        " IsNodeCompatibleWithProvider(...) Provider type for Resize node with name 'NAME' is not set."
    ),
    "cpu": "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Resize(19) node with name"
    " 'NAME'",
}


@pytest.mark.parametrize("provider", MESSAGES)
def test_a_missing_kernel_is_named_with_node_type_and_module(
    provider: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kernel")
    export(NETWORKS["resized"], folder / "base.onnx", ExportOptions())
    write(NETWORKS["resized"], folder / "base.onnx", Recipe(rest="bf16"), folder / "r.onnx")
    (node,) = (node for node in onnx.load(str(folder / "r.onnx")).graph.node if node.op_type == "Resize")
    said = explained(RuntimeError(MESSAGES[provider].replace("NAME", node.name)), folder / "r.onnx", provider)
    assert f"its {provider} provider has no kernel for Resize on bf16 (node {node.name}, module up)" in str(said)
    assert "precision=fp16" in said.remedy


def test_the_cpu_names_the_bf16_node_that_it_cannot_run(written: tuple[Path, Path], tmp_path: Path) -> None:
    """ONNX Runtime's own words, not ours: the message is still the one that `explained` reads."""
    with pytest.raises(ReconError, match=r"cpu provider has no kernel for Conv on bf16 \(node \S+, module stem\)"):
        OnnxRuntime(name="onnxruntime").optimise(written[1], tmp_path / "x.engine")


def test_tensorrt_is_given_the_graph_as_it_was_written(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU provider's optimised graph would be in FP32, in layouts of its own."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    engine, out = OnnxRuntime(name="onnxruntime", provider="tensorrt"), tmp_path / "t.engine"
    facts = engine.optimise(written[1], out)
    source, copy = onnx.load(str(written[1])), onnx.load(str(out))  # with their weights
    assert [node.SerializeToString() for node in copy.graph.node] == [n.SerializeToString() for n in source.graph.node]
    kept = [tensor.raw_data for tensor in copy.graph.initializer]
    assert kept == [tensor.raw_data for tensor in source.graph.initializer]
    assert (facts["held_back"], facts["bytes"] > 0) == ([], True)
    assert "compiles the graph when it is loaded" in engine.inspect(out).unseen


@pytest.mark.parametrize("provider", ["cpu", "tensorrt"])
def test_a_source_that_is_missing_or_damaged_is_named(
    provider: str, written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    engine = OnnxRuntime(name="onnxruntime", provider=provider)
    with pytest.raises(ReconError, match=r"gone\.onnx: no such file"):
        engine.optimise(tmp_path / "gone.onnx", tmp_path / "x.engine")
    for content, fault in ((written[1].read_bytes()[:500], "is no ONNX file, or damaged"), (b"", "holds no graph")):
        (tmp_path / "half.onnx").write_bytes(content)
        with pytest.raises(ReconError, match=rf"half\.onnx: {fault}"):
            engine.optimise(tmp_path / "half.onnx", tmp_path / "x.engine")
