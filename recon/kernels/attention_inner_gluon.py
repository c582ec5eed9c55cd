# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""What a warpgroup does with one tile of queries, at head width 64 on Hopper, in Gluon (Triton's explicit dialect).

It overlaps the scores of the next keys with the product of the current weights and values, as FlashAttention-3 does
(Shah et al. 2024). What weights are relative to is the FORM; `running` is FlashAttention's, the others need no
rescaling:

bounded   to 1: the caller knows a bound on the scores, see `attention_triton`
checked   to 1: BF16 weights hold any score between -64 and 64 as a power of two
anchored  to 2^HEADROOM times the largest weight of each row's first block of keys: FP16 then holds scores that are 20
          above it, and a sum that is 2^-HEADROOM at least
running   to the largest score so far

Queries and keys may be E4M3 beside 16-bit values: both operands of the scores lie in shared memory, so those products
are as asynchronous as before and take half the time; weights times values stay 16 bit. The special-function units would
then be the limit, so every second weight is read off the score's own digits (`_exp2_coarse`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

HEADROOM = gl.constexpr(4.0)
"""As a power of two. More, and weights of ordinary keys would lose digits as subnormal FP16 numbers."""
ONE_COARSE = gl.constexpr(0.97265625)
"""What `_exp2_coarse` makes of 0, in the odd columns."""


@gluon.jit
def _gathered(
    q, k_smem, v_smem, k_full, k_free, v_full, v_free, steps, tokens, score_scale, before, FIRST: gl.constexpr,
    EVERY: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FORM: gl.constexpr,
    SCALED: gl.constexpr, COARSE: gl.constexpr,
):  # fmt: skip
    """Over `steps` blocks of keys, every EVERY-th from FIRST on: weighted values, sums of weights (see `_weights`), and
    what they are relative to. before: blocks that went through the buffers already."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // k_smem.dtype.primitive_bitwidth]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    empty = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    base = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, score_layout))

    if BLOCK_N == 64:  # a smaller product waits for its operands in shared memory; with 128 keys the registers run out
        q = q.load(gl.DotOperandLayout(0, score_layout, 32 // k_smem.dtype.primitive_bitwidth))
    turn = before + FIRST
    slot = turn % STAGES
    mbarrier.wait(k_full.index(slot), (turn // STAGES) & 1)
    k = k_smem.index(slot).reshape([BLOCK_N, 64]).permute([1, 0])
    s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(slot), count=1)
    if FORM != "bounded" and tokens < (FIRST + 1) * BLOCK_N:
        s = _masked(s, FIRST * BLOCK_N, tokens, score_layout)
    if FORM == "anchored" or FORM == "running":
        base = _block_base(s, score_scale, FORM, SCALED)
    weights, sums = _weights(s, base, score_scale, FORM, SCALED, COARSE)
    p = gl.convert_layout(weights.to(v_smem.dtype), p_layout)
    acc = gl.zeros([ROWS, 64], gl.float32, out_layout)
    whole = steps if FORM == "bounded" else steps - 1
    for i in range(1, whole):
        acc, sums, base, p = _step(
            i, q, p, acc, sums, base, k_smem, v_smem, k_full, k_free, v_full, v_free, tokens, score_scale, before,
            False, FIRST, EVERY, ROWS, BLOCK_N, STAGES, FORM, SCALED, COARSE,
        )  # fmt: skip
    if FORM != "bounded":  # noqa: SIM102 - decided when compiled, the inner one when run
        if steps > 1:
            acc, sums, base, p = _step(
                steps - 1, q, p, acc, sums, base, k_smem, v_smem, k_full, k_free, v_full, v_free, tokens, score_scale,
                before, True, FIRST, EVERY, ROWS, BLOCK_N, STAGES, FORM, SCALED, COARSE,
            )  # fmt: skip
    turn = before + FIRST + (steps - 1) * EVERY
    last = turn % STAGES
    mbarrier.wait(v_full.index(last), (turn // STAGES) & 1)
    product = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, 64]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[product, p])
    mbarrier.arrive(v_free.index(last), count=1)
    return acc, sums, base


@gluon.jit
def _step(
    i, q, p, acc, sums, base, k_smem, v_smem, k_full, k_free, v_full, v_free, tokens, score_scale, before,
    LAST: gl.constexpr, FIRST: gl.constexpr, EVERY: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FORM: gl.constexpr, SCALED: gl.constexpr, COARSE: gl.constexpr,
):  # fmt: skip
    """Scores and weights of the i-th block of keys, while the weights p of the one before meet their values."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // k_smem.dtype.primitive_bitwidth]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    empty = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    turn = before + FIRST + i * EVERY
    slot, last = turn % STAGES, (turn - EVERY) % STAGES
    mbarrier.wait(k_full.index(slot), (turn // STAGES) & 1)
    k = k_smem.index(slot).reshape([BLOCK_N, 64]).permute([1, 0])
    s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), ((turn - EVERY) // STAGES) & 1)
    product = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, 64]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(slot), count=1)
    if LAST:
        s = _masked(s, (FIRST + i * EVERY) * BLOCK_N, tokens, score_layout)
    if FORM == "running":
        lower = base
        base = gl.maximum(base, _block_base(s, score_scale, FORM, SCALED))
        fade = _exp2(lower - base)
    weights, more = _weights(s, base, score_scale, FORM, SCALED, COARSE)
    fresh = weights.to(v_smem.dtype)
    # The product reads its weights from registers: they have to stay until it is done. The new ones are named so that
    # they are computed before the wait.
    acc, p, fresh = warpgroup_mma_wait(0, deps=[product, p, fresh])
    mbarrier.arrive(v_free.index(last), count=1)
    if FORM == "running":
        sums = sums * fade
        acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, out_layout)), 1)
    sums += more
    return acc, sums, base, gl.convert_layout(fresh, p_layout)


@gluon.jit
def _feed(
    k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, steps, before, k_column, v_column, sequence,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All keys and values of one head and sequence through the buffers, as consumers hand them back."""
    for j in range(steps):
        slot = (before + j) % STAGES
        phase = (((before + j) // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [sequence, j * BLOCK_N, k_column], k_full.index(slot), k_smem.index(slot)
        )
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [sequence, j * BLOCK_N, v_column], v_full.index(slot), v_smem.index(slot)
        )


@gluon.jit
def _block_base(s, score_scale, FORM: gl.constexpr, SCALED: gl.constexpr):
    """What the weights of a block of keys alone would be relative to, as a power of two a row."""
    highest = gl.max(s, 1) * score_scale if SCALED else gl.max(s, 1)  # the factor is positive
    return highest + HEADROOM if FORM == "anchored" else highest


@gluon.jit
def _weights(s, base, score_scale, FORM: gl.constexpr, SCALED: gl.constexpr, COARSE: gl.constexpr):
    """Scores to weights, and their sums: of rows, or where none is rescaled over what one thread holds of each row."""
    if SCALED:
        s = s * score_scale
    if FORM == "anchored" or FORM == "running":
        s = s - gl.expand_dims(base, 1)
    p = _exp2_coarse(s) if COARSE else _exp2(s)
    if FORM == "running":
        return p, gl.sum(p, 1)
    else:
        return p, gl.sum(gl.sum(p.reshape([s.shape[0], s.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _masked(s, start, tokens, layout: gl.constexpr):
    """Scores of the block of keys from `start` on, in which those past the end do not count."""
    column = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
    return gl.where(gl.expand_dims(column < tokens, 0), s, -float("inf"))


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2_coarse(x):
    """2^x for -127 < x < 128, every second one by Schraudolph (1999): x + 127 in steps of 1/128 is the bit pattern of a
    BF16 number on the straight line between two powers of two; 7 steps less, it is 4.0 % below to 2.5 % above 2^x and
    0.2 % above on average. Scores of E4M3 factors are no more exact than that."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 steps; .reg .b32 bits;
        ex2.approx.ftz.f32 $0, $2;
        fma.rn.f32 steps, $3, 0f43000000, 0f4B403F79;
        mov.b32 bits, steps; shl.b32 bits, bits, 16; mov.b32 $1, bits; }""",
        "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _after_the_kernel_before(x):
    """The integer x, once the results of the kernel before can be read (it may be running still)."""
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )
