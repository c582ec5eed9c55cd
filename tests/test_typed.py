"""FP16 and BF16 graphs: what overflows stays FP32, types never mix, and every exception has its reason."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_network import images, network, seeded
from torch import nn

from recon.config import option
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import LayerInfo, Ranges, Recipe
from recon.graph.read import read_graph
from recon.graph.rules import LIMIT, LOGITS, weight_misfit
from recon.graph.typed import convert
from recon.graph.types import value_types
from recon.graph.writer import fit_opset, place
from recon.graph.writer_files import save
from recon.network import Network
from recon.observe import graph_maxima, layer_inputs
from recon.precision import Precision
from recon.quantise import make_recipe, write

HALF, BRAIN, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
OUTLIER = 9e4  # like DINOv2's massive activations: beyond 65504, one channel alone


class Massive(nn.Module):
    """A residual stream of which one channel is beyond FP16's range; the norm after it brings it back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        with torch.no_grad():
            self.fc2.bias[5] = OUTLIER
            self.norm2.weight[5] = 0.01

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm1(x))))
        return (self.head(self.norm2(x)).exp(),)


def massive() -> nn.Module:
    torch.manual_seed(0)
    return Massive().eval()


def exported(net: Network, folder: Path) -> tuple[Path, Ranges]:
    path = folder / "base.onnx"
    export(net, path, ExportOptions())
    fed = [images(seed) for seed in (1, 2)]
    inputs = {name: found.largest for name, found in layer_inputs(net, fed, 0, (0, 0)).items()}
    return path, Ranges(inputs, graph_maxima(path, fed), "max", "", 2, "test")


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranges]:
    return exported(network(massive, ("out",)), tmp_path_factory.mktemp("massive"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranges]:
    return exported(network(), tmp_path_factory.mktemp("small"))


def run(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {k: v.numpy() for k, v in feeds.items()})]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def blind_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything FP16, as `.half()` would have it."""
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            with np.errstate(over="ignore"):
                halved = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(halved, tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = HALF
    del model.graph.value_info[:]
    return model


def require_uniform(model: onnx.ModelProto) -> dict[str, int]:
    """No node takes floating-point inputs of two types (codes, conditions and Resize's sizes are no such inputs)."""
    types = value_types(model)
    kinds = (FLOAT, HALF, BRAIN)
    for node in model.graph.node:
        if node.op_type != "Cast":
            found = {types[name] for name in node.input if types.get(name) in kinds}
            assert len(found) <= 1 or node.op_type == "Resize", (node.op_type, node.name, found)
    onnx.checker.check_model(model)
    return types


def test_an_outlier_channel_overflows_under_blind_half_and_not_here(outlier: tuple[Path, Ranges]) -> None:
    path, ranges = outlier
    feeds = images(9)
    with torch.no_grad():
        want = massive()(feeds["images"])[0]
        assert not bool(massive().half()(feeds["images"].half())[0].isfinite().all()), "torch's own .half()"
    halved = run(blind_half(read_graph(path)), {"images": feeds["images"].half()})[0]
    assert not bool(halved.isfinite().all()), "the same in ONNX Runtime"
    model = read_graph(path)
    facts = convert(model, "fp16", ranges, set())
    got = run(model, feeds)[0]
    assert bool(got.isfinite().all())
    assert relative(got, want) < 2e-3
    assert "Add fc2" in facts["kept_fp32"]["a constant overflows"]
    assert facts["kept_fp32"][f"values beyond {LIMIT:.0f}"], "the residual stream after it"
    assert facts["nodes_fp32"] < facts["nodes"] / 2, "most of the network is FP16 all the same"
    types = require_uniform(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert {types[node.output[0]] for node in products} == {HALF}, "fc2's product is small, its bias is not"


def test_inputs_and_outputs_stay_fp32_and_types_do_not_mix(small: tuple[Path, Ranges]) -> None:
    path, ranges = small
    for rest, kind in (("fp16", HALF), ("bf16", BRAIN)):
        model = read_graph(path)
        facts = convert(model, rest, ranges, set())  # type: ignore[arg-type]
        types = require_uniform(model)
        assert {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]} == {FLOAT}
        assert [value.name for value in model.graph.output] == ["pooled", "tokens"]
        for node in model.graph.node:
            if node.op_type in ("MatMul", "Conv", "Softmax"):
                assert types[node.output[0]] == kind, node.op_type
            if node.op_type in ("LayerNormalization", "ReduceMean"):
                assert types[node.output[0]] == FLOAT
        assert facts["values_without_range"] == 0
        assert facts["opset"] == (20 if rest == "fp16" else 22), "Conv takes BF16 since opset 22"
    with torch.no_grad():
        want = network().load()(images(9)["images"])
    model = read_graph(path)
    convert(model, "fp16", ranges, set())
    assert all(relative(got, expected) < 2e-3 for got, expected in zip(run(model, images(9)), want, strict=True))


def test_every_exception_has_a_reason(small: tuple[Path, Ranges]) -> None:
    path, ranges = small
    model = read_graph(path)
    facts = convert(model, "fp16", ranges, set())
    assert "LayerNormalization norm" in facts["kept_fp32"]["sums or exponentials"]
    listed = sum(len(names) for names in facts["kept_fp32"].values())
    assert 0 < listed <= facts["nodes_fp32"]
    assert facts["limits"]["largest"] == LIMIT


def test_fp16_needs_ranges_and_fp32_is_left_alone(small: tuple[Path, Ranges]) -> None:
    model = read_graph(small[0])
    with pytest.raises(ReconError, match="ranges"):
        convert(model, "fp16", None, set())
    before = model.SerializeToString()
    convert(model, "fp32", None, set())
    assert model.SerializeToString() == before


def test_protected_and_unloaded_constants_are_cast_and_named_nodes_stay(small: tuple[Path, Ranges]) -> None:
    path, ranges = small
    model = read_graph(path)
    weight = next(node.input[1] for node in model.graph.node if node.op_type == "MatMul" and "qkv" in str(node))
    kept = next(node.name for node in model.graph.node if node.op_type == "Softmax")
    convert(model, "fp16", ranges, {weight, kept})
    types = require_uniform(model)
    assert types[weight] == FLOAT
    cast = next(node for node in model.graph.node if weight in node.input)
    assert (cast.op_type, types[cast.output[0]]) == ("Cast", HALF)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    assert types[softmax.output[0]] == FLOAT
    unloaded = read_graph(path, weights=False)
    external = {tensor.name for tensor in unloaded.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    convert(unloaded, "fp16", ranges, set())
    assert external
    assert external <= {node.input[0] for node in unloaded.graph.node if node.op_type == "Cast"}


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("placed_first", [True, False])
def test_quantised_graphs(name: str, placed_first: bool, small: tuple[Path, Ranges]) -> None:
    path, ranges = small
    precision = option("precision", name)
    assert isinstance(precision, Precision)
    module = seeded()
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    form = precision.layer_format()
    assert form is not None
    infos = {path: LayerInfo(path, layer.in_features, layer.out_features) for path, layer in layers.items()}
    weights = {path: precision.quantise(layer.weight, infos[path]) for path, layer in layers.items()}
    recipe = Recipe(dict.fromkeys(layers, form), weights, ranges, "fp16", infos)
    model = read_graph(path)
    fit_opset(model, recipe.layers, "fp16")
    if placed_first:
        place(model, recipe)
    replaced = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"} if not placed_first else set()
    convert(model, "fp16", ranges, replaced & {tensor.name for tensor in model.graph.initializer})
    if not placed_first:
        place(model, recipe)
    types = require_uniform(model)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 6
    for node in pairs:
        other = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
        assert types[node.input[1]] == types[other] == HALF, "scale and value have one type"
    with torch.no_grad():
        want = module(images(9)["images"])
    assert all(relative(got, expected) < 0.08 for got, expected in zip(run(model, images(9)), want, strict=True))


def test_quantised_weights_that_fp16_cannot_hold_stay_fp32(small: tuple[Path, Ranges], tmp_path: Path) -> None:
    """As with LayerScale folded into them: FP16 scales would be subnormal numbers, or zero."""

    def shrunk() -> nn.Module:
        module = seeded()
        with torch.no_grad():
            module.out.weight *= 1e-6
        return module

    net = network(shrunk)
    path, ranges = exported(net, tmp_path)
    mode, precision = option("quant_mode", "none"), option("precision", "int8")
    recipe = make_recipe(net, mode, precision, ranges)  # type: ignore[arg-type]
    assert weight_misfit(recipe.weights["out"]) == "its quantised weight underflows"
    assert not weight_misfit(recipe.weights["qkv"])
    facts = write(net, path, recipe, tmp_path / "int8.onnx")
    assert facts["typed"]["kept_fp32"]["its quantised weight underflows"] == ["MatMul out"]
    model = read_graph(tmp_path / "int8.onnx")
    types = require_uniform(model)
    scales = {name: kind for name, kind in types.items() if name.endswith("weight.scale")}
    assert scales == {"out.weight.scale": FLOAT, "qkv.weight.scale": HALF}
    with torch.no_grad():
        want = shrunk()(images(9)["images"])
    assert all(relative(got, expected) < 0.02 for got, expected in zip(run(model, images(9)), want, strict=True))


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], opset: int = 20) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, FLOAT, [1, 4, 4, 4]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "made", ends[:1], ends[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def ranges_of(**values: float) -> Ranges:
    return Ranges({}, values, "max", "", 1, "")


def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


EYE = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("constant", "reason"),
    [
        (EYE * 7e4, "a constant overflows"),
        (EYE * 1e-9, "a constant underflows"),
        (EYE * 3e-7, "a constant underflows"),
        (EYE, ""),
        (np.where(EYE > 0, -np.inf, EYE).astype(np.float32), ""),
    ],
)
def test_constants_that_fp16_cannot_hold(constant: np.ndarray, reason: str) -> None:
    model = graph([node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "e"], "y")], {"w": constant, "e": EYE})
    facts = convert(model, "fp16", ranges_of(x=1, a=1, y=1), set())
    assert set(facts["kept_fp32"]) == ({reason} if reason else set())
    assert value_types(model)["w"] == (FLOAT if reason else HALF)
    require_uniform(model)


@pytest.mark.parametrize(
    ("top", "op", "reason"),
    [
        (LIMIT * 1.01, "Relu", "values beyond"),
        (LIMIT * 0.99, "Relu", ""),
        (1e-5, "Relu", "values below"),
        (LOGITS * 1.01, "Softmax", "logits beyond"),
        (LOGITS * 0.99, "Softmax", ""),
    ],
)
def test_ranges_decide(top: float, op: str, reason: str) -> None:
    nodes = [node("MatMul", ["x", "e"], "a"), node(op, ["a"], "b"), node("MatMul", ["b", "e"], "y")]
    facts = convert(graph(nodes, {"e": EYE}), "fp16", ranges_of(x=1, a=top, b=1, y=1), set())
    assert [kept for kept in facts["kept_fp32"] if kept.startswith(reason or "values")] == [
        kept for kept in facts["kept_fp32"] if reason
    ]


def test_ends_constants_and_operators_with_types_of_their_own() -> None:
    constant = node("Constant", [], "two", value=numpy_helper.from_array(np.float32(2.0)))
    nodes = [
        node("MatMul", ["x", "e"], "a"),
        constant,
        node("Mul", ["a", "two"], "b"),
        node("Resize", ["b", "", "scales"], "c", mode="linear"),
        node("Greater", ["c", "two"], "mask"),
        node("Cast", ["mask"], "ones", to=FLOAT),
        node("Mul", ["c", "ones"], "d"),
        node("MatMul", ["d", "e"], "f"),
        node("Sigmoid", ["f"], "y"),
    ]
    model = graph(nodes, {"e": EYE, "scales": np.ones(4, np.float32)})
    want = run(model, {"x": torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))})[0]
    facts = convert(model, "fp16", ranges_of(x=1, a=1, b=2, c=2, ones=1, d=2, f=1, y=1), set())
    types = require_uniform(model)
    assert facts["kept_fp32"] == {"end of an output": ["Sigmoid y"]}
    assert types["scales"] == FLOAT, "ONNX wants them so"
    assert {types[name] for name in ("two", "b", "c", "ones", "d", "f")} == {HALF}
    got = run(model, {"x": torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))})[0]
    assert relative(got, want) < 1e-3


def test_an_output_that_is_used_inside_keeps_its_name_and_type() -> None:
    model = graph([node("MatMul", ["x", "e"], "y"), node("MatMul", ["y", "e"], "z")], {"e": EYE})
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, [1, 4, 4, 4]))
    convert(model, "fp16", ranges_of(x=1, y=1, z=1), set())
    types = require_uniform(model)
    assert (types["y"], types["z"]) == (FLOAT, FLOAT)
    fed = {"x": torch.rand(1, 4, 4, 4)}
    assert all(relative(got, fed["x"]) < 1e-3 for got in run(model, fed))
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert products[1].input[0] == products[0].output[0], "no detour over FP32"


def test_a_subgraph_and_what_it_takes_stay_fp32() -> None:
    branch = helper.make_graph(
        [node("Neg", ["a"], "n")], "branch", [], [helper.make_tensor_value_info("n", FLOAT, None)]
    )
    nodes = [
        node("MatMul", ["x", "e"], "a"),
        node("If", ["which"], "b", then_branch=branch, else_branch=branch),
        node("MatMul", ["b", "e"], "y"),
    ]
    model = graph(nodes, {"e": EYE, "which": np.array(True)})
    facts = convert(model, "fp16", ranges_of(x=1, a=1, b=1, y=1), set())
    assert {"has a subgraph", "a subgraph takes its value"} <= set(facts["kept_fp32"])
    fed = {"x": torch.rand(1, 4, 4, 4)}
    assert relative(run(model, fed)[0], -fed["x"]) < 1e-3


def test_bf16_leaves_transposed_convolutions_to_fp32() -> None:
    weight = np.ones((4, 4, 1, 1), np.float32)
    nodes = [node("MatMul", ["x", "e"], "a"), node("ConvTranspose", ["a", "w"], "b"), node("MatMul", ["b", "e"], "y")]
    facts = convert(graph(nodes, {"e": EYE, "w": weight}), "bf16", None, set())
    assert list(facts["kept_fp32"].values()) == [["ConvTranspose b"]]


@pytest.mark.slow
def test_not_worse_than_modelopts_autocast(outlier: tuple[Path, Ranges], tmp_path: Path) -> None:
    autocast = pytest.importorskip("modelopt.onnx.autocast", exc_type=ImportError)
    path, ranges = outlier
    np.savez(tmp_path / "data.npz", images=images(1)["images"].numpy())
    theirs = autocast.convert_to_mixed_precision(
        str(path), low_precision_type="fp16", calibration_data=str(tmp_path / "data.npz"), keep_io_types=True
    )
    ours = read_graph(path)
    convert(ours, "fp16", ranges, set())
    with torch.no_grad():
        want = massive()(images(9)["images"])[0]
    assert relative(run(ours, images(9))[0], want) <= 1.1 * relative(run(theirs, images(9))[0], want)


@pytest.mark.trt
@pytest.mark.parametrize("rest", ["fp16", "bf16"])
def test_tensorrt_takes_the_types(rest: str, outlier: tuple[Path, Ranges], tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = read_graph(outlier[0])
    convert(model, rest, outlier[1], set())  # type: ignore[arg-type]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    net = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(net, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert builder.build_serialized_network(net, builder.create_builder_config()) is not None


@pytest.mark.slow
def test_more_weights_than_one_protobuf_holds(tmp_path: Path) -> None:
    """Three matrices of 0.72 GB: FP32 does not fit into 2 GiB, and must not have to."""
    side = 13400
    assert 3 * 4 * side**2 > 2**31
    names = ("u", "v", "w")
    nodes = [node("MatMul", [f"x{i}", name], f"x{i + 1}") for i, name in enumerate(names)]
    ends = [helper.make_tensor_value_info(name, FLOAT, [1, side]) for name in ("x0", "x3")]
    made = helper.make_model(
        helper.make_graph(nodes, "large", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    diagonal = np.zeros((side, side), np.float32)
    np.fill_diagonal(diagonal, 0.5)
    raw = diagonal.tobytes()
    for name in names:
        made.graph.initializer.add(name=name, data_type=FLOAT, dims=[side, side], raw_data=raw)
    del diagonal, raw
    save(made, tmp_path / "large.onnx")
    del made
    model = read_graph(tmp_path / "large.onnx")
    convert(model, "fp16", ranges_of(x0=1, x1=1, x2=1, x3=1), set())
    size = save(model, tmp_path / "half.onnx")
    assert size == pytest.approx(3 * 2 * side**2, rel=1e-3)
    types = value_types(read_graph(tmp_path / "half.onnx", weights=False))
    assert {types[name] for name in names} == {HALF}
    assert types["x3"] == FLOAT
