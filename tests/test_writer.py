"""The graph writer: formats of every mode in the file, checked against the tools' weights, and sabotage that is caught."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from small_network import network as small_network
from torch import nn

from recon.config import option
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Ranges, Recipe
from recon.graph import writer, writer_check
from recon.graph.layers import find_layers, replaced_weights
from recon.graph.lower import lower
from recon.graph.writer_opset import opset_of, raise_opset
from recon.network import Network, TensorSpec
from recon.onnxgraph import module_path
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quant.torch_dynamic import TorchDynamic
from recon.quantise import layer_infos, make_recipe, write

MODES = {  # mode -> type of the stored codes, opset
    "torch-int8-dynamic": (TensorProto.INT8, 20),
    "bitsandbytes-8bit": (TensorProto.INT8, 20),
    "bitsandbytes-nf4": (TensorProto.INT4, 21),
    "bitsandbytes-fp4": (TensorProto.INT4, 21),
    "modelopt-fp8": (TensorProto.FLOAT8E4M3FN, 20),
    "modelopt-nvfp4": (TensorProto.FLOAT4E2M1, 23),
}
RUNS = [name for name in MODES if name != "modelopt-nvfp4"]  # ONNX Runtime has no kernel for FLOAT4E2M1


class Trunk(nn.Module):
    """q, k and v from one value, one layer called twice (once on a constant), one product that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.head, self.start = nn.Linear(64, 64), nn.Parameter(torch.randn(1, 1, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = self.norm(tokens)
        mixed = torch.softmax(self.q(tokens) @ self.k(tokens).transpose(1, 2) / 8, -1) @ self.v(tokens)
        return (self.head(mixed + self.head(self.start)) + torch.tanh(self.head(mixed)),)


def _load() -> nn.Module:
    torch.manual_seed(3)
    return Trunk().eval()


def _tokens(seed: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(seed))}


NETWORK = Network("trunk-2x80x64", {"tokens": TensorSpec((2, 80, 64))}, ("out",), "seed-3", _load, _tokens)


SMALL = small_network()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP32 graphs by network name."""
    folder = tmp_path_factory.mktemp("base")
    for network in (NETWORK, SMALL):
        export(network, folder / f"{network.name}.onnx", ExportOptions())
    return {network.name: folder / f"{network.name}.onnx" for network in (NETWORK, SMALL)}


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    return bases[NETWORK.name]


@lru_cache
def _ranges(base: Path) -> Ranges:
    """Largest values over a few inputs: of the layers' inputs, and of every value of the graph."""
    network = next(item for item in (NETWORK, SMALL) if item.name == base.stem)
    inputs: dict[str, float] = {}
    module = network.load()
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, args, path=path: inputs.__setitem__(
                    path, max(inputs.get(path, 0), float(args[0].abs().max()))
                )
            )
    with torch.no_grad():
        for seed in range(4):
            module(*network.example(seed).values())
    model = onnx.load(str(base))
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(names, {name: value.numpy() for name, value in network.example(0).items()})
    values = {name: float(np.abs(v).max()) for name, v in zip(names, found, strict=True) if v.dtype == np.float32}
    return Ranges(inputs, values, "max", "key", 4, "test")


def _recipe(base: Path, mode: str, precision: str = "fp32", network: Network = NETWORK, **knobs: Any) -> Recipe:
    found, other = option("quant_mode", mode), option("precision", precision)
    assert isinstance(found, QuantMode)
    assert isinstance(other, Precision)
    if found.tool and not found.tool_version():
        pytest.skip(f"{found.tool} is not installed: {found.install}")
    for name, value in knobs.items():
        setattr(found, name, value)
    return make_recipe(network, found, other, _ranges(base))


def _run(path: Path, network: Network) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in network.example(9).items()}
    return [torch.from_numpy(value) for value in session.run(list(network.outputs), feeds)]


def _error(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    return float((candidate - reference).norm() / reference.norm())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_in_the_file(mode: str, base: Path, tmp_path: Path) -> None:
    codes, opset = MODES[mode]
    facts = write(NETWORK, base, _recipe(base, mode), tmp_path / "out.onnx")
    model = onnx.load(str(tmp_path / "out.onnx"))
    constants = {item.name: item for item in model.graph.initializer}
    stored = [item for item in constants.values() if item.data_type == codes and item.name.endswith(".weight.codes")]
    assert len(stored) == len(facts["layers"]) == 4, "one weight a layer, however often the layer is called"
    big = [
        item.name for item in constants.values() if item.data_type == TensorProto.FLOAT and np.prod(item.dims) >= 4096
    ]
    assert not big, "the FP32 weights are gone"
    assert facts["opset"] == opset_of(model) == opset
    assert model.ir_version == (11 if opset == 23 else 10)
    assert facts["graph"]["bits_per_weight"] < (5.2 if codes in (TensorProto.INT4, TensorProto.FLOAT4E2M1) else 9)
    assert facts["graph"]["dequantised_weights"] == 4
    assert set(facts["infos"]) == {"q", "k", "v", "head"}


@pytest.mark.parametrize("mode", MODES)
def test_weights_in_the_file_are_the_tools(mode: str, base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, mode)
    write(NETWORK, base, recipe, tmp_path / "out.onnx")
    model = onnx.load(str(tmp_path / "out.onnx"))
    for path, weight in recipe.weights.items():
        part = writer_check._computing(model, f"{path}.weight.dequantised")
        got = torch.from_numpy(ReferenceEvaluator(part).run(None, {})[0].copy()).t()
        assert torch.equal(got, weight.dequantised()), path


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_computes_what_torch_does_with_the_same_rounding(
    mode: str, precision: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe, module = _recipe(bases[SMALL.name], mode, precision, SMALL), SMALL.load()
    with torch.no_grad():
        plain = module(*SMALL.example(9).values())
        for path, weight in recipe.weights.items():
            layer = module.get_submodule(path)
            layer.weight.data = weight.dequantised()
            layer.register_forward_pre_hook(_rounding(recipe, path))
        expected = module(*SMALL.example(9).values())
    facts = write(SMALL, bases[SMALL.name], recipe, tmp_path / "out.onnx")
    for reference, same, got in zip(plain, expected, _run(tmp_path / "out.onnx", SMALL), strict=True):
        assert _error(same, got) < (2e-6 if precision == "fp32" else 1e-2)  # FP16 moves a few values to the next code
        assert _error(reference, got) > 2e-3, "quantisation has an effect"
    assert facts["typed"].get("rest", "fp32") == precision


def _rounding(recipe: Recipe, path: str) -> Callable[..., tuple[torch.Tensor]]:
    layer = recipe.layers[path]

    def hook(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        calibrated = layer.calibrated and recipe.ranges is not None
        amax = recipe.ranges.inputs[path] if calibrated and recipe.ranges else float(args[0].abs().max())
        return (writer_check.rounded(args[0], layer, amax),)

    return hook


def test_consumers_of_one_value_share_one_pair(base: Path, tmp_path: Path) -> None:
    facts = write(NETWORK, base, _recipe(base, "none", "int8"), tmp_path / "out.onnx")
    model = onnx.load(str(tmp_path / "out.onnx"))
    producer = {node.output[0]: node for node in model.graph.node}
    products = {item.path: item.node for item in _products(model)}
    assert products["q"].input[0] == products["k"].input[0] == products["v"].input[0]
    pair = producer[products["q"].input[0]]
    assert pair.op_type == "DequantizeLinear"
    assert producer[pair.input[0]].op_type == "QuantizeLinear"
    assert facts["graph"]["qdq_pairs"] == 1 + 2, "q, k and v share one; the two calls of head have one each"
    assert facts["graph"]["inputs"] == {"int8": 4}
    assert facts["rest"] == "fp16"


def _products(model: onnx.ModelProto) -> list[Any]:
    from recon.graph.layers import Occurrence

    return [
        Occurrence(module_path(node), node, node.input[0], node.input[1], False, 1)
        for node in model.graph.node
        if node.op_type == "MatMul" and module_path(node) in ("q", "k", "v", "head")
    ]


@pytest.mark.parametrize("mode", MODES)
def test_new_nodes_and_their_names_lead_to_the_module(mode: str, base: Path, tmp_path: Path) -> None:
    before = {node.name for node in onnx.load(str(base), load_external_data=False).graph.node}
    write(NETWORK, base, _recipe(base, mode), tmp_path / "out.onnx")
    new = [node for node in onnx.load(str(tmp_path / "out.onnx")).graph.node if node.name not in before]
    assert new
    for node in new:
        assert module_path(node) in ("q", "k", "v", "head")
        assert node.name.startswith(f"{module_path(node)}.")
    assert len({node.name for node in new}) == len(new)


def test_folded_weights_have_the_tools_rounding(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, "bitsandbytes-nf4", exact=False)
    facts = write(NETWORK, base, recipe, tmp_path / "out.onnx")
    model = onnx.load(str(tmp_path / "out.onnx"))
    folded = {item.name: item for item in model.graph.initializer if "folded_nf4" in item.name}
    assert set(folded) == {f"{path}.weight.folded_nf4" for path in ("q", "k", "v", "head")}
    got = torch.from_numpy(onnx.numpy_helper.to_array(folded["q.weight.folded_nf4"]).copy()).t()
    assert torch.equal(got, recipe.weights["q"].dequantised())
    assert facts["opset"] == 20, "nothing in the file needs 4-bit types"
    assert facts["graph"]["codebooks"] == facts["graph"]["dequantised_weights"] == 0


def test_nvfp4_weight_only_has_no_operator_of_tensorrts_own(base: Path, tmp_path: Path) -> None:
    both = write(NETWORK, base, _recipe(base, "modelopt-nvfp4"), tmp_path / "w4a4.onnx")
    weights = write(NETWORK, base, _recipe(base, "modelopt-nvfp4", weight_only=True), tmp_path / "w4a16.onnx")
    assert both["ops"]["trt::TRT_FP4DynamicQuantize"] == 3
    assert not any(op.startswith("trt::") for op in weights["ops"])
    assert both["graph"]["inputs"] == {"nvfp4-dynamic": 4}
    assert weights["graph"]["inputs"] == {}
    assert "FLOAT4E2M1" in both["check"]["unchecked"]
    onnx.checker.check_model(str(tmp_path / "w4a16.onnx"), full_check=True)


@pytest.mark.parametrize("mode", RUNS)
def test_typed_graphs_are_valid(mode: str, base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, mode, "fp16")
    write(NETWORK, base, recipe, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    model = onnx.load(str(tmp_path / "out.onnx"))
    scales = [item for item in model.graph.initializer if item.name.endswith((".weight.scale", ".weight.absmax"))]
    assert {item.data_type for item in scales} == {TensorProto.FLOAT16}
    constants = {item.name for item in model.graph.initializer}
    assert not [node.name for node in model.graph.node if node.op_type == "Cast" and node.input[0] in constants], (
        "Casts of the weights that were replaced are gone"
    )


def _drop_inputs(*_: Any) -> str:
    return str(_[1])


def _plain_weight(patch: Any, weight: Any, dtype: int) -> str:
    """The FP32 weight in place of the rounded one, as if it had been folded back."""
    layer = _load().get_submodule(patch.path)
    return str(patch.number("weight.dequantised", layer.weight.detach().t().contiguous(), dtype))


def _swapped_scale(patch: Any, weight: Any, dtype: int) -> str:
    from dataclasses import replace

    from recon.graph.writer_weights import write_weight

    return write_weight(patch, replace(weight, scale=weight.scale * 1.01), dtype)


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("sabotage", [_plain_weight, _swapped_scale])
def test_a_sabotaged_weight_is_caught(
    mode: str, sabotage: Callable[..., str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "write_weight", sabotage)
    with pytest.raises(ReconError, match=r"layer \w+ of the written graph differs from the recipe by .* relative L2"):
        write(NETWORK, base, _recipe(base, mode), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_sabotaged_nvfp4_weight_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "write_weight", _swapped_scale)
    with pytest.raises(ReconError, match="differs from the recipe"):
        write(NETWORK, base, _recipe(base, "modelopt-nvfp4"), tmp_path / "out.onnx")


@pytest.mark.parametrize("mode", ["torch-int8-dynamic", "modelopt-fp8"])
def test_dropped_input_qdq_is_caught(mode: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "write_input", _drop_inputs)
    with pytest.raises(ReconError, match="differs from the recipe"):
        write(NETWORK, base, _recipe(base, mode), tmp_path / "out.onnx")


def test_a_layer_that_is_not_in_the_graph(base: Path, tmp_path: Path) -> None:
    model = onnx.load(str(base))
    for node in model.graph.node:
        if node.op_type == "MatMul" and module_path(node) == "v":
            del node.metadata_props[:]
    onnx.save(model, str(tmp_path / "cut.onnx"))
    with pytest.raises(ReconError, match=r"1 layers to be quantised have no product in the graph, v for one"):
        write(NETWORK, tmp_path / "cut.onnx", _recipe(base, "torch-int8-dynamic"), tmp_path / "out.onnx")


def test_weights_behind_transposes_and_shared_ones(base: Path, tmp_path: Path) -> None:
    """Without onnxsim (networks over 2 GB) the exporter leaves a Transpose in front of weights that are used twice."""
    model = onnx.load(str(base))
    weights = {module_path(node): node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    for item in model.graph.initializer:
        if item.name == weights["head"]:
            turned = onnx.numpy_helper.to_array(item).T.copy()
            item.CopyFrom(onnx.numpy_helper.from_array(turned, "head.stored"))
            model.graph.node.insert(0, helper.make_node("Transpose", ["head.stored"], [weights["head"]], perm=[1, 0]))
            break
    model.graph.value_info.append(helper.make_tensor_value_info("norm.bias", TensorProto.FLOAT, [64]))
    assert "norm.bias" in {item.name for item in model.graph.initializer}
    model.graph.node.append(helper.make_node("ReduceMax", [weights["q"]], ["largest"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("largest", TensorProto.FLOAT, []))
    onnx.save(model, str(tmp_path / "turned.onnx"))
    assert replaced_weights(model, ["q", "k", "head"]) == {weights["k"], "head.stored"}, "q's is wanted elsewhere, too"
    for precision in ("fp32", "fp16"):
        recipe = _recipe(base, "bitsandbytes-8bit", precision)
        facts = write(NETWORK, tmp_path / "turned.onnx", recipe, tmp_path / "out.onnx")
        assert facts["check"]["layers"]["head"]["writer_error"] < 1e-6
        written = onnx.load(str(tmp_path / "out.onnx"))
        names = {item.name for item in written.graph.initializer}
        assert weights["q"] in names or f"{weights['q']}.fp16" in names
        assert not names & {weights["k"], weights["v"], "head.stored"}
        onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


class Flat(nn.Module):
    """A Linear on a matrix becomes a Gemm with the weight as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(64, 48)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.only(rows),)


def test_gemm(tmp_path: Path) -> None:
    def load() -> nn.Module:
        torch.manual_seed(0)
        return Flat().eval()

    network = Network(
        "flat", {"rows": TensorSpec((5, 64))}, ("out",), "k", load, lambda seed: {"rows": torch.rand(5, 64)}
    )
    export(network, tmp_path / "flat.onnx", ExportOptions())
    model = onnx.load(str(tmp_path / "flat.onnx"))
    assert [(item.node.op_type, item.transposed) for item in find_layers(model, ["only"])] == [("Gemm", True)]
    precision = option("precision", "fp32")
    assert isinstance(precision, Precision)
    recipe = make_recipe(network, TorchDynamic(name="torch-int8-dynamic"), precision, None)
    facts = write(network, tmp_path / "flat.onnx", recipe, tmp_path / "out.onnx")
    assert facts["check"]["layers"]["only"]["writer_error"] < 1e-6
    assert facts["check"]["layers"]["only"]["quantisation_error"] > 1e-3


def _model(op: str, opset: int, **attributes: Any) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "z")]
    inputs = ["x", "z"] if op == "GridSample" else ["x"]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], **attributes)], "g", [values[0], values[2]], [values[1]]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_opset_is_raised_where_operators_keep_their_meaning() -> None:
    model = _model("Transpose", 18)
    raise_opset(model, 21, "nf4 weights")
    assert (opset_of(model), model.ir_version) == (21, 10)
    raise_opset(model, 20, "less")
    assert opset_of(model) == 21


@pytest.mark.parametrize(("op", "opset"), [("GridSample", 18), ("ReduceMax", 17), ("GroupNormalization", 20)])
def test_opset_is_not_raised_over_a_change_of_meaning(op: str, opset: int) -> None:
    with pytest.raises(ReconError, match=f"nf4 weights needs ONNX opset 21; the graph has {opset}, in which {op} mean"):
        raise_opset(_model(op, opset), 21, "nf4 weights")


def test_infos_match_the_graph(base: Path) -> None:
    infos = layer_infos(_load(), _tokens(0))
    found = find_layers(onnx.load(str(base), load_external_data=False), infos)
    assert [item.path for item in found] == ["q", "k", "v", "head", "head"], "the third call of head is constant"


def test_opset_17(tmp_path: Path) -> None:
    """For TensorRT 8: reductions and splits as they were, INT8 Q/DQ in FP32 around them; FP16 Q/DQ did not exist yet."""
    facts = export(SMALL, tmp_path / "small.onnx", ExportOptions(opset=17))
    assert facts["opset"] == 17
    assert {"ReduceMean", "Split"} <= facts["ops"].keys()
    precision = option("precision", "fp32")
    assert isinstance(precision, Precision)
    recipe = make_recipe(SMALL, TorchDynamic(name="torch-int8-dynamic"), precision, None)
    written = write(SMALL, tmp_path / "small.onnx", recipe, tmp_path / "int8.onnx")
    assert written["opset"] == 17
    assert max(layer["writer_error"] for layer in written["check"]["layers"].values()) < 1e-6
    onnx.checker.check_model(str(tmp_path / "int8.onnx"), full_check=True)
    with pytest.raises(ReconError, match=r"int8 in a network whose rest is fp16 needs ONNX opset 19; the graph has 17"):
        writer.fit_opset(onnx.load(str(tmp_path / "small.onnx")), recipe.layers, "fp16")


@pytest.mark.parametrize(
    ("op", "attributes"), [("Resize", {"antialias": 1}), ("Resize", {"axes": [2, 3]}), ("BitwiseNot", {})]
)
def test_what_opset_17_has_no_words_for(op: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(ReconError, match=f"export.opset=17: {op} .* uses what opset 18 added"):
        lower(_model(op, 18, **attributes))
