# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Matrix product with a constant weight, fused with what follows it: bias, GELU and the cast or quantisation.

16-bit or E4M3 operands by the copy engine and Hopper's warpgroup products, FP32 accumulation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from recon.kernels.pointwise_triton import _low, gelu, gelu_to_e4m3


@triton.jit
def linear_kernel(
    a_desc, w_desc, out_desc, bias, M, N, K, scale, out_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GELU: tl.constexpr,
    PROGRAMS: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """a [M,K] x w [N,K]^T * scale + bias -> out [M,N].

    Stored times out_scale; with GELU, its GELU, and with PAIRS that in FP16, two at a time, for an E4M3 output.
    PROGRAMS > 0: that many programs walk over all tiles; two on a multiprocessor hide each other's endings.
    """
    gdc_wait()
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
        value = acc * scale + tl.load(bias + column + tl.arange(0, BLOCK_N))[None, :]
        if PAIRS:
            low = gelu_to_e4m3(value, out_scale)
        else:
            low = _low((gelu(value) if GELU else value) * out_scale, out_desc.dtype)
        out_desc.store([row, column], low)
