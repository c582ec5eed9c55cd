"""Torch twins of the Triton kernels: each in plain operations. Oracle of their tests, and the path on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
Change = tuple[Tensor, Tensor | None]
"""What is added to the residual stream [rows, width], and what it is multiplied by first [width]."""


def cast(value: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """value * scale rounded to dtype; E4M3 saturates."""
    value = value.float() * scale
    return (value.clamp(-E4M3_MAX, E4M3_MAX) if dtype == torch.float8_e4m3fn else value).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """LayerNorm over the last axis in FP32, then `cast`."""
    return cast(F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps), dtype, scale)


def add_layer_norm(
    x: Tensor, changes: Sequence[Change], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    scale: float = 1.0, store: bool = True,
) -> Tensor:  # fmt: skip
    """`layer_norm` of x FP32 + every change (* its gain), in order; store: x becomes that sum."""
    total = x
    for change, gain in changes:
        total = total + (change if gain is None else change.float() * gain)
    if store:
        x.copy_(total)
    return layer_norm(total, weight, bias, eps, dtype, scale)


def joined_layer_norm(
    left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, skipped: int
) -> Tensor:
    """LayerNorm over [sequences, tokens, width] twice, side by side, without the first `skipped` tokens."""
    return layer_norm(torch.cat([left, right], -1)[:, skipped:], weight, bias, eps, dtype)


def qk_norm_rotate(
    qkv: Tensor, weights: Tensor, biases: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, q_scale: float,
    k_scale: float = 1.0, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """qkv [rows, 3C] -> normalised, rotated queries and keys [rows, 2C] in dtype (else qkv's).

    Weights and biases are [2, head width]. The tables [tokens, head width / 2] repeat over the rows. Queries are
    multiplied by q_scale, keys by k_scale.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    parts = qkv[:, : 2 * width].float().reshape(rows // cos.shape[0], cos.shape[0], 2, heads, width // heads)
    parts = F.layer_norm(parts, parts.shape[-1:], eps=eps) * weights[:, None] + biases[:, None]
    a, b = parts.chunk(2, -1)
    c, s = cos[:, None, None], sin[:, None, None]
    turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    turned[:, :, 0] *= q_scale
    turned[:, :, 1] *= k_scale
    return cast(turned.reshape(rows, 2 * width), dtype or qkv.dtype)


def gelu(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Exact GELU, then `cast`."""
    return cast(F.gelu(x.float()), dtype, scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype, scale: float = 1.0, score_scale: float = 1.0
) -> Tensor:
    """q, k, v [sequences, tokens, C]; weights are 2^(q.k * score_scale) over their sum -> the same shape, `cast`."""
    sequences, tokens, width = q.shape
    q, k, v = (part.float().reshape(sequences, tokens, heads, -1).transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=math.log(2) * score_scale)
    return cast(out.transpose(1, 2).reshape(sequences, tokens, width), dtype, scale)


def enlarge(x: Tensor, height: int, width: int, bias: Tensor) -> Tensor:
    """x [n,C,h,w] bilinear to [n,C,height,width], corners on corners, + bias [C].

    Arithmetic in FP32, result in x's dtype, channels last.
    """
    value = _bilinear(x, height, width) + bias[:, None, None]
    return value.to(x.dtype, memory_format=torch.channels_last)


def enlarged_taps(parts: Tensor, across: Tensor, down: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """parts [n,3*C or more,h,W], what the rows of a 3x3 convolution make of a low image, one after another ->
    [n,outputs,H,W] FP32.

    That is the convolution of the image enlarged to H rows, + across [3,W,C] and down [3,H,C] (see `dense.DenseEnd`),
    ReLU, and a 1x1 convolution with weight [outputs,C] and bias.
    """
    height, width, channels = down.shape[1], *across.shape[1:]
    edge, side = (torch.ones(count, dtype=torch.long, device=parts.device) for count in (height, width))
    edge[0], edge[-1], side[0], side[-1] = 0, 2, 0, 2
    value = (across[edge] + down[side].transpose(0, 1)).permute(2, 0, 1)
    for dy in range(3):
        part = parts[:, dy * channels : (dy + 1) * channels]
        value = value + F.pad(_bilinear(part, height, width), (0, 0, 1, 1))[:, :, dy : dy + height]
    return F.conv2d(value.relu(), weight[:, :, None, None], bias)


def _bilinear(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x.float(), (height, width), mode="bilinear", align_corners=True)


def few_rows(a: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, addend: Tensor | None, gelu: bool) -> Tensor:
    """a [rows,K] FP32 x (weight [N,K] * scale [N])^T + bias, then exact GELU, then + addend; FP32."""
    value = F.linear(a, weight.float() * scale[:, None], bias)
    value = F.gelu(value) if gelu else value
    return value if addend is None else value + addend


def few_tokens_attention(qkv: Tensor, heads: int) -> Tensor:
    """qkv [rows, 3C] FP32, queries scaled, one sequence -> [rows, C]."""
    q, k, v = (part.reshape(1, qkv.shape[0], heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(qkv.shape[0], -1)
