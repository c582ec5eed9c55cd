"""Transformer blocks for inference: 16-bit or E4M3 products around an FP32 residual stream.

A block is seven launches: product for queries, keys and values; their norm and rotation (where the network has them);
attention; projection; LayerNorm of the residual stream plus that; first product with GELU; second product; and both
changes added to the stream with the next LayerNorm. Whatever quantises is part of one of these. FP32 stay: the residual
stream, the statistics of every norm, rotation, softmax and all accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels import ops, reference

LOG2_E = math.log2(math.e)
SCORE_LIMITS = {torch.bfloat16: 110.0, torch.float16: 14.0}
FUSED_ROWS = 4096  # from this many rows on, the 8-bit product with its GELU inside beats two launches


@dataclass(frozen=True)
class Low:
    """An E4M3 layer: weight = codes [out, in] * scale; inputs up to `reach` are held, larger ones saturate."""

    codes: Tensor
    scale: Tensor
    reach: float


@dataclass(frozen=True)
class BlockWeights:
    """What a block computes, FP32, pairs of weight and bias.

    qkv: one pair for queries, keys and values together, or one for each. qk_norm: weights [2, head width] and biases
    [2, head width] of queries and keys, in the channel order of one half-split rotation. score_scale: what scores have
    to be multiplied by, where it is not folded into the queries. gains: what the outputs of proj and fc2 have to be
    multiplied by, channel by channel, where that is not folded into them. low: products that are E4M3, by the names
    `FastBlock` gives them, and origins: which layers of the plain network they carry out.
    """

    norm1: tuple[Tensor, Tensor]
    qkv: Sequence[tuple[Tensor, Tensor]]
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    heads: int
    eps: float
    qk_norm: tuple[Tensor, Tensor] | None = None
    qk_eps: float = 1e-5
    score_scale: float = 1.0
    gains: tuple[Tensor | None, Tensor | None] = (None, None)
    low: Mapping[str, Low] = field(default_factory=dict)
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Product(nn.Module):
    """A product with a constant weight: 16 bit, or E4M3 with one scale for input and weight each.

    What the weight is stored in decides what is computed. origin: the layers of the plain network that it carries out.
    """

    weight: Tensor
    bias: Tensor
    bias_full: Tensor
    input_scale: Tensor
    weight_scale: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, dtype: torch.dtype, low: Low | None = None, origin: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.dtype = self.input_dtype = dtype
        self.scale = 1.0  # by which the producer of the input multiplies it
        self.factor = 1.0  # what an 8-bit product has to be multiplied by
        self.observing, self.origin = False, origin
        self.highest: Tensor | None = None
        self.register_buffer("weight", weight.detach().to(dtype).contiguous(), persistent=False)
        self.register_buffer("bias", bias.detach().to(dtype, copy=True), persistent=False)
        self.register_buffer("bias_full", bias.detach().float().clone(), persistent=False)
        if low is not None:
            self.store(low)

    def forward(self, a: Tensor) -> Tensor:
        """a [rows, in] of `input_dtype`, or of 16 bit where the producer feeds several formats -> [rows, out]."""
        if self.observing:
            self.observe(a)
        if self.input_dtype == self.dtype:
            return torch.addmm(self.bias, a, self.weight.t())
        if a.dtype != self.input_dtype:
            a = reference.cast(a, self.input_dtype, self.scale)
        return torch._scaled_mm(
            a, self.weight.t(), self.input_scale, self.weight_scale, bias=self.bias, out_dtype=self.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    def gelu(self, a: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """GELU of the product, times scale, in dtype. 16 bit: by the library's epilogue, in GELU's tanh form."""
        if self.observing:
            self.observe(a)
        if self.input_dtype != self.dtype and a.shape[0] >= FUSED_ROWS:
            return ops.linear_gelu(a, self.weight, self.bias_full, self.factor, dtype, scale)  # type: ignore[no-any-return]
        if self.input_dtype == dtype == self.dtype and a.is_cuda:
            return torch._addmm_activation(self.bias, a, self.weight.t(), use_gelu=True)
        observing, self.observing = self.observing, False
        product = self(a)
        self.observing = observing
        return ops.gelu(product, dtype, scale)

    def observe(self, a: Tensor) -> None:
        """Note the largest magnitude that comes in."""
        top = a.abs().amax().float()
        self.highest = top if self.highest is None else torch.maximum(self.highest, top)

    def quantise(self) -> None:
        """Go to E4M3, by the largest input observed and the largest weight."""
        if self.highest is None or not bool(self.highest > 0):
            raise ReconError("fp8 layer: no input was observed", "run `calibrate` on example inputs before `quantise`")
        scale = self.weight.float().abs().amax().clamp(min=1e-12) / reference.E4M3_MAX
        codes = reference.cast(self.weight, torch.float8_e4m3fn, 1 / float(scale))
        self.store(Low(codes, scale, float(self.highest)))

    def store(self, low: Low) -> None:
        """Go to E4M3 as `low` states it."""
        device = self.weight.device
        reach = torch.full((), low.reach / reference.E4M3_MAX, dtype=torch.float32, device=device)
        self.register_buffer("weight", low.codes.detach().to(device).contiguous(), persistent=False)
        self.register_buffer("input_scale", reach, persistent=False)
        self.register_buffer("weight_scale", low.scale.detach().float().to(device).clone(), persistent=False)
        self.settle()

    def settle(self) -> None:
        """Take from the tensors what is kept as plain numbers; after they have been replaced."""
        if self.weight.dtype != torch.float8_e4m3fn or self.weight.is_meta:
            return
        self.input_dtype = self.weight.dtype
        self.scale, self.factor = 1 / float(self.input_scale), float(self.input_scale) * float(self.weight_scale)


class Norm(nn.Module):
    """LayerNorm whose output goes into `targets`, in their type and scale; FP32 without any.

    Targets of several formats or scales get 16 bit, and quantise for themselves.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, targets: Sequence[Product] = ()) -> None:
        super().__init__()
        self.eps = eps
        self.targets = tuple(targets)  # in a tuple: not children, which `named_modules` would find twice
        self.register_buffer("weight", weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", bias.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor, *changes: reference.Change, store: bool = True) -> Tensor:
        """x [rows, width] FP32 plus changes, which `store` leaves in x -> its norm."""
        dtype, scale = self.output()
        if not changes:
            return ops.layer_norm(x, self.weight, self.bias, self.eps, dtype, scale)
        return ops.add_layer_norm(x, changes, self.weight, self.bias, self.eps, dtype, scale, store)

    def output(self) -> tuple[torch.dtype, float]:
        """Type and factor of what comes out."""
        if not self.targets:
            return torch.float32, 1.0
        wanted = {(target.input_dtype, target.scale) for target in self.targets}
        return wanted.pop() if len(wanted) == 1 else (self.targets[0].dtype, 1.0)


class FastBlock(nn.Module):
    """One block; see the module."""

    qk_weights: Tensor
    qk_biases: Tensor
    gain1: Tensor | None
    gain2: Tensor | None

    def __init__(self, weights: BlockWeights, dtype: torch.dtype, low_scores: bool = False) -> None:
        super().__init__()
        self.heads, self.eps, self.dtype = weights.heads, weights.qk_eps, dtype
        self.normed, self.bounded = weights.qk_norm is not None, False
        self.low_scores = low_scores and self.normed
        self.score_dtype, self.q_scale, self.k_scale = dtype, LOG2_E, 1.0
        pairs = [(weight.detach().float(), bias.detach().float()) for weight, bias in weights.qkv]
        self.score_scale = 1.0
        if weights.qk_norm is not None:
            self.register_buffer("qk_weights", weights.qk_norm[0].detach().float().clone(), persistent=False)
            self.register_buffer("qk_biases", weights.qk_norm[1].detach().float().clone(), persistent=False)
        elif weights.low.keys() & {"qkv", "q", "k", "v"}:  # codes are as they are: the kernel multiplies
            self.score_scale = weights.score_scale * LOG2_E
        else:
            pairs[0] = _scaled_queries(*pairs[0], weights.proj[0].shape[0], weights.score_scale * LOG2_E)

        def product(name: str, weight: Tensor, bias: Tensor) -> Product:
            return Product(weight, bias, dtype, weights.low.get(name), weights.origins.get(name, ()))

        self.parts = ("qkv",) if len(pairs) == 1 else ("q", "k", "v")
        for name, pair in zip(self.parts, pairs, strict=True):
            self.add_module(name, product(name, *pair))
        self.proj, self.fc1, self.fc2 = (product(name, *getattr(weights, name)) for name in ("proj", "fc1", "fc2"))
        for name, gain in zip(("gain1", "gain2"), weights.gains, strict=True):
            self.register_buffer(name, None if gain is None else gain.detach().float().clone(), persistent=False)
        self.norm1 = Norm(*weights.norm1, weights.eps, self.entries())
        self.norm2 = Norm(*weights.norm2, weights.eps, [self.fc1])
        self.settle()

    def forward(
        self, x: Tensor, normed: Tensor, following: Norm, sequences: int, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [rows, width] FP32, changed in place; normed = norm1(x) -> following(x) after the block.

        The rows are `sequences` sequences of equal length, each attending within itself.
        """
        rows, width = x.shape
        q, k, v = self._attended(normed, sequences, rotation)
        proj, fc2 = self.proj, self.fc2
        mixed = ops.attention(
            q, k, v, self.heads, proj.input_dtype, bounded=self.bounded, scale=proj.scale, score_scale=self.score_scale
        )
        del q, k, v  # a third of what a block holds while its MLP runs
        attended = proj(mixed.view(rows, width)), self.gain1
        normed = self.norm2(x, attended, store=False)  # written once a block, with both: a tenth fewer bytes
        grown = fc2(self.fc1.gelu(normed, fc2.input_dtype, fc2.scale)), self.gain2
        return following(x, attended, grown)  # type: ignore[no-any-return]

    def entries(self) -> tuple[Product, ...]:
        """The products that read the block's normed input."""
        return tuple(getattr(self, name) for name in self.parts)

    def products(self) -> tuple[Product, ...]:
        """All products in the order of computation."""
        return *self.entries(), self.proj, self.fc1, self.fc2

    def settle(self) -> None:
        """As `Product.settle`."""
        if not self.normed or self.qk_weights.is_meta:
            return
        self.bounded = score_bound(self.qk_weights, self.qk_biases) <= SCORE_LIMITS[self.dtype]
        if self.low_scores:
            self.score_dtype = torch.float8_e4m3fn
            self.q_scale, self.k_scale = balanced(self.qk_weights)

    def _attended(
        self, normed: Tensor, sequences: int, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [sequences, tokens, width]."""
        found = [product(normed) for product in self.entries()]
        if len(found) == 3:
            q, k, v = (part.view(sequences, -1, part.shape[1]) for part in found)
            return q, k, v
        q, k, v = found[0].view(sequences, -1, found[0].shape[1]).chunk(3, -1)
        if self.normed:
            assert rotation is not None
            turned = ops.qk_norm_rotate(
                found[0], self.qk_weights, self.qk_biases, *rotation, self.heads, self.eps, self.q_scale, self.k_scale,
                self.score_dtype,
            )  # fmt: skip
            q, k = turned.view(sequences, -1, turned.shape[1]).chunk(2, -1)
        return q, k, v


def balanced(weights: Tensor) -> tuple[float, float]:
    """Factors of queries and keys, whose product is log2 e, that make their largest norm weights equal.

    E4M3 has 15 binades of full precision; the softmax scale in the queries alone would waste three of them.
    """
    q, k = (float(top) for top in weights.abs().amax(1).clamp(min=1e-6))
    even = math.sqrt(k / (q * LOG2_E))
    return LOG2_E * even, 1 / even


def _scaled_queries(weight: Tensor, bias: Tensor, width: int, factor: float) -> tuple[Tensor, Tensor]:
    """The first `width` rows of a weight and its bias multiplied."""
    scale = torch.ones(weight.shape[0], device=weight.device)
    scale[:width] = factor
    return weight * scale[:, None], bias * scale


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
