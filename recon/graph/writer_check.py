"""Does a written graph compute what the recipe says? Every layer in ONNX Runtime against the same rounding in torch.

Layers are compared one by one, each on the input that it has in the graph: over a whole network two correct
implementations drift apart, because values between two codes fall to either side and later layers amplify that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.formats import FP8_MAX, INT8_MAX, LayerFormat, Recipe
from recon.graph.layers import Occurrence, replaced_weights
from recon.graph.read import read_graph
from recon.graph.writer import fit_opset, place
from recon.graph.writer_files import load_weights, save
from recon.graph.writer_inputs import input_scale, smallest_scale
from recon.graph.writer_nodes import FLOAT, INT64

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from recon.network import Network

CHECK_SEED = 1001
ROWS = 64  # of a layer's input that are compared: the whole of it, for every layer, would not fit in memory
TOLERANCE = 1e-5  # relative L2 of a layer's output; FP32 sums in another order differ by less


def check(network: Network, base: Path, recipe: Recipe, scratch: Path) -> dict[str, Any]:
    """Write the Q/DQ of `recipe` into the FP32 graph `base`, run it, compare, and remove the file again.

    Returns by layer writer_error (graph against recipe) and quantisation_error (recipe against FP32 weights and
    inputs), both relative L2 of the layer's product; or `unchecked`, why only the weights were compared.

    Raises:
        ReconError: the graph computes something else than the recipe says.
    """
    model = read_graph(base, weights=False)
    originals = {item.name: item for item in map(_copy, model.graph.initializer)}
    load_weights(model, base.parent, leave=replaced_weights(model, recipe.layers))
    fit_opset(model, recipe.layers, "fp32")
    found = place(model, replace(recipe, rest="fp32"))
    reason = _unrunnable(recipe)
    if reason:
        errors = {path: {"weight_error": error} for path, error in _weight_errors(model, recipe).items()}
    else:
        probes = _probe(model, found)
        values = _run(model, scratch, network, probes)
        errors = _layer_errors(found, recipe, values, originals, base.parent)
    _require(network, errors)
    return {"layers": errors, "unchecked": reason}


@dataclass(frozen=True)
class Probe:
    """Names of the graph outputs that show one product: rows of input and output, and the input's extremes."""

    rows: str
    result: str
    largest: str
    smallest: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.rows, self.result, self.largest, self.smallest)


def rounded(inputs: torch.Tensor, layer: LayerFormat, amax: float) -> torch.Tensor:
    """Inputs of a layer after its Q/DQ pair. amax: calibrated range, or the input's own where it is dynamic."""
    import torch

    if not layer.activation:
        return inputs
    if layer.activation == "int8-dynamic":
        scale = torch.tensor(amax, dtype=torch.float32).div(INT8_MAX).clamp_min(smallest_scale(FLOAT))
    else:
        scale = torch.tensor(input_scale(layer.activation, amax), dtype=torch.float32)
    if layer.activation == "fp8":
        return (inputs / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return (inputs / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale


def _layer_errors(
    found: list[Occurrence],
    recipe: Recipe,
    values: list[tuple[np.ndarray, ...]],
    originals: Mapping[str, onnx.TensorProto],
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Errors by module path; the worst of a layer's calls."""
    import torch
    from onnx import numpy_helper

    errors: dict[str, dict[str, float]] = {}
    for item, (rows, result, largest, smallest) in zip(found, values, strict=True):
        layer = recipe.layers[item.path]
        dynamic = max(float(largest), -float(smallest))
        amax = recipe.ranges.inputs[item.path] if recipe.ranges and layer.calibrated else dynamic
        inputs, got = torch.from_numpy(rows), torch.from_numpy(result)
        simulated = rounded(inputs, layer, amax) @ recipe.weights[item.path].dequantised().t()
        plain = torch.from_numpy(numpy_helper.to_array(originals[item.weight], str(folder)).copy())
        if item.node.op_type == "Gemm" and len(item.node.input) > 2:
            got = got - _bias(item, originals, folder)
        exact = inputs @ (plain.t() if item.transposed else plain)
        calls = {"writer_error": _error(simulated, got), "quantisation_error": _error(exact, simulated)}
        before = errors.get(item.path, calls)
        errors[item.path] = {name: max(value, before[name]) for name, value in calls.items()}
    return errors


def _probe(model: onnx.ModelProto, found: list[Occurrence]) -> list[Probe]:
    """Add graph outputs that show every product of `found`."""
    from onnx import helper

    for name, number in (("starts", 0), ("ends", ROWS), ("axes", -2)):
        model.graph.initializer.append(helper.make_tensor(f"probe.{name}", INT64, [1], [number]))
    probes = []
    for index, item in enumerate(found):
        probe = Probe(*(f"probe.{index}.{role}" for role in ("rows", "result", "largest", "smallest")))
        for source, target in ((item.input, probe.rows), (item.node.output[0], probe.result)):
            window = [source, "probe.starts", "probe.ends", "probe.axes"]
            model.graph.node.append(helper.make_node("Slice", window, [target]))
        for op, target in (("ReduceMax", probe.largest), ("ReduceMin", probe.smallest)):
            model.graph.node.append(helper.make_node(op, [item.input], [target], keepdims=0))
        model.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in probe.names)
        probes.append(probe)
    return probes


def _run(model: onnx.ModelProto, scratch: Path, network: Network, probes: list[Probe]) -> list[tuple[np.ndarray, ...]]:
    """Run on one example, every Q and DQ carried out as written: none is fused into an integer product.

    Without any optimisation, since folding the codebooks of a large network takes ONNX Runtime many minutes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    example = network.example(CHECK_SEED)
    try:
        save(model, scratch)
        session = onnxruntime.InferenceSession(str(scratch), options, providers=["CPUExecutionProvider"])
        names = [name for probe in probes for name in probe.names]
        values = session.run(names, {name: example[name].numpy() for name in network.inputs})
    finally:
        for file in (scratch, scratch.with_name(f"{scratch.name}.data")):
            file.unlink(missing_ok=True)
    return [tuple(values[start : start + 4]) for start in range(0, len(values), 4)]


def _weight_errors(model: onnx.ModelProto, recipe: Recipe) -> dict[str, float]:
    """Error of every layer's dequantised weight, by ONNX's own reference implementation, against the tool's."""
    import torch
    from onnx.reference import ReferenceEvaluator

    errors = {}
    for path, weight in recipe.weights.items():
        part = _computing(model, f"{path}.weight.dequantised")
        got = torch.from_numpy(ReferenceEvaluator(part).run(None, {})[0].copy())
        errors[path] = _error(weight.dequantised().t(), got)
    return errors


def _computing(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """The part of the graph that computes a constant value."""
    from onnx import helper

    needed, nodes = {value}, list[Any]()
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    leaves = [item for item in model.graph.initializer if item.name in needed]
    graph = helper.make_graph(nodes, "weight", [], [helper.make_tensor_value_info(value, FLOAT, None)], leaves)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _require(network: Network, errors: Mapping[str, Mapping[str, float]]) -> None:
    for path, found in errors.items():
        error = found.get("writer_error", found.get("weight_error", 0.0))
        if not error <= TOLERANCE:
            raise ReconError(
                f"{network.name}: layer {path} of the written graph differs from the recipe by {error:.1e} relative L2",
                "this is a fault of recon's graph writer or of a tool version: report it with the tool versions",
            )


def _unrunnable(recipe: Recipe) -> str:
    if any(layer.weight == "nvfp4" for layer in recipe.layers.values()):
        return "ONNX Runtime has no CPU kernel for FLOAT4E2M1: weights were compared, products were not"
    return ""


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Small, while the data is in a file."""
    import onnx

    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _bias(item: Occurrence, originals: Mapping[str, onnx.TensorProto], folder: Path) -> torch.Tensor:
    import torch
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(originals[item.node.input[2]], str(folder)).copy())


def _error(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Relative L2."""
    return float((candidate - reference).norm() / reference.norm().clamp_min(1e-30))
