"""BF16 graphs for a provider that lacks some BF16 kernels: those operators are computed in FP32, between Casts.

ONNX Runtime's CUDA provider has BF16 kernels for products, norms and elementwise work, and none for Resize, Pad, Clip,
QuantizeLinear and others (`KERNELS`). It would run such a node on the CPU, which has none either. An island takes BF16
values, widens them, computes in FP32 and rounds the result to BF16: what a BF16 kernel that adds in FP32 would give.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

KERNELS = {
    "cuda": frozenset(
        """Abs Add Attention Cast Conv Cos Div Erf Exp Gelu Gemm LayerNormalization MatMul Max Min Mul Neg Relu
        RMSNormalization Sigmoid Sin Softmax Sqrt Sub Sum Tanh Where
        Concat Constant Expand Flatten Gather GatherElements Identity Reshape Shape Size Slice Split Squeeze Transpose
        Unsqueeze""".split()  # noqa: SIM905 - one name a word
    ),
}
"""provider -> operators with a BF16 kernel (the last two lines move values of any type). Read off the kernel classes in
libonnxruntime_providers_cuda.so 1.31.1; an operator that is wrongly left out costs two Casts, no more."""
STATED = {"to", "dtype", "output_dtype"}  # attributes by which a node fixes the type of its output


def islands(model: onnx.ModelProto, provider: str) -> list[str]:
    """Give every standard BF16 node that the provider has no kernel for FP32 inputs and outputs, in place.

    Its inputs and outputs keep their names and types towards the rest of the graph. Returns what was changed, one line
    per operator, for manifests; empty when nothing was. Nodes with a subgraph, or that state the type of their output,
    are left as they are: the provider then names them itself.
    """
    kernels = KERNELS.get(provider)
    bf16 = _bf16_values(model) if kernels else set()
    if kernels is None or not bf16:
        return []
    changed: dict[str, list[str]] = defaultdict(list)
    wide: dict[str, str] = {}  # BF16 value -> the same in FP32
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        lacking = node.domain in ("", "ai.onnx") and node.op_type not in kernels and not _typed_by_itself(node)
        if not lacking or not bf16 & {*node.input, *node.output}:
            nodes.append(node)
            continue
        changed[node.op_type].append(node.name or node.output[0])
        _widen(node, bf16, wide, nodes)
    if changed:
        kept = list(nodes)
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return [
        f"{op} in FP32 between Casts, for want of a BF16 kernel: {', '.join(names)}"
        for op, names in sorted(changed.items())
    ]


def _widen(node: onnx.NodeProto, bf16: set[str], wide: dict[str, str], nodes: list[onnx.NodeProto]) -> None:
    """Append the node, Casts to FP32 in front of it and Casts to BF16 behind it."""
    from onnx import TensorProto

    for position, name in enumerate(node.input):
        if name in bf16:
            if name not in wide:
                wide[name] = f"{name}.fp32_island"
                nodes.append(_cast(name, wide[name], TensorProto.FLOAT, node))
            node.input[position] = wide[name]
    nodes.append(node)
    for position, name in enumerate(node.output):
        if name in bf16:
            inner = node.output[position] = f"{name}.island_out"
            nodes.append(_cast(inner, name, TensorProto.BFLOAT16, node))


def _cast(source: str, target: str, kind: int, user: onnx.NodeProto) -> onnx.NodeProto:
    import onnx

    cast = onnx.helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)
    cast.metadata_props.extend(user.metadata_props)
    return cast


def _bf16_values(model: onnx.ModelProto) -> set[str]:
    from onnx import TensorProto, shape_inference

    stated = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    if not stated and all(item.type.tensor_type.elem_type != TensorProto.BFLOAT16 for item in model.graph.input):
        casts = (entry for node in model.graph.node if node.op_type == "Cast" for entry in node.attribute)
        if all(entry.i != TensorProto.BFLOAT16 for entry in casts):
            return set()  # nothing to infer types for
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return stated | {item.name for item in values if item.type.tensor_type.elem_type == TensorProto.BFLOAT16}


def _typed_by_itself(node: onnx.NodeProto) -> bool:
    """Whether an attribute fixes the output's type, or holds a graph, which may take values from outside."""
    return any(
        entry.type in (5, 10) or (entry.name in STATED and entry.i) or (node.op_type == "ConstantOfShape")
        for entry in node.attribute
    )
