# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Matrix product with a constant weight, fused with what follows it: bias, GELU and the cast or quantisation.

16-bit or E4M3 operands by the copy engine and Hopper's warpgroup products, FP32 accumulation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recon.kernels.pointwise_triton import _low, gelu


@triton.jit
def linear_kernel(
    a_desc, w_desc, out_desc, bias, M, N, K, scale, out_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GELU: tl.constexpr,
    SPLIT: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a [M,K] x w [N,K]^T * scale + bias -> out [M,N].

    Stored times out_scale; with GELU, its GELU. PROGRAMS > 0: that many programs walk over all tiles. SPLIT: a tile is
    stored in two halves, which halves the shared memory of the store.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = down * across
    first = tl.program_id(0)
    for tile in tl.range(first, tiles, PROGRAMS if PROGRAMS else tiles, flatten=PROGRAMS > 0):
        group = tile // (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        row = (group * GROUP + (tile % (GROUP * across)) % height) * BLOCK_M
        column = (tile % (GROUP * across)) // height * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            acc = tl.dot(a_desc.load([row, k]), w_desc.load([column, k]).T, acc)
        if SPLIT:
            halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1)
            left, right = tl.split(halves)
            _finish(left, out_desc, bias, row, column, scale, out_scale, GELU)
            _finish(right, out_desc, bias, row, column + BLOCK_N // 2, scale, out_scale, GELU)
        else:
            _finish(acc, out_desc, bias, row, column, scale, out_scale, GELU)


@triton.jit
def _finish(acc, out_desc, bias, row, column, scale, out_scale, GELU: tl.constexpr):
    value = acc * scale + tl.load(bias + column + tl.arange(0, acc.shape[1]))[None, :]
    if GELU:
        value = gelu(value)
    out_desc.store([row, column], _low(value * out_scale, out_desc.dtype))
