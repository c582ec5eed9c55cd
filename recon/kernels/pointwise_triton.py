# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Row-wise kernels between matrix products: LayerNorm, query-key norm with rotation, GELU; each casts or quantises.

All arithmetic is FP32; the one rounding is the cast to the output's type, `value * scale` saturated at E4M3's 448. Only
GELU that goes into E4M3 right after a product is computed in FP16.

Every kernel here may be launched while the one before still runs, and begins by waiting for its results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _low(x, dtype: tl.constexpr):
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(dtype)


@triton.jit
def gelu(x):
    """x * Phi(x), Phi as (1 + tanh(odd quintic)) / 2 fitted to the normal distribution: off by at most 2.6e-5, where
    the customary cubic is off by 4.7e-4; one special-function instruction instead of the twenty of erf."""
    square = tl.minimum(x * x, 25.0)
    inner = x * (0.79750446 + square * (0.037008477 + square * -0.00035159214))
    wave = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1)
    half = 0.5 * x
    return half * wave + half


GELU_PAIR = tl.constexpr("""{
    .reg .b32 x, square, inner, wave, scale, top, a, b, c;
    mov.b32 top, 0x4e404e40;
    mov.b32 a, 0x3a613a61; mov.b32 b, 0x28bd28bd; mov.b32 c, 0x8dc38dc3;
    cvt.rn.f16x2.f32 scale, $3, $3; cvt.rn.satfinite.f16x2.f32 x, $2, $1;
    mul.f16x2 square, x, x; min.f16x2 square, square, top;
    fma.rn.f16x2 inner, square, c, b; fma.rn.f16x2 inner, inner, square, a; mul.f16x2 inner, inner, x;
    tanh.approx.f16x2 wave, inner; fma.rn.f16x2 x, x, wave, x; mul.f16x2 $0, x, scale;
}""")
"""`gelu` times a factor for two numbers at once in FP16; constants as there. The factor comes halved: an overflow of
twice x then saturates like x itself, and none becomes a NaN."""


@triton.jit
def gelu_to_e4m3(x, out_scale):
    """gelu(x) * out_scale in E4M3, saturated: in FP16, which has eight times its digits, at half the instructions."""
    found = tl.inline_asm_elementwise(
        GELU_PAIR, "=r,f,f,f,f", [x, out_scale * 0.5], dtype=tl.float16, is_pure=True, pack=2
    )
    return found.to(tl.float8e4nv)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, out_scale, eps, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """One row of x [rows, WIDTH], FP32 or 16 bit -> out [rows, WIDTH], multiplied by out_scale and cast."""
    gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    value = tl.load(x + row * stride + column, inside, 0.0).to(tl.float32)
    value = _normed(value, weight, bias, out_scale, eps, column, inside, WIDTH)
    tl.store(out + row * WIDTH + column, _low(value, out.dtype.element_ty), inside)


@triton.jit
def add_layer_norm_kernel(
    x, first, second, gain1, gain2, weight, bias, out, out_scale, eps, rows, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, GAIN1: tl.constexpr, GAIN2: tl.constexpr, TWO: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out = LayerNorm(x + first (GAIN1: * gain1) + (TWO) second (GAIN2: * gain2)) * out_scale for ROWS rows of
    [rows, WIDTH]; STORE: x, FP32, becomes the sum.

    What does not depend on the row stays in registers, and each row is loaded while the one before is computed.
    """
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    factor = tl.load(weight + column, inside, 0.0) * out_scale
    offset = tl.load(bias + column, inside, 0.0) * out_scale
    g1 = tl.load(gain1 + column, inside, 0.0) if GAIN1 else factor
    g2 = tl.load(gain2 + column, inside, 0.0) if GAIN2 and TWO else factor
    gdc_wait()
    row = tl.program_id(0) * ROWS
    end = tl.minimum(row + ROWS, rows)
    a, b, c = _summands(x, first, second, row.to(tl.int64) * WIDTH + column, inside, TWO)
    for r in range(row, end):
        place = r.to(tl.int64) * WIDTH + column
        value, step, more = a, b, c
        a, b, c = _summands(x, first, second, place + WIDTH, inside & (r + 1 < end), TWO)
        value += step.to(tl.float32) * g1 if GAIN1 else step.to(tl.float32)
        if TWO:
            value += more.to(tl.float32) * g2 if GAIN2 else more.to(tl.float32)
        if STORE:
            tl.store(x + place, value, inside)
        value = _centred(value, eps, inside, WIDTH) * factor + offset
        tl.store(out + place, _low(value, out.dtype.element_ty), inside)


@triton.jit
def _summands(x, first, second, place, inside, TWO: tl.constexpr):
    """One row of the stream and of each change (the first again where there is one)."""
    b = tl.load(first + place, inside, 0.0)
    return tl.load(x + place, inside, 0.0), b, tl.load(second + place, inside, 0.0) if TWO else b


@triton.jit
def _centred(value, eps, inside, WIDTH: tl.constexpr):
    """One row without its mean, of variance 1."""
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(inside, value - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)


@triton.jit
def _normed(value, weight, bias, scale, eps, column, inside, WIDTH: tl.constexpr):
    """LayerNorm of one row, times scale."""
    factor = tl.load(weight + column, inside, 0.0) * scale
    return _centred(value, eps, inside, WIDTH) * factor + tl.load(bias + column, inside, 0.0) * scale


@triton.jit
def qk_norm_rotate_kernel(
    qkv, weights, biases, cos, sin, out, rows, tokens, q_scale, k_scale, eps, HEADS: tl.constexpr, ROWS: tl.constexpr
):
    """Queries (program axis 1 = 0) and keys (1) of ROWS tokens: LayerNorm over each head's 64 channels, then rotation.

    qkv [rows, 3 * HEADS * 64]; weights, biases [2, 64] FP32; cos, sin [tokens, 32] FP32; out [rows, 2 * HEADS * 64].
    Queries are multiplied by q_scale, keys by k_scale.
    """
    gdc_wait()
    pair = tl.program_id(0) * (ROWS * HEADS) + tl.arange(0, triton.next_power_of_2(ROWS * HEADS))
    part = tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    inside = ((row < rows) & (pair < (tl.program_id(0) + 1) * (ROWS * HEADS)))[:, None]
    channel = tl.arange(0, 32)[None, :]
    source = qkv + (row * (3 * HEADS * 64) + part * (HEADS * 64) + head * 64)[:, None] + channel
    a = tl.load(source, inside, 0.0).to(tl.float32)
    b = tl.load(source + 32, inside, 0.0).to(tl.float32)
    mean = (tl.sum(a, 1) + tl.sum(b, 1))[:, None] / 64
    a, b = a - mean, b - mean
    inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / 64 + eps)
    a = a * inverse * tl.load(weights + part * 64 + channel) + tl.load(biases + part * 64 + channel)
    b = b * inverse * tl.load(weights + part * 64 + 32 + channel) + tl.load(biases + part * 64 + 32 + channel)
    scale = tl.where(part == 0, q_scale, k_scale)
    angle = (row % tokens)[:, None] * 32 + channel
    c, s = tl.load(cos + angle) * scale, tl.load(sin + angle) * scale
    target = out + (row * (2 * HEADS * 64) + part * (HEADS * 64) + head * 64)[:, None] + channel
    tl.store(target, _low(a * c - b * s, out.dtype.element_ty), inside)
    tl.store(target + 32, _low(b * c + a * s, out.dtype.element_ty), inside)


@triton.jit
def gelu_kernel(x, out, count, out_scale, BLOCK: tl.constexpr):
    """out = gelu(x) * out_scale, cast. Flat."""
    gdc_wait()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = gelu(tl.load(x + place, place < count, 0.0).to(tl.float32))
    tl.store(out + place, _low(value * out_scale, out.dtype.element_ty), place < count)


@triton.jit
def joined_layer_norm_kernel(
    left, right, weight, bias, out, rows, tokens, skipped, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """out [sequences * (tokens - skipped), 2 * WIDTH] = LayerNorm over left and right side by side, without the first
    `skipped` tokens of each sequence. left, right [sequences * tokens, WIDTH] FP32."""
    gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    kept = tokens - skipped
    source = (row // kept) * tokens + skipped + row % kept
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    a = tl.load(left + source * WIDTH + column, inside, 0.0)
    b = tl.load(right + source * WIDTH + column, inside, 0.0)
    mean = (tl.sum(a, 0) + tl.sum(b, 0)) / (2 * WIDTH)
    a, b = tl.where(inside, a - mean, 0.0), tl.where(inside, b - mean, 0.0)
    inverse = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * WIDTH) + eps)
    a = a * inverse * tl.load(weight + column, inside) + tl.load(bias + column, inside)
    b = b * inverse * tl.load(weight + WIDTH + column, inside) + tl.load(bias + WIDTH + column, inside)
    target = out + row * (2 * WIDTH) + column
    tl.store(target, _low(a, out.dtype.element_ty), inside)
    tl.store(target + WIDTH, _low(b, out.dtype.element_ty), inside)
