# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Attention at head width 64 for so few queries that a multiprocessor has one tile of them, in Gluon.

Alone on its multiprocessor, a warpgroup waits for its own products and powers of two. Here two share the tile: one
takes the even blocks of keys, the other the odd ones, each with a running maximum of its own, and their sums are added
at the end (as FlashDecoding adds up what several programs found, Dao et al. 2023). One more warp feeds both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from recon.kernels.attention_inner_gluon import _after_the_kernel_before, _exp2, _feed, _gathered


@gluon.jit
def _half(
    index: gl.constexpr, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, score_scale,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Every second block of keys from block `index` on: weighted values, sums of weights, and their base."""
    rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    steps = gl.cdiv(gl.cdiv(tokens, BLOCK_N) - index, 2)
    mbarrier.wait(q_full, 0)
    acc, sums, top = _gathered(
        q_smem.index(0).reshape([ROWS, 64]), k_smem, v_smem, k_full, k_free, v_full, v_free, steps, tokens,
        score_scale, 0, index, 2, ROWS, BLOCK_N, STAGES, "running", SCALED, False,
    )  # fmt: skip
    return acc, gl.convert_layout(sums, rows), gl.convert_layout(top, rows)


@gluon.jit
def _help(
    q_smem, k_smem, v_smem, acc_smem, row_smem, q_full, k_full, k_free, v_full, v_free, done, tokens, score_scale,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Takes the odd blocks and leaves what it found in shared memory."""
    acc, sums, top = _half(
        1, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, score_scale, ROWS, BLOCK_N, STAGES,
        SCALED,
    )  # fmt: skip
    acc_smem.store(acc)
    row_smem.index(0).store(sums)
    row_smem.index(1).store(top)
    gl.thread_barrier()
    mbarrier.arrive(done, count=1)


@gluon.jit
def _lead(
    q_smem, k_smem, v_smem, acc_smem, row_smem, o_smem, q_full, k_full, k_free, v_full, v_free, done, o_desc, tokens,
    row, column, sequence, out_scale, score_scale, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """Takes the even blocks, adds both halves up relative to the larger maximum, and writes the tile."""
    acc, sums, top = _half(
        0, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, score_scale, ROWS, BLOCK_N, STAGES,
        SCALED,
    )  # fmt: skip
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    mbarrier.wait(done, 0)
    its_top = row_smem.index(1).load(rows)
    high = gl.maximum(top, its_top)
    mine, its = _exp2(top - high), _exp2(its_top - high)
    sums = sums * mine + row_smem.index(0).load(rows) * its
    acc = acc * gl.expand_dims(mine, 1) + acc_smem.load(out_layout) * gl.expand_dims(its, 1)
    acc = acc * gl.expand_dims(out_scale / sums, 1)
    o_smem.reshape([ROWS, 64]).store(acc.to(o_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [sequence, row, column], o_smem)
    tma.store_wait(0)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, row, q_column,
    k_column, v_column, sequence, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [sequence, row, q_column], q_full, q_smem.index(0))
    _feed(
        k_desc, v_desc, k_smem, v_smem, k_full, k_free, v_full, v_free, gl.cdiv(tokens, BLOCK_N), 0, k_column, v_column,
        sequence, BLOCK_N, STAGES,
    )  # fmt: skip


@gluon.jit
def split_attention_kernel(
    q_desc, k_desc, v_desc, o_desc, tokens, q_column, k_column, v_column, out_scale, score_scale, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """ROWS queries of one head and one sequence, 16 bit; more than BLOCK_N keys, num_warps 4, STAGES at least 2."""
    tokens = _after_the_kernel_before(tokens)
    row = gl.program_id(0) * ROWS
    column = gl.program_id(1) * 64
    sequence = gl.program_id(2)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [1, 1, ROWS, 64], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, 64], v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [1, ROWS, 64], o_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    mixed: gl.constexpr = gl.SwizzledSharedLayout(vec=2, per_phase=1, max_phase=8, order=[1, 0])
    acc_smem = gl.allocate_shared_memory(gl.float32, [ROWS, 64], mixed)
    row_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(done, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=1)
        mbarrier.init(v_free.index(i), count=1)
    # fmt: off
    gl.warp_specialize(
        [
            (_lead, (
                q_smem, k_smem, v_smem, acc_smem, row_smem, o_smem, q_full, k_full, k_free, v_full, v_free, done,
                o_desc, tokens, row, column, sequence, out_scale, score_scale, ROWS, BLOCK_N, STAGES, SCALED,
            )),
            (_help, (
                q_smem, k_smem, v_smem, acc_smem, row_smem, q_full, k_full, k_free, v_full, v_free, done, tokens,
                score_scale, ROWS, BLOCK_N, STAGES, SCALED,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free, tokens, row,
                q_column + column, k_column + column, v_column + column, sequence, BLOCK_N, STAGES,
            )),
        ],
        [4, 1], [REGISTERS, 24],
    )
    # fmt: on
