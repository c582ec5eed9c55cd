# mypy: ignore-errors
# The bodies are Triton's language, which shares Python's syntax and not its types.
"""Bilinear enlargement, channels last, fused with what surrounds it in a dense head."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def enlarge_kernel(
    x, bias, out, h, w, height, width, y_step, x_step, C: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [n,h,w,C] -> out [n,height,width,C], corners on corners, + bias [C]."""
    gdc_wait()
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, PADDED)[None, :]
    inside = (columns < width)[:, None] & (channel < C)
    value = _between(x + image * h * w * C + channel, row * y_step, columns * x_step, h, w, C, inside)
    value += tl.load(bias + channel, channel < C, 0.0)
    target = out + ((image * height + row) * width + columns.to(tl.int64))[:, None] * C + channel
    tl.store(target, value.to(out.dtype.element_ty), inside)


@triton.jit
def enlarged_taps_kernel(
    parts, across, down, weight, bias, out, h, height, width, step,
    C: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What three taps above each other make of a low image, parts [n,h,width,STRIDE >= 3*C], enlarged to `height` rows,
    each moved to its place and summed, + across [3,width,C] and down [3,height,C] (first, inner, last row or column);
    ReLU; then weight [OUTPUTS,C] and bias -> out [n,OUTPUTS,height,width] FP32. A program goes down ROWS rows, which
    share what they read."""
    gdc_wait()
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, PADDED)[None, :]
    side = tl.where(columns == 0, 0, tl.where(columns == width - 1, 2, 1))
    place = columns[:, None] * STRIDE + channel
    for turn in range(ROWS):
        row = tl.program_id(1) * ROWS + turn
        inside = ((columns < width) & (row < height))[:, None] & (channel < C)
        edge = tl.where(row == 0, 0, tl.where(row == height - 1, 2, 1))
        value = tl.load(across + (edge * width + columns)[:, None] * C + channel, inside, 0.0)
        value += tl.load(down + (side * height + row)[:, None] * C + channel, inside, 0.0)
        for dy in tl.static_range(3):
            y = row + (dy - 1)
            at = tl.maximum(y, 0) * step
            top = tl.minimum(at.to(tl.int32), h - 1)
            low, share, there = tl.minimum(top + 1, h - 1), at - top, inside & (y >= 0) & (y < height)
            tap = parts + image * h * width * STRIDE + dy * C + place
            value += (1 - share) * tl.load(tap + top * width * STRIDE, there, 0.0).to(tl.float32)
            value += share * tl.load(tap + low * width * STRIDE, there, 0.0).to(tl.float32)
        value = tl.maximum(value, 0.0)
        for k in tl.static_range(OUTPUTS):
            total = tl.sum(value * tl.load(weight + k * C + channel, channel < C, 0.0), 1) + tl.load(bias + k)
            target = out + ((image * OUTPUTS + k) * height + row) * width + columns
            tl.store(target, total, (columns < width) & (row < height))


@triton.jit
def _between(start, y, x, h, w, stride, inside):
    """Bilinear in FP32: the image of [h, w] pixels, `stride` numbers each, at row y (one) and columns x [n]."""
    top, left = tl.minimum(y.to(tl.int32), h - 1), tl.minimum(x.to(tl.int32), w - 1)
    low, right = tl.minimum(top + 1, h - 1), tl.minimum(left + 1, w - 1)
    fy, fx = y - top, (x - left)[:, None]
    a = tl.load(start + (top * w + left)[:, None] * stride, inside, 0.0).to(tl.float32)
    b = tl.load(start + (top * w + right)[:, None] * stride, inside, 0.0).to(tl.float32)
    c = tl.load(start + (low * w + left)[:, None] * stride, inside, 0.0).to(tl.float32)
    d = tl.load(start + (low * w + right)[:, None] * stride, inside, 0.0).to(tl.float32)
    above, below = a + (b - a) * fx, c + (d - c) * fx
    return above + (below - above) * fy
