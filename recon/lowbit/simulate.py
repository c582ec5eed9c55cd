"""A torch module that computes as a quantised engine would, in FP32: weights and inputs of its layers are rounded.

What a recipe says of a layer is carried out by taking its weight as the tool dequantises it and by rounding its input
to the codes that the engine would use, so errors of formats are seen without an engine, on any machine. The rest's own
rounding (FP16, BF16) is not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.formats import FP8_MAX, INT8_MAX, ActivationFormat, Recipe

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float with two exponent bits and one mantissa bit."""
NVFP4_BLOCK = 16


@contextmanager
def simulate(module: nn.Module, recipe: Recipe) -> Iterator[nn.Module]:
    """The module with the recipe's layers rounded, for the time of the block; afterwards it is as it was.

    Raises:
        ReconError: the recipe names a layer that the module does not have, or a range is missing.
    """
    layers = dict(module.named_modules())
    weights: dict[nn.Linear, Tensor] = {}
    hooks = []
    try:
        for path, form in recipe.layers.items():
            layer = layers.get(path)
            if not isinstance(layer, nn.Linear):
                raise ReconError(
                    f"the recipe treats {path}, which is no Linear layer of the network",
                    "the recipe is one of another network: calibrate and quantise this one",
                )
            weights[layer] = layer.weight
            value = recipe.weights[path].dequantised().to(layer.weight.device, layer.weight.dtype)
            layer.weight = nn.Parameter(value, requires_grad=False)
            if form.activation:
                amax = recipe.ranges.inputs.get(path) if recipe.ranges is not None else None
                if form.calibrated and amax is None:
                    raise ReconError(f"no calibrated range for the input of {path}", "run stages=[calibrate] again")
                hooks.append(layer.register_forward_pre_hook(partial(_rounded, form.activation, amax)))
        yield module
    finally:
        for hook in hooks:
            hook.remove()
        for treated, weight in weights.items():
            treated.weight = weight


def round_input(x: Tensor, activation: ActivationFormat, amax: float | None) -> Tensor:
    """x as it comes out of the pair of quantise and dequantise. amax: the calibrated range, if any."""
    if activation == "int8":
        return _int8(x, torch.tensor((amax or 0.0) / INT8_MAX, device=x.device))
    if activation == "int8-dynamic":
        return _int8(x, x.abs().amax() / INT8_MAX)
    if activation == "fp8":
        return _fp8(x, torch.tensor((amax or 0.0) / FP8_MAX, device=x.device))
    if activation == "nvfp4-dynamic":
        return _nvfp4(x, x.abs().amax() if amax is None else torch.tensor(amax, device=x.device))
    return x


def _rounded(activation: ActivationFormat, amax: float | None, _: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return round_input(args[0], activation, amax)


def _int8(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest code, ties to even, saturated: ONNX QuantizeLinear with zero point 0."""
    scale = scale.clamp_min(1e-30)
    return (x / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    scale = scale.clamp_min(1e-30)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """E2M1 in blocks of 16 along the last axis; block scales in E4M3 under one FP32 factor (NVIDIA, NVFP4)."""
    factor = (amax / (E2M1[-1] * FP8_MAX)).clamp_min(1e-30)
    padding = -x.shape[-1] % NVFP4_BLOCK
    blocks = nn.functional.pad(x, (0, padding)).reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    scale = _fp8(blocks.abs().amax(-1, keepdim=True) / E2M1[-1], factor)
    sizes = torch.tensor(E2M1, device=x.device)
    ratio = torch.where(scale > 0, blocks / scale.clamp_min(1e-30), torch.zeros_like(blocks))
    edges = (sizes[1:] + sizes[:-1]) / 2
    rounded = sizes[torch.bucketize(ratio.abs(), edges)] * ratio.sign() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]
