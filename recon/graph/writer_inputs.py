"""Quantised inputs of layers as ONNX nodes: calibrated Q/DQ, and forms whose scales are found at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recon.formats import FP8_MAX, INT8_MAX, ActivationFormat
from recon.graph.writer_nodes import FLOAT, FLOAT16, FP4, FP8, INT8, TRT, Patch

if TYPE_CHECKING:
    import torch

NVFP4_LARGEST = 6 * FP8_MAX  # largest E2M1 value times the largest block scale
NVFP4_BLOCK = 16


def input_scale(activation: ActivationFormat, amax: float) -> float:
    """What a code is multiplied with, from the largest absolute value: the constant that goes into the graph.

    int8-dynamic has no constant one: 0.
    """
    return {"int8": amax / INT8_MAX, "fp8": amax / FP8_MAX, "nvfp4-dynamic": amax / NVFP4_LARGEST}.get(activation, 0.0)


def smallest_scale(dtype: int) -> float:
    """Bound of run-time scales from below, so that an input of zeros is not divided by zero."""
    return 2.0**-14 if dtype == FLOAT16 else 2.0**-40  # a normal number of the type


def write_input(patch: Patch, value: str, activation: ActivationFormat, scale: float, dtype: int) -> str:
    """Add the nodes between `value` and a product; returns the dequantised value, of ONNX type `dtype`."""
    if activation == "nvfp4-dynamic":
        return _nvfp4(patch, value, scale, dtype)
    code = FP8 if activation == "fp8" else INT8
    factor = (
        _measured(patch, value, dtype)
        if activation == "int8-dynamic"
        else patch.number("input.scale", _scalar(scale), dtype)
    )
    zero = patch.constant("input.zero", code, (), b"\0")  # its type is the codes' type
    codes = patch.add("QuantizeLinear", [value, factor, zero], "input.codes")
    return patch.add("DequantizeLinear", [codes, factor, zero], "input.dequantised")


def _measured(patch: Patch, value: str, dtype: int) -> str:
    """Largest absolute value / 127, computed in every inference.

    Plain operators: DynamicQuantizeLinear, ONNX Runtime's own form, is unsigned with a zero point, and TensorRT has
    neither.
    """
    largest = patch.add("ReduceMax", [patch.add("Abs", [value], "input.abs")], "input.largest", keepdims=0)
    steps = patch.number("input.steps", _scalar(float(INT8_MAX)), dtype)
    least = patch.number("input.least", _scalar(smallest_scale(dtype)), dtype)
    return patch.add("Max", [patch.add("Div", [largest, steps], "input.step"), least], "input.scale")


def _nvfp4(patch: Patch, value: str, scale: float, dtype: int) -> str:
    """TensorRT's own operator finds E4M3 scales of blocks at run time, under one calibrated FP32 factor."""
    factor = patch.number("input.scale", _scalar(scale), FLOAT)
    codes, block_codes = patch.add_many(
        "TRT_FP4DynamicQuantize",
        [value, factor],
        ["input.codes", "input.block_codes"],
        TRT,
        axis=-1,
        block_size=NVFP4_BLOCK,
        scale_type=FP8,
    )
    block_scale = patch.add("DequantizeLinear", [block_codes, factor], "input.block_scale")
    if dtype != FLOAT:
        block_scale = patch.add("Cast", [block_scale], "input.block_scale_cast", to=dtype)
    return patch.add("DequantizeLinear", [codes, block_scale], "input.dequantised", axis=-1, block_size=NVFP4_BLOCK)


def _scalar(value: float) -> torch.Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float32)


__all__ = ["FP4", "input_scale", "smallest_scale", "write_input"]
