"""Linear layers in an exported graph, found by the module path that the exporter leaves in a node's metadata."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.onnxgraph import scopes

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Gemm")
BETWEEN = ("Cast", "Transpose")  # what may lie between a stored weight and its product; weights have two axes to turn


@dataclass(frozen=True)
class Occurrence:
    """One product with a layer's weight; a layer that is called several times has several.

    input: name of the value that the weight is multiplied with. weight: name of its initialiser. transposed: it lies
    as [out, in] there (Gemm with transB, or a Transpose node in between), not [in, out]. dtype: ONNX type in which
    the product takes it, after a Cast node where there is one.
    """

    path: str
    node: onnx.NodeProto
    input: str
    weight: str
    transposed: bool
    dtype: int


def find_layers(model: onnx.ModelProto, paths: Collection[str]) -> list[Occurrence]:
    """Every product with the weight of one of the Linear modules `paths`, in graph order.

    A product belongs to the innermost module of its metadata that is in `paths`, and only when its second factor is
    an initialiser (or one behind a Cast): attention's products have none.

    Raises:
        ReconError: a Linear layer's product is in a form that cannot be rewritten (a Gemm with factors of its own).
    """
    constants = {item.name: item.data_type for item in model.graph.initializer}
    between = {node.output[0]: node for node in model.graph.node if node.op_type in BETWEEN}
    found = []
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        path = next((scope for scope in reversed(scopes(node)[:-1]) if scope in paths), None)
        weight, passed = node.input[1], list[Any]()
        while weight in between:
            passed.append(between[weight])
            weight = between[weight].input[0]
        if path is not None and weight in constants:
            turned = _transposed(node, path) + sum(item.op_type == "Transpose" for item in passed)
            casts = [value.i for item in passed for value in item.attribute if value.name == "to"]
            dtype = int(casts[0]) if casts else constants[weight]
            found.append(Occurrence(path, node, node.input[0], weight, turned % 2 == 1, dtype))
    return found


def replaced_weights(model: onnx.ModelProto, paths: Collection[str]) -> set[str]:
    """Initialisers that nothing but the products of `paths` takes: quantised weights replace them altogether."""
    found = find_layers(model, paths)
    products = {item.node.output[0] for item in found}
    replaced = {item.weight for item in found}
    origin = {name: name for name in replaced}  # a value on the way from a weight to a product -> the weight
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name not in origin:
                continue
            if node.op_type in BETWEEN:
                origin[node.output[0]] = origin[name]
            elif index != 1 or node.output[0] not in products:
                replaced.discard(origin[name])
    return replaced


def require_present(found: Collection[Occurrence], paths: Collection[str], what: str) -> None:
    """Raise ReconError when a layer that is to be quantised is not in the graph."""
    if missing := sorted(set(paths) - {item.path for item in found}):
        raise ReconError(
            f"{what}: {len(missing)} layers to be quantised have no product in the graph, {missing[0]} for one",
            "they are constant at this geometry or merged with others: add them to quant_mode.keep",
        )


def _transposed(node: onnx.NodeProto, path: str) -> bool:
    values = {item.name: item for item in node.attribute}
    if node.op_type == "MatMul":
        return False
    plain = all(name not in values or values[name].f == 1.0 for name in ("alpha", "beta"))
    if not plain or ("transA" in values and values["transA"].i):
        raise ReconError(f"layer {path}: its Gemm scales or transposes its input", "add it to quant_mode.keep")
    return "transB" in values and bool(values["transB"].i)
