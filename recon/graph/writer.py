"""Q/DQ and codebooks written around the Linear layers of an exported graph, as a recipe says.

Explicit quantisation: every number format is a type in the graph, which is all that TensorRT 11 and TensorRT-RTX take
and what ONNX Runtime runs. Attention's own products are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from recon.formats import LayerFormat, Recipe, RestFormat
from recon.graph.layers import BETWEEN, Occurrence, find_layers, require_present
from recon.graph.writer_inputs import input_scale, write_input
from recon.graph.writer_nodes import TRT, Patch
from recon.graph.writer_opset import raise_opset
from recon.graph.writer_weights import write_weight

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = {"int8": 13, "fp8": 19, "nf4": 21, "fp4": 21, "nvfp4": 23}
OLDEST_TYPED_OPSET = 19  # before it Q/DQ know FP32 alone


def place(model: onnx.ModelProto, recipe: Recipe) -> list[Occurrence]:
    """Rewrite the products of `recipe`'s layers in place; returns them as they were found.

    The graph may be typed already: Q/DQ take the type of the product that they serve. The weights that are replaced
    need not have been loaded; they are dropped from the graph.

    Raises:
        ReconError: a layer is not in the graph, or the graph's operator set cannot hold a format.
    """
    found = find_layers(model, recipe.layers)
    require_present(found, recipe.layers, model.graph.name or "graph")
    before: dict[str, list[Patch]] = {}
    inputs: dict[tuple[str, str, float], str] = {}
    weights: dict[tuple[str, int], str] = {}
    for item in found:
        patches = before.setdefault(item.node.output[0], [])
        _place_weight(item, recipe, weights, patches)
        _place_input(item, recipe, inputs, patches)
    _insert(model, before)
    _drop_unused(model, {item.weight for item in found})
    return found


def fit_opset(model: onnx.ModelProto, layers: Mapping[str, LayerFormat], rest: RestFormat) -> None:
    """Raise the operator set to what the formats need.

    Raises:
        ReconError: an operator of the graph means something else there.
    """
    for layer in layers.values():
        needed = OLDEST_OPSET[layer.weight] if layer.exact else OLDEST_OPSET["int8"]
        why = f"{layer.weight} weights"
        if rest != "fp32" and needed < OLDEST_TYPED_OPSET:
            needed, why = OLDEST_TYPED_OPSET, f"{layer.weight} in a network whose rest is {rest}"
        raise_opset(model, needed, why)
    if any(layer.activation == "nvfp4-dynamic" for layer in layers.values()):
        _import_trt(model)


def _place_weight(item: Occurrence, recipe: Recipe, written: dict[tuple[str, int], str], patches: list[Patch]) -> None:
    """Calls of one layer share one dequantised weight."""
    dtype = item.dtype
    if (item.path, dtype) not in written:
        again = any(path == item.path for path, _ in written)  # calls of one layer in two types
        patch = Patch(f"{item.path}.type{dtype}" if again else item.path, item.node)
        written[item.path, dtype] = write_weight(patch, recipe.weights[item.path], dtype)
        patches.append(patch)
    item.node.input[1] = written[item.path, dtype]
    for value in item.node.attribute:
        if value.name == "transB":  # of a Gemm: the new weight lies as MatMul has it
            value.i = 0


def _place_input(
    item: Occurrence, recipe: Recipe, written: dict[tuple[str, str, float], str], patches: list[Patch]
) -> None:
    """All layers that take the same value in the same format share one Q/DQ pair."""
    activation = recipe.layers[item.path].activation
    if not activation:
        return
    amax = recipe.ranges.inputs[item.path] if recipe.ranges and recipe.layers[item.path].calibrated else 0.0
    scale = input_scale(activation, amax)
    key = (item.input, activation, scale)
    if key not in written:
        taken = sum(1 for other in written.values() if other.startswith(f"{item.path}."))
        patch = Patch(f"{item.path}.call{taken}" if taken else item.path, item.node)
        written[key] = write_input(patch, item.input, activation, scale, item.dtype)
        patches.append(patch)
    item.node.input[0] = written[key]


def _insert(model: onnx.ModelProto, before: Mapping[str, list[Patch]]) -> None:
    """Put the new nodes in front of their products: ONNX wants nodes in topological order."""
    nodes = []
    for node in model.graph.node:
        for patch in before.get(node.output[0], ()):
            nodes += patch.nodes
            model.graph.initializer.extend(patch.constants)
        nodes.append(node)
    kept = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _drop_unused(model: onnx.ModelProto, weights: set[str]) -> None:
    """Remove the replaced weights, and what lay between nothing but them and their products."""
    outputs = {value.name for value in model.graph.output}
    used = {name for node in model.graph.node for name in node.input} | outputs
    mine, dead = set(weights), list[int]()
    for index, node in enumerate(model.graph.node):
        if node.op_type in BETWEEN and node.input[0] in mine:
            mine.add(node.output[0])
            dead.append(index)
    for index in reversed(dead):
        if model.graph.node[index].output[0] not in used:
            del model.graph.node[index]
            used = {name for other in model.graph.node for name in other.input} | outputs
    constants = model.graph.initializer
    for index in reversed(range(len(constants))):
        if constants[index].name in weights and constants[index].name not in used:
            del constants[index]


def _import_trt(model: onnx.ModelProto) -> None:
    import onnx

    if all(item.domain != TRT for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(TRT, 1))
