"""What ONNX Runtime's optimised graph says of itself.

The optimised graph is the engine: what its nodes are is what runs, with a kernel per operator and type. A product is in
int8 where the operator is an integer one, and in the format of its operands otherwise: a DequantizeLinear that is still
in front of a MatMul means that nothing was gained but the storage. Nodes are told apart by the module paths that the
build left in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

from recon.errors import ReconError
from recon.formats import EngineLayer, Inspection
from recon.onnxgraph import MODULES_KEY, OnnxGraph, Product, Weight

BEGINNINGS = ("InsertedPrecisionFreeCast_", "FusedBack_")
ENDINGS = ("_nchwc", "_quant", "_nhwc")


def inspect(path: Path) -> Inspection:
    """Products of an optimised graph one by one, with storage and compute format.

    Raises:
        ReconError: the file cannot be read.
    """
    try:
        graph = OnnxGraph(path)
    except Exception as error:  # protobuf and onnx raise types of their own
        raise ReconError(
            f"{path}: is no readable ONNX file: {error}", "delete it and run stages=[build] again"
        ) from None
    modules = json.loads(graph.metadata.get(MODULES_KEY, "{}"))
    outputs = {node.name: list(node.output) for node in graph.nodes}
    layers = []
    for product in graph.products:
        module = _module(product.name, outputs.get(product.name, []), modules)
        layers.append(
            EngineLayer(
                name=product.name,
                op=product.op,
                compute=product.compute or "unknown",
                weight=_stored(product),
                modules=(module,) if module else (),
                kernel=kernel(product),
                inputs=(product.activation,) if product.activation else (),
            )
        )
    return Inspection(tuple(layers))


def kernel(product: Product) -> str:
    """What is run: the operator with what stands between the stored weight and the product."""
    if product.weight is None or not product.weight.ops:
        return product.op
    return f"{product.op} after {' > '.join(product.weight.ops)} of the {product.weight.format} weight"


def _stored(product: Product) -> str:
    weight: Weight | None = product.weight
    if weight is None:
        return ""
    return {"uint8": "int8", "uint4": "int4"}.get(weight.format, weight.format)


def _module(name: str, outputs: list[str], modules: dict[str, str]) -> str:
    """Module path of a node that may have been renamed: fusions append `/Fusion`, layouts `_nchwc` to an output,
    inserted Casts leave `InsertedPrecisionFreeCast_` in front of one."""
    for found in (name, *outputs):
        stem = found.partition("/")[0]
        for beginning in BEGINNINGS:
            stem = stem.removeprefix(beginning)
        for ending in ("", *ENDINGS):
            if (module := modules.get(stem.removesuffix(ending))) is not None:
                return module
    return ""
