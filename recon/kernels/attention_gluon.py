# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Attention at head width 64 for Hopper with specialised warps, in Gluon (Triton's explicit dialect).

One warp feeds queries, keys and values through the copy engine; each consumer warpgroup owns a tile of queries
(`attention_inner_gluon`). A program stays on its multiprocessor and does tile after tile, so that the next tile's
operands arrive while the last one is divided and written.

All rows of the forms `checked` and `anchored` are computed as if their type could hold them, and those whose sum of
weights shows that it cannot are marked, to be done again by a form with a running maximum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from recon.kernels.attention_inner_gluon import ONE_COARSE, _after_the_kernel_before, _feed, _gathered

GROUPS = gl.constexpr(3)
"""Consumer warpgroups of a program: two leave the tensor cores waiting."""


@gluon.jit
def _share(whole, rounds, rest):
    """How many tiles this program does: `whole` ones in turn, then two of the `rest` that are not full, which take half
    as long, where that gave one whole tile less, then the others in turn. rounds = whole // programs."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    ahead = whole - rounds * programs
    count = rounds + (1 if program < ahead else 0)
    if program >= ahead:
        place = program - ahead
        count += (1 if place < rest else 0) + (1 if programs - ahead + place < rest else 0)
    others = rest - 2 * (programs - ahead) - program
    if others > 0:
        count += gl.cdiv(others, programs)
    return count


@gluon.jit
def _tile(n, whole, rounds, each, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """The n-th tile of this program: first row, first column and sequence. Tiles of one head follow each other, for the
    cache; `each` of them are whole."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    ahead = whole - rounds * programs
    done = rounds + (1 if program < ahead else 0)
    if n < done:
        tile = program + n * programs
        place = tile // each
        row = (tile - place * each) * (ROWS * GROUPS)
    else:
        late = n - done + (2 if program < ahead else 0)
        spare = programs - ahead
        place = 2 * spare + (late - 2) * programs + program if late >= 2 else late * spare + program - ahead
        row = each * (ROWS * GROUPS)
    return row, place % HEADS * 64, place // HEADS


@gluon.jit
def _consume(
    index: gl.constexpr, q_smem, k_smem, v_smem, o_smem, q_full, q_free, k_full, k_free, v_full, v_free, o_desc, marks,
    tokens, whole, rounds, each, rest, out_scale, score_scale, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, FORM: gl.constexpr, SCALED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    steps = gl.cdiv(tokens, BLOCK_N)
    for n in range(_share(whole, rounds, rest)):
        row, column, sequence = _tile(n, whole, rounds, each, ROWS, HEADS)
        mbarrier.wait(q_full.index(n & 1), (n >> 1) & 1)
        if row + index * ROWS < tokens:
            _attend(
                q_smem.index((n & 1) * GROUPS + index).reshape([ROWS, 64]), k_smem, v_smem, o_smem.index(index),
                k_full, k_free, v_full, v_free, o_desc, marks, tokens, row + index * ROWS, column, sequence, out_scale,
                score_scale, n * steps, steps, ROWS, BLOCK_N, STAGES, FORM, SCALED, HEADS,
            )  # fmt: skip
        else:  # nothing to do for this group: it only hands the buffers back
            for turn in range(n * steps, (n + 1) * steps):
                slot = turn % STAGES
                mbarrier.wait(k_full.index(slot), (turn // STAGES) & 1)
                mbarrier.arrive(k_free.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), (turn // STAGES) & 1)
                mbarrier.arrive(v_free.index(slot), count=1)
        mbarrier.arrive(q_free.index(n & 1), count=1)
    tma.store_wait(0)


@gluon.jit
def _attend(
    q, k_smem, v_smem, o_smem, k_full, k_free, v_full, v_free, o_desc, marks, tokens, row, column, sequence, out_scale,
    score_scale, before, steps, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FORM: gl.constexpr,
    SCALED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """One warpgroup's tile of queries."""
    COARSE: gl.constexpr = FORM == "bounded" and k_smem.dtype.primitive_bitwidth == 8
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    acc, sums, _ = _gathered(
        q, k_smem, v_smem, k_full, k_free, v_full, v_free, steps, tokens, score_scale, before, 0, 1, ROWS, BLOCK_N,
        STAGES, FORM, SCALED, COARSE,
    )  # fmt: skip
    total = gl.convert_layout(sums if FORM == "running" else gl.sum(sums, 1), gl.SliceLayout(1, out_layout))
    if FORM == "bounded":  # keys past the end are zeros, which weigh exactly 1
        past = steps * BLOCK_N - tokens
        total -= past - (past + 1) // 2 * (1 - ONE_COARSE if COARSE else 0.0)
    if FORM == "checked" or FORM == "anchored":
        place = row + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
        # Checked: 2^-64 to 2^64. Anchored: no weight exceeds their sum, and FP16 ends here. False for NaN.
        held = (total > 5.42e-20) & (total < 1.85e19) if FORM == "checked" else total < 65504.0
        gl.store(marks + (sequence * HEADS + column // 64) * tokens + place, (~held).to(gl.uint8), place < tokens)
    acc = acc * gl.expand_dims(out_scale / total, 1)
    tma.store_wait(0)  # the tile before has left
    o_smem.reshape([ROWS, 64]).store(acc.to(o_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [sequence, row, column], o_smem)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free, tokens, whole,
    rounds, each, rest, q_column, k_column, v_column, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    steps = gl.cdiv(tokens, BLOCK_N)
    for n in range(_share(whole, rounds, rest)):
        row, column, sequence = _tile(n, whole, rounds, each, ROWS, HEADS)
        mbarrier.wait(q_free.index(n & 1), ((n >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(n & 1), GROUPS * q_desc.block_type.nbytes)
        for index in gl.static_range(GROUPS):
            tma.async_copy_global_to_shared(
                q_desc, [sequence, row + index * ROWS, q_column + column], q_full.index(n & 1),
                q_smem.index((n & 1) * GROUPS + index),
            )  # fmt: skip
        _feed(
            k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, steps, n * steps, k_column + column,
            v_column + column, sequence, BLOCK_N, STAGES,
        )  # fmt: skip


@gluon.jit
def specialised_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, marks, tokens, whole, rounds, each, rest, q_column, k_column, v_column, out_scale,
    score_scale, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    FORM: gl.constexpr, SCALED: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Tiles of GROUPS * ROWS queries of one head and one sequence: `each` whole ones a head and sequence, `whole` in
    all, and `rest` that are not full; rounds = whole // programs. num_warps is 4.

    FORM as the module says. `checked` (BF16) and `anchored` fill marks [sequences, HEADS, tokens] uint8: 1 where a row
    has to be done again.
    """
    tokens = _after_the_kernel_before(tokens)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS, 1, ROWS, 64], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 64], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [GROUPS, 1, ROWS, 64], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                0, q_smem, k_smem, v_smem, o_smem, q_full, q_free, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, whole, rounds, each, rest, out_scale, score_scale, ROWS, BLOCK_N, STAGES, FORM, SCALED, HEADS,
            )),
            (_consume, (
                1, q_smem, k_smem, v_smem, o_smem, q_full, q_free, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, whole, rounds, each, rest, out_scale, score_scale, ROWS, BLOCK_N, STAGES, FORM, SCALED, HEADS,
            )),
            (_consume, (
                2, q_smem, k_smem, v_smem, o_smem, q_full, q_free, k_full, k_free, v_full, v_free, o_desc, marks,
                tokens, whole, rounds, each, rest, out_scale, score_scale, ROWS, BLOCK_N, STAGES, FORM, SCALED, HEADS,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_free, k_full, k_free, v_full, v_free,
                tokens, whole, rounds, each, rest, q_column, k_column, v_column, ROWS, BLOCK_N, STAGES, HEADS,
            )),
        ],
        [4, 4, 1], [REGISTERS, REGISTERS, 24],
    )
    # fmt: on
