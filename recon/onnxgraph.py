"""Reading ONNX graphs: types, shapes, module paths, and what the operands of products really are.

Nothing here believes a name or a comment: a weight is int8 when the constant that the product's operand is computed
from is stored as int8. Both the certificate (of the written graph) and ONNX Runtime's inspection (of the optimised one)
read with it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError

if TYPE_CHECKING:
    import numpy as np
    import onnx

FORMATS = {
    1: "fp32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64", 16: "bf16",
    17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "uint4", 22: "int4", 23: "fp4", 24: "e8m0",
}  # fmt: skip
"""`onnx.TensorProto` type -> format. Of the four FP8 types only E4M3FN (17) is written by this project."""
WIDTHS = {"bool": 8, "uint8": 8, "e8m0": 8, "int32": 32, "int64": 64, "fp64": 64, "uint4": 4, "int4": 4, "fp4": 4}
WIDTHS |= {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "nf4": 4, "nvfp4": 4, "codebook": 4}
"""Bits of one value."""

PRODUCTS = {
    "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "QLinearMatMul", "QGemm", "MatMulNBits",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Conv", "FusedConv", "ConvInteger", "QLinearConv",
    "ConvTranspose", "Attention", "MultiHeadAttention", "GroupQueryAttention", "GemmFloat8",
}  # fmt: skip
INTEGER = {"MatMulInteger", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger",
           "QLinearConv"}  # fmt: skip
"""Operators whose product is taken in int8 and added in int32."""
CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose"}
PASSING = {"Reshape", "Transpose", "Identity", "Cast", "Unsqueeze", "Squeeze", "Flatten"}
"""Operators that move values without computing with them."""
FUSED_AFTER = {"Add", "Relu", "Clip", "Sigmoid", "Tanh", "Gelu", "LeakyRelu"}
"""Operators that engines fuse into the product before them, often under the name of their output."""
SCOPES = "pkg.torch.onnx.name_scopes"  # e.g. "['', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.qkv', 'linear']"
MODULES_KEY = "recon.modules"
"""Model metadata in which an engine's file keeps the module path of every node it was built from."""


@dataclass(frozen=True)
class Weight:
    """A constant operand. format: of the stored values. codebook: the 16 values that 4-bit codes stand for, ascending.

    block: values that share a scale; 0 = one scale per channel, per tensor, or none. bits: per value, scales included.
    leaf: the stored constant. transposed: it is stored [out, in]. ops: between the constant and the product.
    """

    format: str
    bits: float
    block: int
    leaf: str
    transposed: bool
    ops: tuple[str, ...]
    codebook: tuple[float, ...] = ()


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution. compute: format that its operands have. activation: format between the last
    QuantizeLinear and the product, `-dynamic` when the scale is computed at run time; empty where there is none."""

    name: str
    op: str
    module: str
    multiply_adds: int
    compute: str
    activation: str = ""
    weight: Weight | None = None


def read_model(path: Path, stages: str = "export,build") -> onnx.ModelProto:
    """The model of an ONNX file, its weights left on disk. stages: those that write such a file, for remedies.

    Raises:
        ReconError: no such file, no ONNX, or nothing in it.
    """
    import onnx

    if not path.is_file():
        raise ReconError(f"{path}: no such file", f"run stages=[{stages}] first")
    remedy = f"delete it and run stages=[{stages}] again"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is private to its implementation
        raise ReconError(f"{path}: is no ONNX file, or damaged ({error})", remedy) from error
    if not model.graph.node:
        raise ReconError(f"{path}: holds no graph", remedy)
    return model


def scopes(node: onnx.NodeProto) -> list[str]:
    """Module paths from the outermost to the innermost, and the operator's name last; empty without metadata."""
    text = next((item.value for item in node.metadata_props if item.key == SCOPES), "")
    try:
        found = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):  # not written by torch's exporter
        return []
    return [str(scope) for scope in found]


def module_path(node: onnx.NodeProto) -> str:
    """Path of the innermost module that the node belongs to; empty when the graph does not say."""
    found = scopes(node)
    return found[-2] if len(found) > 1 else ""


class OnnxGraph:
    """An ONNX file, its weights left on disk."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.path = path
        model = onnx.load(str(path), load_external_data=False)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
        graph = _inferred(model).graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.constants: dict[str, onnx.TensorProto] = {item.name: item for item in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                for entry in node.attribute:
                    if entry.name == "value":
                        self.constants[node.output[0]] = entry.t
        self.types: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            self.types[value.name] = FORMATS.get(kind.elem_type, "")
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(int(axis.dim_value) for axis in kind.shape.dim)
        for name, item in self.constants.items():
            self.types[name], self.shapes[name] = FORMATS.get(item.data_type, ""), tuple(item.dims)

    @cached_property
    def products(self) -> list[Product]:
        """Every matrix product and convolution, in order."""
        return [self._product(node) for node in self.nodes if node.op_type in PRODUCTS]

    def module(self, node: onnx.NodeProto) -> str:
        """Module path that the exporter left in the node, or an empty string."""
        return module_path(node)

    def values(self, name: str) -> np.ndarray:
        """A constant's values, read from disk."""
        from onnx import numpy_helper

        found: np.ndarray = numpy_helper.to_array(self.constants[name], str(self.path.parent))
        return found

    def weight(self, value: str, inner: int = 0) -> Weight | None:
        """What a constant operand is computed from; None when any part of it is not constant. inner: values of it that
        one output value is summed over: with one scale for as many, a scale is per channel, not per block."""
        leaves, ops, books = self._leaves(value, frozenset())
        if leaves is None or not leaves:
            return None
        codes = max(leaves, key=lambda leaf: prod(self.shapes[leaf]))
        count = prod(self.shapes[codes])
        bits = sum(prod(self.shapes[leaf]) * WIDTHS.get(self.types[leaf], 32) for leaf in leaves) / max(count, 1)
        scales = [prod(self.shapes[leaf]) for leaf in leaves if leaf not in (codes, *books)]
        largest = max(scales, default=1)
        block = count // largest if largest > 1 and count // largest < (inner or count) else 0
        book = tuple(sorted(float(v) for v in self.values(books[0]).ravel())) if books else ()
        return Weight(self.types[codes], bits, block, codes, ops.count("Transpose") % 2 == 1, tuple(ops), book)

    def activation(self, value: str) -> str:
        """Format of the Q/DQ pair on a product's operand; empty when there is none."""
        node = self._behind(value)
        if node is None or node.op_type not in ("DequantizeLinear", "TRT_FP4DynamicQuantize"):
            return ""
        quantiser = self._behind(node.input[0])
        if quantiser is None:
            return ""
        if quantiser.op_type == "TRT_FP4DynamicQuantize":
            return "nvfp4-dynamic"
        if quantiser.op_type == "DynamicQuantizeLinear":
            return "int8-dynamic"
        if quantiser.op_type != "QuantizeLinear":
            return ""
        kind = self.types.get(quantiser.output[0], "").replace("uint8", "int8")
        return kind if self.weight(quantiser.input[1]) is not None else f"{kind}-dynamic"

    def _product(self, node: onnx.NodeProto) -> Product:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        left, right = node.input[0], node.input[_weight_input(node)] if len(node.input) > 1 else ""
        inner = (self.shapes.get(left) or (0,))[-1]
        weight = None if node.op_type in ("Attention", "MultiHeadAttention") else self.weight(right, inner)
        swapped = weight is None and node.op_type not in CONVOLUTIONS  # a constant on the left: its sides are swapped
        if swapped and (other := self.weight(left, inner)) is not None:
            weight, left = other, right
        compute, activation = self.types.get(left) or self._type_by_others(node, weight), self.activation(left)
        if node.op_type in INTEGER:
            compute, activation = "int8", self._integer_activation(node)
        elif node.op_type == "MatMulNBits":
            level = _attribute(node, "accuracy_level", 0)
            compute = {2: "fp16", 3: "bf16", 4: "int8"}.get(level, compute)
            activation = "int8-dynamic" if level == 4 else activation
            if weight is not None:
                bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 32)
                weight = replace(weight, format=f"int{bits}", bits=bits + 32 / block, block=block)
        return Product(node.name, op, self.module(node), self._multiply_adds(node, weight), compute, activation, weight)

    def _type_by_others(self, node: onnx.NodeProto, weight: Weight | None) -> str:
        """Operand type of a product whose input has none stated: that of its output, or of a weight used as it is."""
        found = self.types.get(node.output[0], "")
        return found or (weight.format if weight is not None and not weight.ops else "")

    def _integer_activation(self, node: onnx.NodeProto) -> str:
        if node.op_type == "DynamicQuantizeMatMul":
            return "int8-dynamic"
        source = self._behind(node.input[0])
        if source is None or source.op_type == "DynamicQuantizeLinear":
            return "int8-dynamic" if source is not None else "int8"
        constant = source.op_type != "QuantizeLinear" or self.weight(source.input[1]) is not None
        return "int8" if constant else "int8-dynamic"

    def _behind(self, value: str) -> onnx.NodeProto | None:
        """The node that computed a value, seen through nodes that only move it."""
        node = self.producer.get(value)
        while node is not None and node.op_type in PASSING:
            node = self.producer.get(node.input[0])
        return node

    def _leaves(self, value: str, seen: frozenset[str]) -> tuple[list[str] | None, list[str], list[str]]:
        """(stored constants a value is computed from or None, operators on the way, codebooks)."""
        if value in self.constants:
            return [value], [], []
        node = self.producer.get(value)
        if node is None or value in seen or node.op_type in PRODUCTS:
            return None, [], []
        leaves: list[str] = []
        ops, books = [node.op_type], []
        for index, name in enumerate(node.input):
            if not name or (node.op_type in ("Reshape", "Unsqueeze", "Squeeze") and index > 0):
                continue
            found, above, more = self._leaves(name, seen | {value})
            if found is None:
                return None, [], []
            if node.op_type == "Gather" and index == 0 and len(found) == 1 and prod(self.shapes[found[0]]) == 16:
                books.append(found[0])
            leaves, ops, books = leaves + found, above + ops, books + more
        return leaves, ops, books

    def _multiply_adds(self, node: onnx.NodeProto, weight: Weight | None) -> int:
        out, left = self.shapes.get(node.output[0], ()), self.shapes.get(node.input[0], ())
        if node.op_type in CONVOLUTIONS:
            kernel = self.shapes.get(node.input[_weight_input(node)], ())
            return prod(left if node.op_type == "ConvTranspose" else out) * prod(kernel[1:]) if kernel else 0
        if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
            return 0  # counted by none of our graphs: they are exported with explicit products
        if node.op_type == "MatMulNBits":
            return prod(out) * _attribute(node, "K", 0)
        inner = left[0 if _attribute(node, "transA", 0) else -1] if left else 0
        return prod(out) * inner if out else 0


def modules_of(path: Path) -> dict[str, str]:
    """Module path by name of every product, its output, and what may be fused into it: how an engine's layers, which
    are named after any of them, are told apart."""
    graph = OnnxGraph(path)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type in PRODUCTS and (module := graph.module(node)):
            found[node.name] = found[node.output[0]] = module
            after = users.get(node.output[0], [])
            while len(after) == 1 and after[0].op_type in FUSED_AFTER:
                found.setdefault(after[0].output[0], module)
                after = users.get(after[0].output[0], [])
    return found


def _weight_input(node: onnx.NodeProto) -> int:
    return {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3}.get(node.op_type, 1)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _inferred(model: onnx.ModelProto) -> Any:
    """With types and shapes of inner values where ONNX knows the operators."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # operators of other domains, or a file that only its engine understands: what is stated remains
        return model
