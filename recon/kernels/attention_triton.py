# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Attention at head width 64 for Hopper, in Triton: tensor copies by the copy engine, no masks in the inner loop.

Two forms. *Bounded*: where queries and keys are normalised (VGGT's trunk), Cauchy-Schwarz bounds every score, so the
softmax needs no running maximum and no rescaling of the accumulator (Dao et al. 2022 need both): weights are exp2 of
the score itself. Rows that the copy engine fills with zeros past the end of a sequence then weigh exactly 1, and are
subtracted from the sum. *Running*: the usual running maximum, for scores without a bound.

Queries come multiplied by log2(e) * softmax scale; in the running form scores may be multiplied by it instead (SCALED),
where the queries' weights are codes that must stay as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

HEAD = 64


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _raised(s, top, score_scale, SCALED: tl.constexpr):
    """Scores times their factor, and the new maximum; the factor is positive, so it may follow the maximum."""
    if SCALED:
        return s * score_scale, tl.maximum(top, tl.max(s, 1) * score_scale)
    else:
        return s, tl.maximum(top, tl.max(s, 1))


@triton.jit
def attention_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    marks,
    tokens,
    q_column,
    k_column,
    v_column,
    out_scale,
    score_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    MARKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of one head and one sequence. q, k, v are columns of [sequences, tokens, columns].

    MARKED: only tiles with a mark in marks [sequences, heads, tokens].
    """
    gdc_wait()
    row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    if MARKED:
        place = row + tl.arange(0, BLOCK_M)
        first = (sequence * tl.num_programs(1) + head) * tokens
        if tl.max(tl.load(marks + first + place, place < tokens, 0).to(tl.int32), 0) == 0:
            return
    column = head * 64
    q = q_desc.load([sequence, row, q_column + column]).reshape(BLOCK_M, 64)
    acc = tl.zeros([BLOCK_M, 64], tl.float32)
    if BOUNDED:
        parts = tl.zeros([BLOCK_M, 4], tl.float32)
        for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
            k = k_desc.load([sequence, start, k_column + column]).reshape(BLOCK_N, 64)
            s = tl.dot(q, k.T)
            p = _exp2(s)
            quads = p.reshape(BLOCK_M, BLOCK_N // 8, 4, 2)
            parts += tl.sum(tl.sum(quads, 3), 1)
            v = v_desc.load([sequence, start, v_column + column]).reshape(BLOCK_N, 64)
            acc = tl.dot(p.to(v.dtype), v, acc)
        padding = tl.cdiv(tokens, BLOCK_N) * BLOCK_N - tokens
        total = tl.sum(parts, 1) - padding
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        whole = tokens // BLOCK_N * BLOCK_N
        for start in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            k = k_desc.load([sequence, start, k_column + column]).reshape(BLOCK_N, 64)
            s = tl.dot(q, k.T)
            s, high = _raised(s, top, score_scale, SCALED)
            p = _exp2(s - high[:, None])
            fade = tl.exp2(top - high)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            v = v_desc.load([sequence, start, v_column + column]).reshape(BLOCK_N, 64)
            acc = tl.dot(p.to(v.dtype), v, acc)
            top = high
        if whole < tokens:
            k = k_desc.load([sequence, whole, k_column + column]).reshape(BLOCK_N, 64)
            s = tl.dot(q, k.T)
            inside = whole + tl.arange(0, BLOCK_N) < tokens
            s = tl.where(inside[None, :], s, -float("inf"))
            s, high = _raised(s, top, score_scale, SCALED)
            p = tl.exp2(s - high[:, None])
            fade = tl.exp2(top - high)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            v = v_desc.load([sequence, whole, v_column + column]).reshape(BLOCK_N, 64)
            acc = tl.dot(p.to(v.dtype), v, acc)
    acc = acc * (out_scale / total)[:, None]
    o_desc.store([sequence, row, column], acc.to(o_desc.dtype).reshape(1, BLOCK_M, 64))
