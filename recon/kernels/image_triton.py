# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Bilinear enlargement, channels last, fused with what surrounds it in a dense head: bias and position map."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def enlarge_kernel(
    x, bias, across, down, out, h, w, height, width, y_step, x_step,
    C: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """x [n,h,w,C] -> out [n,height,width,C], corners on corners, + bias [C] (+ across [width,C] + down [height,C])."""
    gdc_wait()
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, PADDED)[None, :]
    inside = (columns < width)[:, None] & (channel < C)
    y, at = row * y_step, columns * x_step
    top, left = tl.minimum(y.to(tl.int32), h - 1), tl.minimum(at.to(tl.int32), w - 1)
    low, right = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
    fy, fx = y - top, (at - left)[:, None]
    upper, lower = x + (image * h + top) * w * C, x + (image * h + low) * w * C
    a = tl.load(upper + left[:, None] * C + channel, inside, 0.0).to(tl.float32)
    b = tl.load(upper + right[:, None] * C + channel, inside, 0.0).to(tl.float32)
    c = tl.load(lower + left[:, None] * C + channel, inside, 0.0).to(tl.float32)
    d = tl.load(lower + right[:, None] * C + channel, inside, 0.0).to(tl.float32)
    above, below = a + (b - a) * fx, c + (d - c) * fx
    value = above + (below - above) * fy + tl.load(bias + channel, channel < C, 0.0)
    if PLACED:
        value += tl.load(across + columns[:, None] * C + channel, inside, 0.0)
        value += tl.load(down + row * C + channel, channel < C, 0.0)
    target = out + ((image * height + row) * width + columns.to(tl.int64))[:, None] * C + channel
    tl.store(target, value.to(out.dtype.element_ty), inside)
