# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Few rows, FP32: products bound by reading the weight, and attention over a handful of tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def few_rows_kernel(
    a, weight, scale, bias, addend, out, N, K: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """a [ROWS,K] x (weight [N,K] * scale [N])^T + bias (GELU; + addend [ROWS,N]) -> out [ROWS,N]; FP32 multiply-adds.

    Two TF32 products on the tensor cores instead, though exact on paper, were slower and 70 times less accurate.
    """
    gdc_wait()
    row = tl.arange(0, PADDED)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([PADDED, BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=4):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + column[:, None].to(tl.int64) * K + k[None, :], eviction_policy="evict_first")
        x = tl.load(a + row[:, None] * K + k[None, :], (row < ROWS)[:, None], 0.0)
        acc += x[:, None, :] * w.to(tl.float32)[None, :, :]
    value = tl.sum(acc, 2) * tl.load(scale + column)[None, :] + tl.load(bias + column)[None, :]
    if GELU:
        value = 0.5 * value * (1 + tl.erf(value * 0.70710678118654752))
    inside = (row < ROWS)[:, None]
    place = row[:, None] * N + column[None, :]
    if ADD:
        value += tl.load(addend + place, inside, 0.0)
    tl.store(out + place, value, inside)


@triton.jit
def split_rows_kernel(
    a, weight, scale, bias, addend, out, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `few_rows_kernel` for up to 8 rows, on the tensor cores in one FP16 product with FP32 sums.

    Rows 0 to 7 of its left operand are a / 64 rounded to FP16, rows 8 to 15 what that leaves, times 2^11: together 22
    bits of a, up to 4 million, and the weight goes from memory to the tensor core unconverted.
    """
    gdc_wait()
    row = tl.arange(0, 16)
    real, rest = row % 8, (row >= 8)[:, None]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight + column[:, None].to(tl.int64) * K + k[None, :], eviction_policy="evict_first")
        x = tl.load(a + real[:, None] * K + k[None, :], (real < ROWS)[:, None], 0.0) * 0.015625
        high = x.to(tl.float16)
        low = ((x - high.to(tl.float32)) * 2048).to(tl.float16)
        acc = tl.dot(tl.where(rest, low, high), w.T, acc)
    part = tl.arange(0, 2)[:, None, None]
    value = tl.sum(acc.reshape(2, 8, BLOCK_N) * tl.where(part == 0, 64.0, 0.03125), 0)
    value = value * tl.load(scale + column)[None, :] + tl.load(bias + column)[None, :]
    if GELU:
        value = 0.5 * value * (1 + tl.erf(value * 0.70710678118654752))
    line = tl.arange(0, 8)[:, None]
    place = line * N + column[None, :]
    if ADD:
        value += tl.load(addend + place, line < ROWS, 0.0)
    tl.store(out + place, value, line < ROWS)


@triton.jit
def few_tokens_attention_kernel(
    qkv, out, ROWS: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """One head of attention over ROWS tokens. qkv [ROWS, 3*HEADS*WIDTH], queries scaled; out [ROWS, HEADS*WIDTH]."""
    gdc_wait()
    row, channel = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    place = row[:, None] * (3 * HEADS * WIDTH) + tl.program_id(0) * WIDTH + channel[None, :]
    inside = (row < ROWS)[:, None]
    q = tl.load(qkv + place, inside, 0.0)
    k = tl.load(qkv + HEADS * WIDTH + place, inside, 0.0)
    v = tl.load(qkv + 2 * HEADS * WIDTH + place, inside, 0.0)
    s = tl.sum(q[:, None, :] * k[None, :, :], 2)
    s = tl.where((row < ROWS)[None, :], s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    value = tl.sum(p[:, :, None] * v[None, :, :], 1)
    target = row[:, None] * (HEADS * WIDTH) + tl.program_id(0) * WIDTH + channel[None, :]
    tl.store(out + target, value, inside)
