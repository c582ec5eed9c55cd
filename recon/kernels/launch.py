"""Launchers of the Triton kernels: tensors in, tensors out, block shapes chosen by size. CUDA only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from recon.kernels import (
    attention_gluon,
    attention_split_gluon,
    attention_triton,
    image_triton,
    linear_triton,
    pointwise_triton,
    small_triton,
)
from recon.kernels.reference import Change

GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


@dataclass(frozen=True)
class LinearTile:
    """Block shape of `linear`. programs = 0: one program a tile; else that many walk over all tiles."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0
    group: int = 8


@dataclass(frozen=True)
class AttentionTile:
    """Block shape of the specialised attention: as many tiles of `rows` queries a program as it has warpgroups."""

    rows: int = 64
    n: int = 128
    stages: int = 3
    registers: int = 160

    @property
    def queries(self) -> int:
        """Queries of one program."""
        return self.rows * int(attention_gluon.GROUPS.value)


FUSED = LinearTile(128, 128, 128, 4, 3, programs=264)
HALF, WHOLE = AttentionTile(n=64, stages=6), AttentionTile()
"""Tiles for 16-bit scores without a running maximum, whose queries then fit into registers, and for all others."""
WAVE = 128
"""With fewer programs than this an H200 stays half empty: smaller tiles of the plain kernel are faster then."""
ALONE = 132
"""With at most so many tiles of 64 queries each has a multiprocessor of an H200 to itself; two warpgroups share it."""
EARLY = {"launch_pdl": True}
"""The kernel may be launched while the one before it still runs: it waits for it by itself (`gdc_wait`)."""


def linear(
    a: Tensor, weight: Tensor, bias: Tensor, out: Tensor, tile: LinearTile, *, gelu: bool = False, scale: float = 1.0,
    out_scale: float = 1.0,
) -> None:  # fmt: skip
    """See `linear_triton.linear_kernel`. a [M,K], weight [N,K], bias [N] FP32 -> out [M,N] in its own dtype."""
    (m, k), n = a.shape, weight.shape[0]
    pairs = gelu and out.dtype == torch.float8_e4m3fn and 1e-4 < out_scale < 3e4  # FP16 has to hold the factor
    grid = (tile.programs or triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    linear_triton.linear_kernel[grid](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]), TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(out, [tile.m, tile.n]), bias, m, n, k, scale, out_scale, BLOCK_M=tile.m,
        BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, GELU=gelu, PROGRAMS=tile.programs, STAGES=tile.stages,
        PAIRS=pairs, num_warps=tile.warps, num_stages=tile.stages, **EARLY,
    )  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, columns: tuple[int, int, int], heads: int, *, bounded: bool,
    m: int = 128, n: int = 64, warps: int = 4, stages: int = 3, out_scale: float = 1.0, score_scale: float = 1.0,
    marks: Tensor | None = None,
) -> None:  # fmt: skip
    """q, k, v: [sequences, tokens, columns] views of the given first columns; out [sequences, tokens, heads * 64].

    marks: [sequences, heads, tokens] uint8; tiles without one stay as they are.
    """
    sequences, tokens = q.shape[:2]

    def described(x: Tensor, rows: int) -> Any:
        return TensorDescriptor.from_tensor(x, [1, rows, 64])

    attention_triton.attention_kernel[(triton.cdiv(tokens, m), heads, sequences)](
        described(q, m), described(k, n), described(v, n), described(out, m),
        marks if marks is not None else out, tokens, *columns, out_scale, score_scale, BLOCK_M=m, BLOCK_N=n,
        BOUNDED=bounded, SCALED=score_scale != 1, MARKED=marks is not None, STAGES=stages, num_warps=warps,
        num_stages=stages, **EARLY,
    )  # fmt: skip


def specialised_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, columns: tuple[int, int, int], heads: int, tile: AttentionTile,
    form: str, out_scale: float = 1.0, score_scale: float = 1.0, marks: Tensor | None = None,
) -> None:  # fmt: skip
    """As `attention`, by `attention_gluon`, whose forms these are; 16-bit operands, queries and keys E4M3 if they are.

    marks: filled with 1 for every row whose scores lie too far out for `checked` or `anchored`, and 0.
    """
    sequences, tokens = q.shape[:2]
    each = tokens // tile.queries
    whole, rest = each * heads * sequences, min(tokens % tile.queries, 1) * heads * sequences
    programs = min(whole + rest, _multiprocessors(q.device))
    attention_gluon.specialised_attention_kernel[(programs,)](
        _described(q, tile.rows), _described(k, tile.n), _described(v, tile.n), _described(out, tile.rows),
        marks if marks is not None else out, tokens, whole, whole // programs, each, rest, *columns, out_scale,
        score_scale, ROWS=tile.rows, BLOCK_N=tile.n, STAGES=tile.stages, REGISTERS=tile.registers, FORM=form,
        SCALED=score_scale != 1, HEADS=heads, num_warps=4, **EARLY,
    )  # fmt: skip


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, columns: tuple[int, int, int], heads: int, out_scale: float = 1.0,
    score_scale: float = 1.0, rows: int = 64, n: int = 128, stages: int = 3, registers: int = 232,
) -> None:  # fmt: skip
    """As `attention` with a running maximum, by `attention_split_gluon`: 16-bit operands, more than n keys."""
    sequences, tokens = q.shape[:2]
    q_desc, k_desc, v_desc, o_desc = (_described(x, size) for x, size in ((q, rows), (k, n), (v, n), (out, rows)))
    attention_split_gluon.split_attention_kernel[(triton.cdiv(tokens, rows), heads, sequences)](
        q_desc, k_desc, v_desc, o_desc, tokens, *columns, out_scale, score_scale, ROWS=rows, BLOCK_N=n, STAGES=stages,
        REGISTERS=registers, SCALED=score_scale != 1, num_warps=4, **EARLY,
    )  # fmt: skip


def _described(x: Tensor, rows: int) -> Any:
    """x [sequences, tokens, columns] for the copy engine, in blocks of so many tokens of one head."""
    block = [1, rows, 64]
    return GluonDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[x.dtype]))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, out_scale: float = 1.0) -> None:
    """x [rows, width] (rows may be strided) -> out [rows, width] in its own dtype."""
    rows, width = x.shape
    pointwise_triton.layer_norm_kernel[(rows,)](
        x, weight, bias, out, out_scale, eps, x.stride(0), WIDTH=width, PADDED=triton.next_power_of_2(width),
        num_warps=1, **EARLY,
    )  # fmt: skip


def add_layer_norm(
    x: Tensor, changes: Sequence[Change], weight: Tensor, bias: Tensor, eps: float, out: Tensor,
    out_scale: float = 1.0, store: bool = True,
) -> None:  # fmt: skip
    """out = LayerNorm(x [rows, width] FP32 + one or two changes) in its own dtype; x becomes the sum if `store`."""
    rows, width = x.shape
    (first, gain1), (second, gain2) = changes[0], changes[-1]
    together = 2
    pointwise_triton.add_layer_norm_kernel[(triton.cdiv(rows, together),)](
        x, first, second, gain1 if gain1 is not None else bias, gain2 if gain2 is not None else bias, weight, bias, out,
        out_scale, eps, rows, WIDTH=width, PADDED=triton.next_power_of_2(width), GAIN1=gain1 is not None,
        GAIN2=gain2 is not None, TWO=len(changes) == 2, STORE=store, ROWS=together, num_warps=4, **EARLY,
    )  # fmt: skip


def qk_norm_rotate(
    qkv: Tensor, weights: Tensor, biases: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, eps: float,
    q_scale: float = 1.0, k_scale: float = 1.0,
) -> None:  # fmt: skip
    """qkv [rows, 3*heads*64] -> out [rows, 2*heads*64] in its own dtype; cos, sin [tokens, 32] repeat over the rows."""
    rows, together = qkv.shape[0], 4
    pointwise_triton.qk_norm_rotate_kernel[(triton.cdiv(rows, together), 2)](
        qkv, weights, biases, cos, sin, out, rows, cos.shape[0], q_scale, k_scale, eps, HEADS=heads, ROWS=together,
        num_warps=4, **EARLY,
    )  # fmt: skip


def joined_layer_norm(
    left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, skipped: int
) -> None:
    """left, right [sequences, tokens, width] FP32 -> out [sequences, tokens - skipped, 2 * width] in its own dtype."""
    tokens, width = left.shape[1:]
    pointwise_triton.joined_layer_norm_kernel[(out.shape[0] * out.shape[1],)](
        left, right, weight, bias, out, out.shape[0] * out.shape[1], tokens, skipped, eps, WIDTH=width,
        PADDED=triton.next_power_of_2(width), num_warps=4, **EARLY,
    )  # fmt: skip


def gelu(x: Tensor, out: Tensor, out_scale: float = 1.0) -> None:
    """GELU of x into out, same shape, cast or quantised."""
    count = x.numel()
    pointwise_triton.gelu_kernel[(triton.cdiv(count, 4096),)](
        x, out, count, out_scale, BLOCK=4096, num_warps=8, **EARLY
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int, bounded: bool, out_scale: float, score_scale: float = 1.0
) -> None:
    """The attention kernel and block shape that were fastest at this size (benchmarks/log.md).

    16-bit scores without a bound are first taken as the type most likely holds them; rows that it cannot hold are done
    again.
    """
    sequences, tokens = q.shape[:2]
    low = q.dtype != v.dtype
    programs = triton.cdiv(tokens, WHOLE.queries) * heads * sequences
    if programs >= 3 * WAVE and not bounded and not low:
        form = "checked" if q.dtype == torch.bfloat16 else "anchored"
        marks = torch.empty(sequences, heads, tokens, dtype=torch.uint8, device=q.device)
        specialised_attention(q, k, v, out, (0, 0, 0), heads, HALF, form, out_scale, score_scale, marks)
        attention(
            q, k, v, out, (0, 0, 0), heads, bounded=False, out_scale=out_scale, score_scale=score_scale, marks=marks
        )
    elif programs >= WAVE or low:
        tile, form = HALF if bounded and not low else WHOLE, "bounded" if bounded else "running"
        specialised_attention(q, k, v, out, (0, 0, 0), heads, tile, form, out_scale, score_scale)
    elif not bounded and tokens > 128 and triton.cdiv(tokens, 64) * heads * sequences <= ALONE:
        split_attention(q, k, v, out, (0, 0, 0), heads, out_scale, score_scale)
    else:
        attention(
            q, k, v, out, (0, 0, 0), heads, bounded=bounded, m=64, n=128, stages=3, out_scale=out_scale,
            score_scale=score_scale,
        )  # fmt: skip


def enlarge(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """x [n,C,h,w] -> out [n,C,H,W], both channels last; bias [C] FP32."""
    images, channels, h, w = x.shape
    height, width = out.shape[2:]
    padded = triton.next_power_of_2(channels)
    columns = max(1, 4096 // padded)
    image_triton.enlarge_kernel[(triton.cdiv(width, columns), height, images)](
        x, bias, out, h, w, height, width, (h - 1) / max(height - 1, 1), (w - 1) / max(width - 1, 1), C=channels,
        PADDED=padded, COLUMNS=columns, num_warps=4, **EARLY,
    )  # fmt: skip


def enlarged_taps(
    parts: Tensor, across: Tensor, down: Tensor, weight: Tensor, bias: Tensor, out: Tensor, columns: int = 32,
    rows: int = 8, warps: int = 2,
) -> None:  # fmt: skip
    """As the operator: parts channels last, across [3,W,C], down [3,H,C], weight [outputs,C] -> out, FP32."""
    images, stride, h, width = parts.shape
    height, channels = down.shape[1:]
    image_triton.enlarged_taps_kernel[(triton.cdiv(width, columns), triton.cdiv(height, rows), images)](
        parts, across, down, weight, bias, out, h, height, width, (h - 1) / max(height - 1, 1), C=channels,
        PADDED=triton.next_power_of_2(channels), STRIDE=stride, OUTPUTS=weight.shape[0], COLUMNS=columns, ROWS=rows,
        num_warps=warps, **EARLY,
    )  # fmt: skip


def few_rows(
    a: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, addend: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """a [rows <= 8, K] FP32 x (weight [N,K] FP16 * scale [N])^T; N % 16 == 0, K % 64 == 0."""
    (rows, k), n = a.shape, weight.shape[0]
    given = a, weight, scale, bias, addend if addend is not None else bias, out, n
    common = {"K": k, "ROWS": rows, "GELU": gelu, "ADD": addend is not None} | EARLY
    if rows > 1 and n > k:
        small_triton.split_rows_kernel[(n // 16,)](
            *given, BLOCK_N=16, BLOCK_K=min(k & -k, 256), STAGES=5, num_warps=4, num_stages=5, **common
        )
        return
    block_k, warps = (1024, 4) if rows == 1 else (512, 8)
    small_triton.few_rows_kernel[(n // 4,)](
        *given, PADDED=triton.next_power_of_2(rows), BLOCK_N=4, BLOCK_K=min(k & -k, block_k), num_warps=warps, **common
    )


def few_tokens_attention(qkv: Tensor, out: Tensor, heads: int) -> None:
    """qkv [rows <= 8, 3*C] FP32 with scaled queries -> out [rows, C]."""
    rows, width = out.shape
    small_triton.few_tokens_attention_kernel[(heads,)](
        qkv, out, ROWS=rows, PADDED=triton.next_power_of_2(rows), HEADS=heads, WIDTH=width // heads, num_warps=4,
        **EARLY,
    )  # fmt: skip
