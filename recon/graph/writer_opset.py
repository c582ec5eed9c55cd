"""Raising a graph's operator set in place, only where every operator keeps its meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.errors import ReconError

if TYPE_CHECKING:
    import onnx

# Operators of newer versions between 18 and 23 that differ from the older ones by the types they take, or by attributes
# whose defaults are the old behaviour (https://github.com/onnx/onnx/blob/main/docs/Changelog.md). Not among them, for
# they changed: GridSample (20, names of modes), DFT (20, axis), GroupNormalization (21, shape of the scale).
SAME = {
    "AveragePool", "Cast", "CastLike", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos",
    "DequantizeLinear", "Dropout", "Elu", "Equal", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid",
    "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "MaxPool", "Mish", "Pad", "QuantizeLinear",
    "ReduceMax", "ReduceMin", "Reshape", "Resize", "Round", "Selu", "Shape", "Sin", "Size", "Softplus", "Softsign",
    "Squeeze", "Tan", "ThresholdedRelu", "Transpose", "Unsqueeze",
}  # fmt: skip
OLDEST = 18  # before it, axes of reductions and sizes of splits were written differently
IR_VERSIONS = {20: 9, 22: 10, 23: 11}  # oldest IR that has the types of an operator set up to the key


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return int(next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")))


def raise_opset(model: onnx.ModelProto, needed: int, why: str) -> None:
    """Bring the default operator set to `needed` when it is lower, and the IR version with it.

    Raises:
        ReconError: an operator of the graph means something else there; `why` says what asked for it.
    """
    import onnx

    have = opset_of(model)
    if have >= needed:
        return
    changed = []
    for op in sorted({node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}):
        newest = onnx.defs.get_schema(op, needed, "").since_version
        if newest > have and (op not in SAME or have < OLDEST):
            changed.append(op)
    if changed:
        raise ReconError(
            f"{why} needs ONNX opset {needed}; the graph has {have}, in which {', '.join(changed)} mean something else",
            f"export.opset={needed}",
        )
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = needed
    oldest = next(ir for newest, ir in IR_VERSIONS.items() if needed <= newest)
    model.ir_version = max(model.ir_version, oldest)
