# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Attention at head width 64 for Hopper with specialised warps, in Gluon (Triton's explicit dialect).

One warp feeds keys and values through the copy engine; each consumer warpgroup owns a tile of queries and overlaps the
scores of the next keys with the product of the current weights and values, as FlashAttention-3 does (Shah et al. 2024).
Unlike it, nothing is rescaled: see `attention_triton` for why a bound on the scores makes the running maximum needless.
Where there is none (CHECKED), BF16 weights still hold any score between -64 and 64: all rows are computed as if there
were one, and those whose sum of weights lies outside 2^-64 to 2^64 are marked for the form with a running maximum.
Queries and keys may be E4M3 beside 16-bit values: both operands of the scores lie in shared memory, so those products
are as asynchronous as before and take half the time; weights times values stay 16 bit. The special-function units would
then be the limit, so every second weight is read off the score's own digits (`_exp2_coarse`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

GROUPS = gl.constexpr(3)
"""Consumer warpgroups of a program: two leave the tensor cores waiting."""
ONE_COARSE = gl.constexpr(0.97265625)
"""What `_exp2_coarse` makes of 0, in the odd columns."""


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


@gluon.jit
def _weights(s, top, score_scale, BOUNDED: gl.constexpr, SCALED: gl.constexpr, COARSE: gl.constexpr):
    """Scores to weights, what sums before have to be multiplied by, the new maximum, and the weights' sums.

    Bounded: sums over what one thread holds of each row; there is no maximum, and the factor is not used.
    """
    if BOUNDED:
        p = _exp2_coarse(s) if COARSE else _exp2(s * score_scale if SCALED else s)
        quads = p.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
        return p, top, top, gl.sum(gl.sum(quads, 3), 1)
    else:
        if SCALED:  # the factor is positive, so it may follow the maximum
            high = gl.maximum(top, gl.max(s, 1) * score_scale)
            p = _exp2(s * score_scale - gl.expand_dims(high, 1))
        else:
            high = gl.maximum(top, gl.max(s, 1))
            p = _exp2(s - gl.expand_dims(high, 1))
        return p, _exp2(top - high), high, gl.sum(p, 1)


@gluon.jit
def _masked(s, start, tokens, EXACT: gl.constexpr, layout: gl.constexpr):
    """Keys past the end must not count; with a bound (EXACT) they weigh exactly 1 and are subtracted later."""
    if not EXACT:  # noqa: SIM102 - decided when compiled, the inner one when run
        if start + s.shape[1] > tokens:
            column = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
            s = gl.where(gl.expand_dims(column < tokens, 0), s, -float("inf"))
    return s


@gluon.jit
def _consume(
    index: gl.constexpr, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks, tokens,
    row, column, sequence, out_scale, score_scale, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BOUNDED: gl.constexpr, SCALED: gl.constexpr, CHECKED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    if row + index * ROWS < tokens:
        _attend(
            index, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks, tokens, row,
            column, sequence, out_scale, score_scale, ROWS, BLOCK_N, STAGES, BOUNDED, SCALED, CHECKED, HEADS,
        )  # fmt: skip
    else:  # nothing to do for this group: it only hands the buffers back
        for j in range(gl.cdiv(tokens, BLOCK_N)):
            slot = j % STAGES
            mbarrier.wait(k_full.index(slot), (j // STAGES) & 1)
            mbarrier.arrive(k_free.index(slot), count=1)
            mbarrier.wait(v_full.index(slot), (j // STAGES) & 1)
            mbarrier.arrive(v_free.index(slot), count=1)


@gluon.jit
def _attend(
    index: gl.constexpr, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks, tokens,
    row, column, sequence, out_scale, score_scale, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BOUNDED: gl.constexpr, SCALED: gl.constexpr, CHECKED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    EXACT: gl.constexpr = BOUNDED and not CHECKED
    COARSE: gl.constexpr = EXACT and k_smem.dtype.primitive_bitwidth == 8
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    steps = gl.cdiv(tokens, BLOCK_N)
    mbarrier.wait(q_full, 0)
    acc, sums, _ = _gathered(
        q_smem.index(index).reshape([ROWS, 64]), k_smem, v_smem, k_full, k_free, v_full, v_free, steps, tokens,
        score_scale, 0, 1, ROWS, BLOCK_N, STAGES, BOUNDED, SCALED, EXACT, COARSE,
    )  # fmt: skip

    total = gl.convert_layout(gl.sum(sums, 1) if BOUNDED else sums, gl.SliceLayout(1, out_layout))
    if EXACT:
        past = steps * BLOCK_N - tokens
        total -= past - (past + 1) // 2 * (1 - ONE_COARSE if COARSE else 0.0)
    if CHECKED:
        place = row + index * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
        held = (total > 5.42e-20) & (total < 1.85e19)  # 2^-64, 2^64; false for NaN
        gl.store(marks + (sequence * HEADS + column // 64) * tokens + place, (~held).to(gl.uint8), place < tokens)
    acc = acc * gl.expand_dims(out_scale / total, 1)
    tile = o_smem.index(index)
    tile.reshape([ROWS, 64]).store(acc.to(o_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [sequence, row + index * ROWS, column], tile)
    tma.store_wait(0)


@gluon.jit
def _gathered(
    q, k_smem, v_smem, k_full, k_free, v_full, v_free, steps, tokens, score_scale, FIRST: gl.constexpr,
    EVERY: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BOUNDED: gl.constexpr,
    SCALED: gl.constexpr, EXACT: gl.constexpr, COARSE: gl.constexpr,
):  # fmt: skip
    """Over `steps` blocks of keys, every EVERY-th from FIRST on: weighted values, sums and maximum (see `_weights`)."""
    dtype: gl.constexpr = v_smem.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_N, 256 // k_smem.dtype.primitive_bitwidth]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    empty = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, score_layout))

    if BLOCK_N == 64:  # a smaller product waits for its operands in shared memory; with 128 keys the registers run out
        q = q.load(gl.DotOperandLayout(0, score_layout, 32 // k_smem.dtype.primitive_bitwidth))
    mbarrier.wait(k_full.index(FIRST), 0)
    k = k_smem.index(FIRST).reshape([BLOCK_N, 64]).permute([1, 0])
    s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(FIRST), count=1)
    s = _masked(s, FIRST * BLOCK_N, tokens, EXACT, score_layout)
    weights, fade, top, sums = _weights(s, top, score_scale, BOUNDED, SCALED, COARSE)
    p = gl.convert_layout(weights.to(dtype), p_layout)
    acc = gl.zeros([ROWS, 64], gl.float32, out_layout)
    for i in range(1, steps):
        j = FIRST + i * EVERY
        slot = j % STAGES
        mbarrier.wait(k_full.index(slot), (j // STAGES) & 1)
        k = k_smem.index(slot).reshape([BLOCK_N, 64]).permute([1, 0])
        s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
        last = (j - EVERY) % STAGES
        mbarrier.wait(v_full.index(last), ((j - EVERY) // STAGES) & 1)
        product = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, 64]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_free.index(slot), count=1)
        s = _masked(s, j * BLOCK_N, tokens, EXACT, score_layout)
        weights, fade, top, more = _weights(s, top, score_scale, BOUNDED, SCALED, COARSE)
        # The product reads its weights from registers: they have to stay until it is done.
        acc, p = warpgroup_mma_wait(0, deps=[product, p])
        mbarrier.arrive(v_free.index(last), count=1)
        if BOUNDED:
            sums += more
        else:
            sums = sums * fade + more
            acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, out_layout)), 1)
        p = gl.convert_layout(weights.to(dtype), p_layout)
    j = FIRST + (steps - 1) * EVERY
    mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)
    product = warpgroup_mma(p, v_smem.index(j % STAGES).reshape([BLOCK_N, 64]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[product, p])
    return acc, sums, top


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, row, q_column,
    k_column, v_column, sequence, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full, GROUPS * q_desc.block_type.nbytes)
    for index in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [sequence, row + index * ROWS, q_column], q_full, q_smem.index(index))
    for j in range(gl.cdiv(tokens, BLOCK_N)):
        slot = j % STAGES
        phase = ((j // STAGES) & 1) ^ 1
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
def specialised_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, marks, tokens, q_column, k_column, v_column, out_scale, score_scale,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    BOUNDED: gl.constexpr, SCALED: gl.constexpr, CHECKED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """A tile of GROUPS * ROWS queries of one head and one sequence; num_warps is 4.

    CHECKED goes with BOUNDED, BF16 values and marks [sequences, HEADS, tokens] uint8: 1 where a row has to be done
    again.

    Programs of one head follow each other, for the cache; tiles that are not full come last of all, where they fill the
    multiprocessors that the last whole wave leaves idle.
    """
    tokens = _after_the_kernel_before(tokens)
    full = tokens // (ROWS * GROUPS)
    whole = full * HEADS * gl.num_programs(1)
    tile = gl.program_id(0) + gl.program_id(1) * gl.num_programs(0)
    place = tile // full if tile < whole else tile - whole
    row = (tile % full if tile < whole else full) * (ROWS * GROUPS)
    column = place % HEADS * 64
    sequence = place // HEADS
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 1, ROWS, 64], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 64], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [GROUPS, 1, ROWS, 64], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, row, column, sequence, out_scale, score_scale, ROWS, BLOCK_N, STAGES, BOUNDED, SCALED,
                CHECKED, HEADS,
            )),
            (_consume, (
                1, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, row, column, sequence, out_scale, score_scale, ROWS, BLOCK_N, STAGES, BOUNDED, SCALED,
                CHECKED, HEADS,
            )),
            (_consume, (
                2, q_smem, k_smem, v_smem, o_smem, q_full, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, row, column, sequence, out_scale, score_scale, ROWS, BLOCK_N, STAGES, BOUNDED, SCALED,
                CHECKED, HEADS,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, row,
                q_column + column, k_column + column, v_column + column, sequence, ROWS, BLOCK_N, STAGES, GROUPS,
            )),
        ],
        [4, 4, 1], [REGISTERS, REGISTERS, 24],
    )
    # fmt: on
