"""Engines, the reference harness, and options that this version refuses."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_network import images, network, seeded

from recon.compare import OutputError, compare, require
from recon.config import CONF, option
from recon.engines import Build
from recon.engines.onnxruntime import OnnxRuntime, data_file, operators
from recon.engines.tensorrt import TensorRT
from recon.engines.torch import Torch, TorchSession
from recon.errors import ReconError, Refused
from recon.export import ExportOptions, export
from recon.formats import LayerFormat, Recipe
from recon.models.vggt import VGGT
from recon.network import TensorSpec
from recon.onnxgraph import SCOPES


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export(network(), path, ExportOptions())
    return path


@pytest.fixture(scope="module")
def engine_file(onnx_file: Path) -> Path:
    path = onnx_file.with_name("small.engine")
    OnnxRuntime(name="onnxruntime").optimise(onnx_file, path)
    return path


def reference() -> TorchSession:
    return TorchSession(network(), seeded())


@pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])
@pytest.mark.parametrize("arena", [True, False])
def test_a_built_engine_gives_the_numbers_of_torch(onnx_file: Path, tmp_path: Path, level: str, arena: bool) -> None:
    engine = OnnxRuntime(name="onnxruntime", optimisation=level, arena=arena)
    facts = engine.optimise(onnx_file, tmp_path / "small.engine")
    with engine.load(tmp_path / "small.engine") as session:
        errors = compare(reference(), session, [images(1), images(2)])
        assert session.inputs == {"images": TensorSpec((2, 3, 32, 32))}
        assert session.outputs == {"pooled": TensorSpec((2, 32)), "tokens": TensorSpec((2, 64, 32))}
        assert session.memory_mib() > facts["bytes"] / 2**20 * 0.99
    assert all(error.passes(1e-5) for error in errors.values())
    assert facts["ops"] == operators(tmp_path / "small.engine")
    assert any("com.microsoft" in op for op in facts["ops"]) == (level in ("extended", "all"))


def test_a_large_engine_keeps_its_weights_beside_it(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon.engines.onnxruntime.ONE_FILE_LIMIT", 1000)
    made, final = tmp_path / "made", tmp_path / "final"
    made.mkdir()
    engine = OnnxRuntime(name="onnxruntime")
    facts = engine.optimise(onnx_file, made / "small.engine")
    made.rename(final)
    assert facts["bytes"] == sum(file.stat().st_size for file in final.iterdir())
    assert data_file(final / "small.engine").stat().st_size > 10_000
    with engine.load(final / "small.engine") as session:
        assert compare(reference(), session, [images(1)])["tokens"].passes(1e-5)


def test_outputs_of_one_inference_survive_the_next(engine_file: Path) -> None:
    with OnnxRuntime(name="onnxruntime").load(engine_file) as session:
        first = session.infer(images(1))["tokens"]
        kept = first.clone()
        session.infer(images(2))
        assert torch.equal(first, kept)


def test_feeds_that_are_not_contiguous_are_read_rightly(engine_file: Path) -> None:
    feeds = images(1)
    turned = {"images": feeds["images"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert not turned["images"].is_contiguous()
    with OnnxRuntime(name="onnxruntime").load(engine_file) as session:
        assert torch.equal(session.infer(turned)["tokens"], session.infer(feeds)["tokens"])


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_wrong_feeds_and_closed_sessions_are_named(engine_file: Path, kind: str) -> None:
    session = reference() if kind == "torch" else OnnxRuntime(name="onnxruntime").load(engine_file)
    with pytest.raises(ReconError, match=r"float32\[2, 3, 32, 31\]"):
        session.infer({"images": torch.zeros(2, 3, 32, 31)})
    with pytest.raises(ReconError, match="float64"):
        session.infer({"images": torch.zeros(2, 3, 32, 32, dtype=torch.float64)})
    with pytest.raises(ReconError, match="picture"):
        session.infer({"picture": torch.zeros(2, 3, 32, 32)})
    with session:
        session.infer(images(0))
    with pytest.raises(ReconError, match="closed"):
        session.infer(images(0))


@pytest.mark.parametrize("damage", ["truncated", "junk", "empty", "missing"])
def test_a_damaged_engine_is_named(engine_file: Path, tmp_path: Path, damage: str) -> None:
    whole, bad = engine_file.read_bytes(), tmp_path / "bad.engine"
    if damage != "missing":
        bad.write_bytes({"truncated": whole[: len(whole) // 2], "junk": b"\x07junk" * 99, "empty": b""}[damage])
    with pytest.raises(ReconError, match=r"bad\.engine") as caught:
        OnnxRuntime(name="onnxruntime").load(bad)
    assert caught.value.remedy


def test_an_operator_that_the_runtime_lacks_is_named(onnx_file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(onnx_file))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Rectify"
    node = next(node for node in model.graph.node if node.op_type == "Rectify")
    del node.metadata_props[:]
    node.metadata_props.append(onnx.StringStringEntryProto(key=SCOPES, value="['', 'stem', 'stem.act', 'relu']"))
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(ReconError, match=r"Rectify.* \(in module stem\.act\)"):
        OnnxRuntime(name="onnxruntime").optimise(tmp_path / "odd.onnx", tmp_path / "odd.engine")


@pytest.mark.slow
def test_view_counts_within_a_profile_run_and_others_are_refused(tmp_path: Path) -> None:
    """VGGT exported with a dynamic number of views, in ONNX Runtime, and as a plan where TensorRT for RTX is installed."""
    option = VGGT(name="vggt-twin", preset="vggt-twin", weights="seeded:0", height=56, width=56)
    network, path = option.network(2), tmp_path / "views.onnx"
    program = torch.onnx.export(
        network.load().eval(), tuple(network.example(0).values()), dynamo=True, opset_version=20, verbose=False,
        input_names=list(network.inputs), output_names=list(network.outputs),
        dynamic_shapes=({0: torch.export.Dim("views", min=1, max=8)},),
    )  # fmt: skip
    assert program is not None
    program.save(str(path))
    profiles = [{"images": {"min": [1, 3, 56, 56], "opt": [2, 3, 56, 56], "max": [4, 3, 56, 56]}}]
    with pytest.raises(ReconError, match=r"images\[-1, 3, 56, 56\] have dynamic sizes .* engine.profiles is empty"):
        OnnxRuntime(name="onnxruntime").optimise(path, tmp_path / "views.engine")
    engine = OnnxRuntime(name="onnxruntime", profiles=profiles)
    engine.optimise(path, tmp_path / "views.engine")
    with engine.load(tmp_path / "views.engine") as session:
        assert session.inputs["images"].shape == (2, 3, 56, 56)
        assert session.outputs["depth"].shape == (2, 56, 56)
        for views in (1, 2, 4):
            fixed = option.network(views)
            got, expected = session.infer(fixed.example(3)), TorchSession(fixed, fixed.load()).infer(fixed.example(3))
            assert {name: value.shape for name, value in got.items()} == {n: v.shape for n, v in expected.items()}
            for name, value in expected.items():
                assert (got[name] - value).norm() < 1e-5 * value.norm(), (views, name)
        with pytest.raises(ReconError, match=r"\(5, 3, 56, 56\).* lie in none of the engine's profiles"):
            session.infer(option.network(5).example(3))
        with pytest.raises(ReconError, match="float64"):
            session.infer({"images": network.example(3)["images"].double()})
        with pytest.raises(ReconError, match="'frames'"):
            session.infer({"frames": network.example(3)["images"]})
    if importlib.util.find_spec("tensorrt_rtx"):
        rtx = TensorRT(name="tensorrt-rtx", flavour="tensorrt_rtx", profiles=profiles)
        facts = rtx.build(Build(network, path, Recipe), tmp_path / "views.plan")
        assert facts["plan"]["profiles"] == profiles
        assert "MaxShape: [4,3,56,56]" in (tmp_path / facts["log"]).read_text()


def test_providers_that_are_not_installed_are_refused() -> None:
    lacking = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    for provider, full in lacking.items():
        if full in onnxruntime.get_available_providers():
            continue
        with pytest.raises(Refused, match=full):
            OnnxRuntime(name="onnxruntime", provider=provider).check()


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here the provider works")
@pytest.mark.parametrize(("provider", "message"), [("cuda", "fall back to the CPU"), ("tensorrt", "do not load")])
def test_a_provider_fallback_is_refused(
    onnx_file: Path, provider: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU wheel where CUDA does not load, or (without one) a wheel that claims it: ONNX Runtime itself falls back."""
    full = f"{'CUDA' if provider == 'cuda' else 'Tensorrt'}ExecutionProvider"
    engine = OnnxRuntime(name="onnxruntime", provider=provider)
    if full not in onnxruntime.get_available_providers():
        message = "fall back to the CPU"
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [full, "CPUExecutionProvider"])
    with pytest.raises(ReconError, match=message):
        engine._open(onnx_file, engine._options("basic"), provider)
    assert capsys.readouterr().out == ""
    with pytest.raises(ReconError, match="no CUDA device"):
        engine.load(onnx_file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"provider": "npu"}, "provider=npu"),
        ({"optimisation": "max"}, "optimisation=max"),
        ({"threads": -1}, "-1"),
        ({"tf32": False}, "tf32=false has no effect"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ReconError, match=message):
        OnnxRuntime(name="onnxruntime", **settings).check()  # type: ignore[arg-type]


def test_torch_devices() -> None:
    Torch(name="torch").check()
    with pytest.raises(ReconError, match="no such device"):
        Torch(name="torch", device="gpu").check()
    if not torch.cuda.is_available():
        with pytest.raises(ReconError, match="0 CUDA"):
            Torch(name="torch", device="cuda").check()


def test_cache_keys_know_the_cpu_and_the_tools() -> None:
    found = OnnxRuntime(name="onnxruntime").versions()
    assert found["onnxruntime"] == onnxruntime.__version__
    assert "family" in found["cpu"]
    assert Torch(name="torch").versions()["torch"] == str(torch.__version__)


def test_compare_measures_what_it_says() -> None:
    want, got = _Fixed(torch.tensor([3.0, 4.0])), _Fixed(torch.tensor([3.0, 4.5]))
    error = compare(want, got, [{}])["y"]
    assert error.rel_l2 == pytest.approx(0.1)
    assert error.max_abs == pytest.approx(0.5)
    assert error.max_rel == pytest.approx(0.125)
    assert error.cosine == pytest.approx((9 + 18) / (5 * (9 + 20.25) ** 0.5))
    assert error.passes(0.11)
    assert not error.passes(0.09)
    with pytest.raises(ReconError, match=r"1\.00e-01"):
        require({"y": error}, 1e-2, "this")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    want, got = _Fixed(torch.tensor([3.0, 4.0])), _Fixed(torch.tensor([3.0, bad]))
    error = compare(want, got, [{}], finite=False)["y"]
    assert error.nan_count + error.inf_count == 1
    assert not error.passes(float("inf"))
    with pytest.raises(ReconError, match="'y' holds"):
        compare(want, got, [{}])
    with pytest.raises(ReconError, match="reference's own"):
        compare(got, want, [{}])


def test_compare_refuses_what_cannot_be_compared() -> None:
    want = _Fixed(torch.zeros(2))
    assert compare(want, want, [{}])["y"] == OutputError(0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ReconError, match="shape"):
        compare(want, _Fixed(torch.zeros(3)), [{}])
    with pytest.raises(ReconError, match="no inputs"):
        compare(want, want, [])
    assert compare(want, _Fixed(torch.ones(2)), [{}])["y"].rel_l2 == float("inf")


class _Fixed(TorchSession):
    """A session that always answers the same, so that errors are known in advance."""

    def __init__(self, value: torch.Tensor) -> None:
        self.inputs, self.outputs, self.value = {}, {"y": TensorSpec(tuple(value.shape))}, value

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": self.value}


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, path.stem)
        for group in ("engine", "quant_mode", "precision")
        for path in sorted((CONF / group).glob("*"))
    ],
)
def test_every_option_works_here_or_is_refused_with_what_is_missing(group: str, name: str) -> None:
    """Which of them work depends on the packages that are installed; what is refused says which one is missing."""
    found = option(group, name)
    assert found.name == name
    refused = None
    try:
        found.check()
    except Refused as error:
        refused = error
    if refused is not None:
        assert name in refused.problem
        assert refused.problem.count("\n") == 0
        assert refused.remedy


def test_the_reference_and_the_default_always_work() -> None:
    for group, name in (("engine", "torch"), ("engine", "onnxruntime"), ("quant_mode", "none"), ("precision", "fp8")):
        option(group, name).check()


WEIGHTS = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
ONNX_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.INT8,
              "fp8": TensorProto.FLOAT8E4M3FN, "nvfp4": TensorProto.FLOAT4E2M1}  # fmt: skip


def one_product(form: str, path: Path) -> Path:
    """x [8,64] times a constant in a format, with activations in it for int8 and fp8; FP32 in and out."""
    kind, nodes, weight, value = ONNX_TYPES.get(form, TensorProto.FLOAT), [], "w", "x"
    scale = {"int8": np.abs(WEIGHTS).max() / 127, "fp8": np.abs(WEIGHTS).max() / 448}.get(form, 1.0)
    codes = WEIGHTS / scale if form != "nvfp4" else np.sign(WEIGHTS)
    constants = [helper.make_tensor("w", kind, (64, 64), (np.round(codes) if form == "int8" else codes).ravel())]
    if form in ("int8", "fp8", "nvfp4"):
        constants.append(numpy_helper.from_array(np.float32(scale), "s"))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]))
        weight = "wd"
    if form in ("int8", "fp8"):
        steps = 127 if form == "int8" else 448
        constants.append(numpy_helper.from_array(np.float32(4 / steps), "xs"))
        constants.append(helper.make_tensor("z", kind, (), [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]))
        value = "xd"
    if form in ("fp16", "bf16"):
        nodes.append(helper.make_node("Cast", ["x"], ["xc"], to=kind))
        value = "xc"
    last = "yc" if form in ("fp16", "bf16") else "y"
    nodes.append(helper.make_node("MatMul", [value, weight], [last], name="product"))
    if last == "yc":
        nodes.append(helper.make_node("Cast", ["yc"], ["y"], to=TensorProto.FLOAT))
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 64])] for name in "xy"]
    graph = helper.make_graph(nodes, "one", *ends, initializer=constants)
    opset = 23 if form == "nvfp4" else 20
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11 if opset > 22 else 10
    )
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8", "fp8", "nvfp4"])
def test_what_the_cpu_provider_is_said_to_run_is_what_it_runs(form: str, tmp_path: Path) -> None:
    rest = form if form in ("fp32", "fp16", "bf16") else "fp32"
    formats = [] if rest == form else [LayerFormat(form)]  # type: ignore[arg-type]
    engine, built = OnnxRuntime(name="onnxruntime"), tmp_path / "one.engine"
    graph = one_product(form, tmp_path / "one.onnx")
    x = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2
    if refused := engine.refuses(formats, rest):  # type: ignore[arg-type]
        assert form in ("bf16", "nvfp4")
        assert "cpu provider has no" in refused
        with pytest.raises(ReconError, match="cannot load it"):
            engine.optimise(graph, built)
        return
    engine.optimise(graph, built)
    with engine.load(built) as session:
        error = (session.infer({"x": x})["y"] - x @ torch.from_numpy(WEIGHTS)).norm() / (
            x @ torch.tensor(WEIGHTS)
        ).norm()
    assert error < {"fp32": 1e-6, "fp16": 1e-3, "int8": 2e-2, "fp8": 6e-2}[form]
    (layer,) = engine.inspect(built).layers
    assert layer.compute == ("int8" if form == "int8" else "fp32"), "there is a kernel for INT8 alone"
    assert layer.weight == ("fp32" if form == "fp16" else form), "FP16 weights are widened, the others stay"


def test_layers_that_share_a_quantised_input_stay_int8(tmp_path: Path) -> None:
    """Query, key and value: ONNX Runtime alone computes them in FP32."""
    model = onnx.load(str(one_product("int8", tmp_path / "one.onnx")))
    (product,) = (node for node in model.graph.node if node.op_type == "MatMul")
    again = onnx.NodeProto()
    again.CopyFrom(product)
    again.name, again.output[0] = "again", "y2"
    model.graph.node.extend([again, helper.make_node("Add", ["y1", "y2"], ["y"])])
    product.output[0] = "y1"
    onnx.save(model, str(tmp_path / "two.onnx"))
    engine = OnnxRuntime(name="onnxruntime")
    facts = engine.optimise(tmp_path / "two.onnx", tmp_path / "two.engine")
    assert facts["ops"]["com.microsoft::MatMulIntegerToFloat"] == 2
    assert "Q/DQ pairs unshared" in facts["held_back"]
    assert {layer.compute for layer in engine.inspect(tmp_path / "two.engine").layers} == {"int8"}


def test_weight_only_products_are_not_given_quantised_activations(tmp_path: Path) -> None:
    model = onnx.load(str(one_product("int8", tmp_path / "one.onnx")))
    (product,) = (node for node in model.graph.node if node.op_type == "MatMul")
    product.input[0] = "x"
    keep = [node for node in model.graph.node if not node.output[0].startswith("x")]
    del model.graph.node[:]
    model.graph.node.extend(keep)
    onnx.save(model, str(tmp_path / "wo.onnx"))
    engine = OnnxRuntime(name="onnxruntime")
    engine.optimise(tmp_path / "wo.onnx", tmp_path / "wo.engine")
    (layer,) = engine.inspect(tmp_path / "wo.engine").layers
    assert (layer.compute, layer.weight, layer.inputs) == ("fp32", "int8", ())


def test_modules_of_the_source_are_known_in_the_engine(onnx_file: Path, engine_file: Path) -> None:
    """Fusions and layouts rename nodes; the build leaves in the file what they were."""
    layers = OnnxRuntime(name="onnxruntime").inspect(engine_file).layers
    assert {module for layer in layers for module in layer.modules} == {"stem", "patch", "qkv", "out"}


OUT_OF_MEMORY = """
import resource, sys
import onnx, onnxruntime, psutil
from pathlib import Path
from recon.engines.onnxruntime import OnnxRuntime
from recon.errors import ReconError
limit = psutil.Process().memory_info().vms + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    OnnxRuntime(name="onnxruntime", threads=1).optimise(Path(sys.argv[1]), Path(sys.argv[2]))
except ReconError as error:
    sys.exit(str(error))
"""


def test_too_little_memory_says_how_much_the_weights_take(tmp_path: Path) -> None:
    """192 MiB of weights where 150 MiB can be had."""
    side, path = 4096, tmp_path / "large.onnx"
    names = ["x", *(f"y{number}" for number in range(3))]
    weight = numpy_helper.from_array(np.full((side, side), 1e-3, np.float32))
    weights = [onnx.TensorProto() for _ in names[1:]]
    for number, tensor in enumerate(weights):
        tensor.CopyFrom(weight)
        tensor.name = f"w{number}"
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, side]) for name in (names[0], names[-1]))
    graph = helper.make_graph(nodes, "large", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, str(path), save_as_external_data=True, location="large.onnx.data")
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(path), str(tmp_path / "large.engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "not enough memory for ONNX Runtime to open it" in done.stderr
    assert "its weights alone take 192 MiB" in done.stderr
    assert "fewer views" in done.stderr
