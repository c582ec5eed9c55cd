"""Transformer blocks for inference: 16-bit or E4M3 products around an FP32 residual stream.

A block is seven launches: product for queries, keys and values; their norm and rotation (where the network has them);
attention; projection; residual addition with the next LayerNorm; first product with GELU; second product; and again
addition with LayerNorm. Whatever quantises is part of one of these. FP32 stay: the residual stream, the statistics of
every norm, rotation, softmax and all accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels import ops, reference

LOG2_E = math.log2(math.e)
SCORE_LIMITS = {torch.bfloat16: 110.0, torch.float16: 14.0}
FUSED_ROWS = 4096  # from this many rows on, the 8-bit product with its GELU inside beats two launches


@dataclass(frozen=True)
class BlockWeights:
    """What a block computes, FP32: scales of layers folded, softmax scale folded into the queries (not log2 e).

    Pairs are weight and bias. qk_norm: weights [2, head width] and biases [2, head width] of queries and keys, in the
    channel order of one half-split rotation.
    """

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    heads: int
    eps: float
    qk_norm: tuple[Tensor, Tensor] | None = None
    qk_eps: float = 1e-5


class Product(nn.Module):
    """A product with a constant weight: 16 bit, and after `quantise` E4M3 with one scale for input and weight each."""

    weight: Tensor
    bias: Tensor
    bias_full: Tensor
    highest: Tensor
    input_scale: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = self.input_dtype = dtype
        self.scale = 1.0  # by which the producer of the input multiplies it
        self.factor = 1.0  # what an 8-bit product has to be multiplied by
        self.observing = False
        self.register_buffer("weight", weight.detach().to(dtype).contiguous(), persistent=False)
        self.register_buffer("bias", bias.detach().to(dtype), persistent=False)
        self.register_buffer("bias_full", bias.detach().float(), persistent=False)
        self.register_buffer("highest", torch.zeros((), device=weight.device), persistent=False)

    def forward(self, a: Tensor) -> Tensor:
        """a [rows, in] of `input_dtype` -> [rows, out]."""
        if self.observing:
            self.observe(a)
        if self.input_dtype == self.dtype:
            return torch.addmm(self.bias, a, self.weight.t())
        if not a.is_cuda:
            return (a.float() @ self.weight.float().t() * self.factor + self.bias_full).to(self.dtype)
        return torch._scaled_mm(
            a, self.weight.t(), self.input_scale, self.weight_scale, bias=self.bias, out_dtype=self.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    def gelu(self, a: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """GELU of the product, times scale, in dtype. 16 bit: by the library's epilogue, in GELU's tanh form."""
        if self.observing:
            self.observe(a)
        if self.input_dtype != self.dtype and a.shape[0] >= FUSED_ROWS:
            return ops.linear_gelu(a, self.weight, self.bias_full, self.factor, dtype, scale)
        if self.input_dtype == dtype == self.dtype and a.is_cuda:
            return torch._addmm_activation(self.bias, a, self.weight.t(), use_gelu=True)
        observing, self.observing = self.observing, False
        product = self(a)
        self.observing = observing
        return ops.gelu(product, dtype, scale)

    def observe(self, a: Tensor) -> None:
        """Note the largest magnitude that comes in."""
        torch.maximum(self.highest, a.abs().amax().float(), out=self.highest)

    def quantise(self) -> None:
        """Go to E4M3, by the largest input observed and the largest weight."""
        if not bool(self.highest > 0):
            raise ReconError("fp8 layer: no input was observed", "run `calibrate` on example inputs before `quantise`")
        top = float(self.highest)
        weight_top = float(self.weight.float().abs().amax().clamp(min=1e-12))
        self.scale, self.factor = reference.E4M3_MAX / top, top * weight_top / reference.E4M3_MAX**2
        low = reference.cast(self.weight, torch.float8_e4m3fn, reference.E4M3_MAX / weight_top)
        self.register_buffer("weight", low, persistent=False)
        for name, value in (("input_scale", top), ("weight_scale", weight_top)):
            tensor = torch.full((), value / reference.E4M3_MAX, device=low.device)
            self.register_buffer(name, tensor, persistent=False)
        self.input_dtype = torch.float8_e4m3fn


class Norm(nn.Module):
    """LayerNorm whose output goes into `target`, in its type and scale; FP32 without one."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, target: Product | None) -> None:
        super().__init__()
        self.eps = eps
        self.target = [target]  # in a list: not a child, which `Block.products` would find twice
        self.register_buffer("weight", weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", bias.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor:
        """x [rows, width] FP32, to which `change` is added in place first -> its norm."""
        target = self.target[0]
        dtype, scale = (target.input_dtype, target.scale) if target else (torch.float32, 1.0)
        if change is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps, dtype, scale)
        return ops.add_layer_norm(x, change, self.weight, self.bias, self.eps, dtype, scale)


class FastBlock(nn.Module):
    """One block; see the module."""

    qk_weights: Tensor
    qk_biases: Tensor

    def __init__(self, weights: BlockWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.eps = weights.heads, weights.qk_eps
        width = weights.proj[0].shape[0]
        qkv, bias = (part.detach().float() for part in weights.qkv)
        self.normed = weights.qk_norm is not None
        if weights.qk_norm is not None:
            self.register_buffer("qk_weights", weights.qk_norm[0].detach().float(), persistent=False)
            self.register_buffer("qk_biases", weights.qk_norm[1].detach().float(), persistent=False)
            self.bounded = score_bound(*weights.qk_norm) <= SCORE_LIMITS[dtype]
        else:
            factor = torch.ones(3 * width, device=qkv.device)
            factor[:width] = LOG2_E
            qkv, bias, self.bounded = qkv * factor[:, None], bias * factor, False
        self.qkv, self.proj = Product(qkv, bias, dtype), Product(*weights.proj, dtype)
        self.fc1, self.fc2 = Product(*weights.fc1, dtype), Product(*weights.fc2, dtype)
        self.norm1 = Norm(*weights.norm1, weights.eps, self.qkv)
        self.norm2 = Norm(*weights.norm2, weights.eps, self.fc1)

    def forward(
        self, x: Tensor, normed: Tensor, following: Norm, sequences: int, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [rows, width] FP32, changed in place; normed = norm1(x) -> following(x) after the block.

        The rows are `sequences` sequences of equal length, each attending within itself.
        """
        qkv = self.qkv(normed)
        rows, width = x.shape
        q, k, v = qkv.view(sequences, rows // sequences, 3 * width).chunk(3, -1)
        if self.normed:
            assert rotation is not None
            turned = ops.qk_norm_rotate(qkv, self.qk_weights, self.qk_biases, *rotation, self.heads, self.eps, LOG2_E)
            q, k = turned.view(sequences, -1, 2 * width).chunk(2, -1)
        proj, fc2 = self.proj, self.fc2
        mixed = ops.attention(q, k, v, self.heads, proj.input_dtype, bounded=self.bounded, scale=proj.scale)
        normed = self.norm2(x, proj(mixed.view(rows, width)))
        return following(x, fc2(self.fc1.gelu(normed, fc2.input_dtype, fc2.scale)))  # type: ignore[no-any-return]

    def products(self) -> tuple[Product, ...]:
        """The four products in the order of computation."""
        return self.qkv, self.proj, self.fc1, self.fc2


def observe(blocks: Iterable[FastBlock], on: bool) -> None:
    """Switch the noting of input ranges on or off."""
    for block in blocks:
        for product in block.products():
            product.observing = on


def score_bound(weights: Tensor, biases: Tensor) -> float:
    """Largest score, as a power of two, that normalised queries and keys can have: Cauchy-Schwarz, no data needed.

    A normalised head of n channels has length at most sqrt(n); rotation keeps it.
    """
    longest = weights.shape[1] ** 0.5 * weights.abs().amax(1) + biases.norm(dim=1)
    return float(longest.prod()) * LOG2_E


def patch_kernel(weight: Tensor) -> Tensor:
    """A patch convolution [C,3,side,side] as the FP16 operand of `embedded`: rows padded to whole 16 bytes, without
    which the product takes a slow path."""
    flat = weight.detach().flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % 8)).half()


def embedded(images: Tensor, kernel: Tensor, offset: Tensor, lead: Tensor, side: int) -> Tensor:
    """images [S,3,H,W] FP32 -> tokens [S, lead + P, C] FP32: patches through `kernel` plus offset [1,P,C], after lead.

    The patch convolution is a product in FP16, which keeps three bits of a pixel more than BF16.
    """
    frames, channels, height, width = images.shape
    rows, columns, values = height // side, width // side, channels * side**2
    flat = images.new_zeros(frames * rows * columns, kernel.shape[1], dtype=torch.float16)
    grid = images.reshape(frames, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    target = flat.as_strided(
        (frames, rows, columns, channels, side, side),
        (rows * columns * flat.shape[1], columns * flat.shape[1], flat.shape[1], side**2, side, 1),
    )
    assert values <= flat.shape[1]
    target.copy_(grid)
    x = images.new_empty(frames, lead.shape[1] + rows * columns, kernel.shape[0])
    x[:, : lead.shape[1]] = lead
    torch.add((flat @ kernel.t()).view(frames, rows * columns, -1), offset, out=x[:, lead.shape[1] :])
    return x
