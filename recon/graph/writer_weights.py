"""Quantised weights as ONNX nodes: every form ends in a value [in, out] of the product's own type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.formats import QuantizedWeight
from recon.graph.writer_nodes import FLOAT, FP4, FP8, INT4, INT8, INT32, INT64, Patch, as_type, packed, raw_bytes

if TYPE_CHECKING:
    import torch


def write_weight(patch: Patch, weight: QuantizedWeight, dtype: int) -> str:
    """Add the nodes of one layer's weight; returns the name of the dequantised value, of ONNX type `dtype`."""
    if not weight.format.exact:
        return _folded(patch, weight, dtype)
    if weight.block_scale is not None:
        return _nvfp4(patch, weight, weight.block_scale, dtype)
    if weight.codebook is not None:
        return _codebook(patch, weight, weight.codebook, dtype)
    return _linear(patch, weight, dtype)


def _linear(patch: Patch, weight: QuantizedWeight, dtype: int) -> str:
    """INT8 or E4M3 codes and one scale per tensor or output channel: DequantizeLinear."""
    codes = patch.constant(
        "weight.codes",
        INT8 if weight.format.weight == "int8" else FP8,
        reversed(weight.codes.shape),
        raw_bytes(_bytes_of(weight.codes).t()),
    )
    scale = patch.number("weight.scale", weight.scale, dtype)
    if not weight.scale.ndim:
        return patch.add("DequantizeLinear", [codes, scale], "weight.dequantised")
    return patch.add("DequantizeLinear", [codes, scale], "weight.dequantised", axis=1)


def _codebook(patch: Patch, weight: QuantizedWeight, codebook: torch.Tensor, dtype: int) -> str:
    """Codes into 16 values, absmax per block: INT4 -> DequantizeLinear -> Gather -> Mul.

    Four-bit constants are only allowed in front of DequantizeLinear (TensorRT), and INT4 is signed, hence the detour:
    code - 8 is stored, dequantised with scale 1, moved back by 8 and cast to an index. With UINT8 indices TensorRT
    would store INT32.
    """
    import torch

    out, inner = weight.codes.shape
    block = inner // weight.scale.shape[1]
    stored = weight.codes.t().to(torch.int16) - 8
    codes = patch.constant("weight.codes", INT4, (inner, out), packed(stored))
    one = patch.number("weight.one", torch.tensor(1.0), dtype)
    eight = patch.number("weight.eight", torch.tensor(8.0), dtype)
    signed = patch.add("DequantizeLinear", [codes, one], "weight.signed")
    index = patch.add("Cast", [patch.add("Add", [signed, eight], "weight.position")], "weight.index", to=INT32)
    values = patch.number("weight.codebook", codebook, dtype)
    gathered = patch.add("Gather", [values, index], "weight.gathered", axis=0)
    blocks = _shape(patch, "weight.blocks", (inner // block, block, out))
    split = patch.add("Reshape", [gathered, blocks], "weight.split")
    absmax = patch.number("weight.absmax", weight.scale.t().unsqueeze(1), dtype)
    scaled = patch.add("Mul", [split, absmax], "weight.scaled")
    return patch.add("Reshape", [scaled, _shape(patch, "weight.whole", (inner, out))], "weight.dequantised")


def _nvfp4(patch: Patch, weight: QuantizedWeight, block_scale: torch.Tensor, dtype: int) -> str:
    """E2M1 codes, E4M3 scales of blocks, one FP32 factor: two DequantizeLinear, the inner one in FP32.

    In FP16 the factor (amax / 2688) would be a subnormal number. [out, in] with blocks along the last axis is the
    layout that TensorRT documents.
    """
    import torch

    codes = patch.constant("weight.codes", FP4, weight.codes.shape, packed(weight.codes))
    scales = patch.constant("weight.block_codes", FP8, block_scale.shape, raw_bytes(block_scale.view(torch.uint8)))
    factor = patch.number("weight.factor", weight.scale, FLOAT)
    scale = patch.add("DequantizeLinear", [scales, factor], "weight.block_scale")
    if dtype != FLOAT:
        scale = patch.add("Cast", [scale], "weight.block_scale_cast", to=dtype)
    rows = patch.add("DequantizeLinear", [codes, scale], "weight.rows", axis=1, block_size=weight.format.block)
    return patch.add("Transpose", [rows], "weight.dequantised", perm=[1, 0])


def _folded(patch: Patch, weight: QuantizedWeight, dtype: int) -> str:
    """The tool's rounding, stored dequantised."""
    return patch.constant(
        f"weight.folded_{weight.format.weight}",
        dtype,
        reversed(weight.codes.shape),
        raw_bytes(as_type(weight.dequantised().t(), dtype)),
    )


def _bytes_of(codes: torch.Tensor) -> torch.Tensor:
    import torch

    return codes.view(torch.uint8)


def _shape(patch: Patch, role: str, dims: tuple[int, ...]) -> str:
    import torch

    return patch.constant(role, INT64, (len(dims),), raw_bytes(torch.tensor(dims)))
