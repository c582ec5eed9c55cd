# mypy: ignore-errors
# The body is Triton's language, which shares Python's syntax and not its types.
"""Surfel loops for a GPU: the rules of `kernels.surfels`, one program for many surfels or pixels.

camera: float64, a row of `Cameras.packed` (fx, fy, cx, cy; T_world_cam from 4, T_cam_world from 16, rotations by rows).
Numbers of double precision come from memory: literals would be of single precision. What several surfels write to one
pixel is the same number (marks), a minimum, or a sum of integers, so no order shows. Arguments that change from frame
to frame are not specialised: each kind of number would be compiled anew in the middle of a stream.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normals_kernel(depth, camera, rules, out, height, width, step, BLOCK: tl.constexpr):
    """`Sight.normals` of depth [height,width] float32 into out, 3 float64 a pixel. rules: as `merge_kernel`."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = pixel < height * width
    u, v = pixel % width, pixel // width
    fx, fy, cx, cy = tl.load(camera), tl.load(camera + 1), tl.load(camera + 2), tl.load(camera + 3)
    z = tl.load(depth + pixel, there, 0.0)
    jump = tl.maximum(tl.load(rules + 1) * z.to(tl.float64), tl.load(rules))
    left, a0 = _neighbour(depth, pixel - step, there & (u >= step), z, jump)
    right, a1 = _neighbour(depth, pixel + step, there & (u + step < width), z, jump)
    above, b0 = _neighbour(depth, pixel - step * width, there & (v >= step), z, jump)
    below, b1 = _neighbour(depth, pixel + step * width, there & (v + step < height), z, jump)
    u0, u1 = tl.where(left, u - step, u).to(tl.float64) - cx, tl.where(right, u + step, u).to(tl.float64) - cx
    v0, v1 = tl.where(above, v - step, v).to(tl.float64) - cy, tl.where(below, v + step, v).to(tl.float64) - cy
    ax, az = (a1.to(tl.float64) * u1 - a0.to(tl.float64) * u0) / fx, (a1 - a0).to(tl.float64)
    by, bz = (b1.to(tl.float64) * v1 - b0.to(tl.float64) * v0) / fy, (b1 - b0).to(tl.float64)
    x, y = (u.to(tl.float64) - cx) / fx, (v.to(tl.float64) - cy) / fy
    ay, bx = az * y, bz * x
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = tl.sqrt(nx * nx + ny * ny + nz * nz)
    good = (left | right) & (above | below) & (length >= tl.load(rules + 6))
    length = tl.where(nx * x + ny * y + nz > 0, -length, length)
    length = tl.where(good, length, 1.0)
    tl.store(out + pixel * 3, tl.where(good, nx / length, 0.0), there)
    tl.store(out + pixel * 3 + 1, tl.where(good, ny / length, 0.0), there)
    tl.store(out + pixel * 3 + 2, tl.where(good, nz / length, 0.0), there)


@triton.jit(do_not_specialize=["n", "frame", "patience", "stale_frames"])
def merge_kernel(
    position, normal, color, radius, weight, last, violations,
    new_position, new_normal, new_color, new_weight, new_last, new_violations, covered,
    depth, image, normals, camera, rules, awake, n, height, width, frame, patience, stale_frames, BLOCK: tl.constexpr,
):  # fmt: skip
    """`surfel_update.merge`: the columns of n surfels after a frame, and marks in covered [height,width] uint8.

    depth [height,width] float32; image with 3 channels in uint8; normals as of `normals_kernel`; awake uint8: whether
    any pixel has depth. rules, float64: gate floor, gate share, unit, cap, stale weight, least z, least length, side.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    held = tl.load(weight + i, there, 0.0).to(tl.float64)
    age = frame - tl.load(last + i, there, 0)
    stale = (tl.load(awake) != 0) & (held < tl.load(rules + 4)) & (age > stale_frames)
    px, py, pz, x, y, z = _moved(position, i, there, camera)
    ahead = there & (stale == 0) & (z > tl.load(rules + 5))
    z = tl.where(ahead, z, 1.0)
    fx, fy, cx, cy = tl.load(camera), tl.load(camera + 1), tl.load(camera + 2), tl.load(camera + 3)
    fu, fv = fx * x / z + cx + 0.5, fy * y / z + cy + 0.5
    inside = ahead & (fu >= 0) & (fu < width) & (fv >= 0) & (fv < height)
    u, v = tl.where(inside, fu, 0.0).to(tl.int32), tl.where(inside, fv, 0.0).to(tl.int32)
    pixel = v * width + u
    seen = tl.load(depth + pixel, inside, 0.0).to(tl.float64)
    gate = tl.maximum(tl.load(rules + 1) * z, tl.load(rules))
    valid = inside & (seen > 0)
    through = valid & (seen > z + gate)
    near = valid & (seen >= z - gate) & (seen <= z + gate)
    mx, my, mz = _triple(normals, pixel, near)
    nx, ny, nz, hx, hy, hz = _turned_row(normal, i, there, camera)
    merged = near & (mx * hx + my * hy + mz * hz >= 0.5)
    ratio = tl.load(rules + 2) / tl.where(merged, seen, 1.0)
    observed = ratio * ratio
    part = tl.where(merged, observed / (held + observed), 0.0)
    dx = seen * (u.to(tl.float64) - cx) / fx - x
    dy = seen * (v.to(tl.float64) - cy) / fy - y
    move = part * (hx * dx + hy * dy + hz * (seen - z))
    _store3(new_position, i, there, px + move * nx, py + move * ny, pz + move * nz)
    hx, hy, hz = hx + part * (mx - hx), hy + part * (my - hy), hz + part * (mz - hz)
    length = tl.sqrt(hx * hx + hy * hy + hz * hz)
    length = tl.where(merged, length, 1.0)
    ax, ay, az = _turned_back(camera, hx, hy, hz)
    _store3(
        new_normal, i, there, tl.where(merged, ax / length, nx), tl.where(merged, ay / length, ny),
        tl.where(merged, az / length, nz),
    )  # fmt: skip
    for channel in tl.static_range(3):
        old = tl.load(color + i * 3 + channel, there, 0.0)
        shown = tl.load(image + pixel * 3 + channel, merged, 0).to(tl.float32)
        mixed = old.to(tl.float64) + part * (shown - old).to(tl.float64)
        tl.store(new_color + i * 3 + channel, mixed.to(tl.float32), there)
    count = tl.load(violations + i, there, 0).to(tl.int32) + through.to(tl.int32)
    count = tl.where(near, 0, count)
    dead = stale | (through & (count >= patience))
    grown = tl.where(merged, tl.minimum(held + observed, tl.load(rules + 3)), held)
    tl.store(new_weight + i, tl.where(dead, 0.0, grown).to(tl.float32), there)
    tl.store(new_last + i, tl.where(merged, frame, tl.load(last + i, there, 0)), there)
    tl.store(new_violations + i, count.to(tl.uint8), there)
    half = tl.load(radius + i, there, 0.0).to(tl.float64) * fx / z
    half = tl.minimum(half, (height + width) * 1.0).to(tl.int32)
    _cover(covered, depth, u, v, half, z, gate, merged, height, width)


@triton.jit(do_not_specialize=["n"])
def splat_kernel(
    position, normal, radius, weight, camera, rules, near, behind, mass, n, height, width,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`surfel_render.splat`, one of its passes: the nearest depth of each pixel into near [height,width] int32 (bits of
    float32, which order positive numbers as integers do), or (SUMS) the weighted offsets behind it and the weights.

    rules, float64: slab, steps a unit of weight, share of its side at which a surfel is drawn, least z, least slope.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    _px, _py, _pz, x, y, z = _moved(position, i, there, camera)
    _nx, _ny, _nz, hx, hy, hz = _turned_row(normal, i, there, camera)
    offset = hx * x + hy * y + hz * z
    shown = there & (z > tl.load(rules + 3)) & (offset < 0)
    z = tl.where(shown, z, 1.0)
    fx, fy, cx, cy = tl.load(camera), tl.load(camera + 1), tl.load(camera + 2), tl.load(camera + 3)
    side = tl.load(rules + 2) * tl.load(radius + i, there, 0.0).to(tl.float64) / z
    ru, rv = tl.maximum(side * fx, 0.5), tl.maximum(side * fy, 0.5)
    u, v = fx * x / z + cx, fy * y / z + cy
    left, right = tl.maximum(tl.ceil(u - ru), 0.0), tl.minimum(tl.floor(u + ru), width - 1.0)
    top, bottom = tl.maximum(tl.ceil(v - rv), 0.0), tl.minimum(tl.floor(v + rv), height - 1.0)
    shown = shown & (right >= left) & (bottom >= top)
    u0, v0 = tl.where(shown, left, 0.0).to(tl.int32), tl.where(shown, top, 0.0).to(tl.int32)
    wide = tl.where(shown, right - left + 1, 1.0).to(tl.int32)
    pixels = tl.where(shown, wide * tl.where(shown, bottom - top + 1, 1.0).to(tl.int32), 0)
    reach = 3 * ru * z / fx
    share = tl.load(weight + i, there, 0.0).to(tl.float64) * tl.load(rules + 1)
    slab, slope = tl.load(rules), tl.load(rules + 4)
    for k in range(tl.max(pixels, 0)):
        uu, vv = u0 + k % wide, v0 + k // wide
        along = hx * (uu.to(tl.float64) - cx) / fx + hy * (vv.to(tl.float64) - cy) / fy + hz
        tilted = along < slope
        met = tl.where(tilted, offset / tl.where(tilted, along, 1.0), z)
        met = tl.minimum(tl.maximum(met, z - reach), z + reach)
        drawn = (k < pixels) & (met > 0)
        pixel = vv * width + uu
        if SUMS:
            past = met - tl.load(near + pixel, drawn, 0).to(tl.float32, bitcast=True).to(tl.float64)
            drawn = drawn & (past <= slab)
            tl.atomic_add(mass + pixel, _rounded(share), drawn, sem="relaxed")
            tl.atomic_add(behind + pixel, _rounded(share * (past / slab)), drawn, sem="relaxed")
        else:
            tl.atomic_min(near + pixel, met.to(tl.float32).to(tl.int32, bitcast=True), drawn, sem="relaxed")


@triton.jit
def _cover(covered, depth, u, v, half, z, gate, merged, height, width):
    """Mark pixels within a square around (u, v) whose depth is within the gate of z."""
    left, right = tl.maximum(u - half, 0), tl.minimum(u + half, width - 1)
    top, bottom = tl.maximum(v - half, 0), tl.minimum(v + half, height - 1)
    wide = right - left + 1
    pixels = tl.where(merged, wide * (bottom - top + 1), 0)
    for k in range(tl.max(pixels, 0)):
        pixel = (top + k // wide) * width + left + k % wide
        away = tl.load(depth + pixel, k < pixels, 0.0).to(tl.float64) - z
        tl.store(covered + pixel, tl.full(pixel.shape, 1, tl.uint8), (k < pixels) & (tl.abs(away) <= gate))


@triton.jit
def _neighbour(depth, pixel, inside, z, jump):
    """Whether a neighbour will do, and its depth, the pixel's own z where it will not."""
    found = tl.load(depth + pixel, inside, 0.0)
    near = (found > 0) & (tl.abs(found - z).to(tl.float64) <= jump)
    return near, tl.where(near, found, z)


@triton.jit
def _triple(array, i, there):
    x, y = tl.load(array + i * 3, there, 0.0), tl.load(array + i * 3 + 1, there, 0.0)
    z = tl.load(array + i * 3 + 2, there, 0.0)
    return x.to(tl.float64), y.to(tl.float64), z.to(tl.float64)


@triton.jit
def _store3(array, i, there, x, y, z):
    tl.store(array + i * 3, x.to(tl.float32), there)
    tl.store(array + i * 3 + 1, y.to(tl.float32), there)
    tl.store(array + i * 3 + 2, z.to(tl.float32), there)


@triton.jit
def _turned_row(array, i, there, camera):
    """A vector, and the same in the camera frame."""
    x, y, z = _triple(array, i, there)
    R = camera + 16
    a = tl.load(R) * x + tl.load(R + 1) * y + tl.load(R + 2) * z
    b = tl.load(R + 3) * x + tl.load(R + 4) * y + tl.load(R + 5) * z
    c = tl.load(R + 6) * x + tl.load(R + 7) * y + tl.load(R + 8) * z
    return x, y, z, a, b, c


@triton.jit
def _moved(array, i, there, camera):
    """A point, and the same in the camera frame."""
    x, y, z, a, b, c = _turned_row(array, i, there, camera)
    return x, y, z, a + tl.load(camera + 25), b + tl.load(camera + 26), c + tl.load(camera + 27)


@triton.jit
def _turned_back(camera, x, y, z):
    R = camera + 16
    a = tl.load(R) * x + tl.load(R + 3) * y + tl.load(R + 6) * z
    b = tl.load(R + 1) * x + tl.load(R + 4) * y + tl.load(R + 7) * z
    c = tl.load(R + 2) * x + tl.load(R + 5) * y + tl.load(R + 8) * z
    return a, b, c


@triton.jit
def _rounded(value):
    """To the nearest integer, 0 <= value < 2^52; halves may go either way."""
    return tl.floor(value + 0.5).to(tl.int64)
