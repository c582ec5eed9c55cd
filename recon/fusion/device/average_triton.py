# mypy: ignore-errors
# The body is Triton's language, which shares Python's syntax and not its types.
"""Averaging all views of a time step into the blocks that they concern: each block is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "views"])  # they change in a stream, and would be compiled anew
def average_kernel(
    tsdf, weight, color, coordinates, concerned, depths, images, cameras, blocks, views, height, width, voxel, band,
    cap, STRIDE: tl.constexpr, SIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program a block. tsdf [blocks,SIDE^3] float32, weight the same in int16 (bits of uint16), color with 3
    channels in int16 (of 1/STEPS), coordinates [blocks,3] int32; concerned [views,blocks] uint8; depths
    [views,height,width] float32; images with 3 channels in uint8; cameras [views,STRIDE] float32 as `Cameras.single`.
    """
    VOXELS: tl.constexpr = SIDE * SIDE * SIDE
    block = tl.program_id(0).to(tl.int64)
    wanted = 0
    for view in range(views):
        wanted += tl.load(concerned + view * blocks + block).to(tl.int32)
    if wanted > 0:
        within = tl.arange(0, VOXELS)
        bx = tl.load(coordinates + block * 3)
        by = tl.load(coordinates + block * 3 + 1)
        bz = tl.load(coordinates + block * 3 + 2)
        x = (bx * SIDE + within % SIDE).to(tl.float32) * voxel
        y = (by * SIDE + within // SIDE % SIDE).to(tl.float32) * voxel
        z = (bz * SIDE + within // (SIDE * SIDE)).to(tl.float32) * voxel
        place = block * VOXELS + within
        distance = tl.load(tsdf + place)
        seen_times = tl.load(weight + place).to(tl.int32) & 0xFFFF
        red = tl.load(color + place * 3).to(tl.int32)
        green = tl.load(color + place * 3 + 1).to(tl.int32)
        blue = tl.load(color + place * 3 + 2).to(tl.int32)
        for view in range(views):
            if tl.load(concerned + view * blocks + block) != 0:
                c = cameras + view * STRIDE
                fx, fy, cx, cy = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
                u0 = tl.load(c + 16) * x + tl.load(c + 17) * y + tl.load(c + 18) * z + tl.load(c + 25)
                v0 = tl.load(c + 19) * x + tl.load(c + 20) * y + tl.load(c + 21) * z + tl.load(c + 26)
                ahead = tl.load(c + 22) * x + tl.load(c + 23) * y + tl.load(c + 24) * z + tl.load(c + 27)
                inverse = tl.div_rn(tl.full([VOXELS], 1.0, tl.float32), ahead)
                u = fx * u0 * inverse + cx
                v = fy * v0 * inverse + cy
                inside = (ahead > 0) & (u >= 0) & (v >= 0) & (u <= width - 1) & (v <= height - 1)
                pixel = tl.where(inside, v, 0.0).to(tl.int32) * width + tl.where(inside, u, 0.0).to(tl.int32)
                pixel += view * height * width
                measured = tl.load(depths + pixel, inside, 0.0)
                signed = measured - ahead
                take = inside & (measured > 0) & (signed >= -band)
                held = tl.minimum(seen_times, cap)
                share = tl.div_rn(tl.full([VOXELS], 1.0, tl.float32), (held + 1).to(tl.float32))
                new = tl.div_rn(tl.minimum(signed, band), tl.zeros([VOXELS], tl.float32) + band)
                distance = tl.where(take, (held.to(tl.float32) * distance + new) * share, distance)
                r = tl.load(images + pixel * 3, take, 0).to(tl.int32) * STEPS
                g = tl.load(images + pixel * 3 + 1, take, 0).to(tl.int32) * STEPS
                b = tl.load(images + pixel * 3 + 2, take, 0).to(tl.int32) * STEPS
                red = tl.where(take, _rounded((held * red + r).to(tl.float32) * share), red)
                green = tl.where(take, _rounded((held * green + g).to(tl.float32) * share), green)
                blue = tl.where(take, _rounded((held * blue + b).to(tl.float32) * share), blue)
                seen_times = held + take.to(tl.int32)
        tl.store(tsdf + place, distance)
        tl.store(weight + place, seen_times.to(tl.int16))
        tl.store(color + place * 3, red.to(tl.int16))
        tl.store(color + place * 3 + 1, green.to(tl.int16))
        tl.store(color + place * 3 + 2, blue.to(tl.int16))


@triton.jit
def _rounded(value):
    """To the nearest integer, halves to the even one, for 0 <= value < 2^22."""
    return ((value + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit(do_not_specialize=["blocks"])
def through_kernel(
    coordinates, concerned, before, depths, cameras, constants, blocks, height, width,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to concerned [views,blocks] uint8 the blocks among the first before [views] int64 that a view sees through.

    cameras [views,STRIDE] float64 as `Cameras.packed`; constants float64: a block's side, and the share of it around
    its centre that is looked at. Numbers of double precision come from memory: literals would be of single precision.
    """
    view = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < tl.minimum(tl.load(before + view), blocks)
    side, part = tl.load(constants), tl.load(constants + 1)
    bx = (tl.load(coordinates + row * 3, there, 0).to(tl.float64) + 0.5) * side
    by = (tl.load(coordinates + row * 3 + 1, there, 0).to(tl.float64) + 0.5) * side
    bz = (tl.load(coordinates + row * 3 + 2, there, 0).to(tl.float64) + 0.5) * side
    c = cameras + view * STRIDE
    fx, fy, cx, cy = tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
    x = tl.load(c + 16) * bx + tl.load(c + 17) * by + tl.load(c + 18) * bz + tl.load(c + 25)
    y = tl.load(c + 19) * bx + tl.load(c + 20) * by + tl.load(c + 21) * bz + tl.load(c + 26)
    z = tl.load(c + 22) * bx + tl.load(c + 23) * by + tl.load(c + 24) * bz + tl.load(c + 27)
    free = there & (z > 0)
    z = tl.where(free, z, 1.0)
    u = _pixel(fx * x / z + cx + 0.5)
    v = _pixel(fy * y / z + cy + 0.5)
    half = _pixel(fx * part * side / z + 1)
    nearest = z + side
    image = depths + view * height * width
    free = free & (_depth(image, u, v, height, width) > nearest)
    for dv in tl.static_range(-1, 2):
        for du in tl.static_range(-1, 2):
            seen = _depth(image, u + du * half, v + dv * half, height, width)
            free = free & ((seen <= 0) | (seen > nearest))
    place = concerned + view * blocks + row
    tl.store(place, tl.full([BLOCK], 1, tl.uint8), free)


@triton.jit
def _pixel(value):
    """floor(value) within +-1e9."""
    return tl.floor(tl.minimum(tl.maximum(value, -1e9), 1e9)).to(tl.int32)


@triton.jit
def _depth(image, u, v, height, width):
    """Depth at integer pixels in double precision, 0 outside."""
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return tl.load(image + v * width + u, inside, 0.0).to(tl.float64)
