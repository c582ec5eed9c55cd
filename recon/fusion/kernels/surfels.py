"""Surfel loops: every visible surfel reads its pixel, uncovered pixels spawn, and the map is splatted into a z-buffer.

A surfel is a row of the arrays that `recon.fusion.surfel.SurfelMap` holds. Rows keep their order, so a map is the same
bytes for the same input. camera is (fx, fy, cx, cy); R, t are T_cam_world, but T_world_cam where surfels spawn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recon.fusion.kernels import jit
from recon.geometry.views import DepthImage, Image

Float = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Pair = tuple[float, float]
Triple = tuple[float, float, float]

DRAWN = 0.67  # share of its side at which a surfel is drawn: whole squares hang over silhouettes
FACING = 0.5  # cosine of 60 degrees: normals further apart are different surfaces
CHUNK = 1024  # surfels that one loop after the other works on: they stay in the cache


class Rows(NamedTuple):
    """The columns of surfels, at capacity."""

    position: Float32
    normal: Float32
    color: Float32
    radius: Float32
    weight: Float32
    first: Int32
    last: Int32
    violations: UInt8


class Merged(NamedTuple):
    """Surfels that a frame was merged into: their rows and pixels, and the depth, gate and share they had there."""

    row: Int64
    u: Int64
    v: Int64
    z: Float
    gate: Float
    part: Float


class Rules(NamedTuple):
    """What a frame and the options decide. Gate |dz| <= max(floor, share*z); an observation weighs (unit/z)^2."""

    base: int
    floor: float
    share: float
    unit: float
    cap: float
    patience: int
    stale_frames: int
    stale_weight: float
    spacing: float
    radius: float


@jit
def gather(
    n: int, rows: Rows, depth: DepthImage, image: Image, camera: Float, R: Float, t: Float, rules: Rules, frame: int,
    covered: UInt8,
) -> int:  # fmt: skip
    """Merge a frame into the surfels it sees and move those that live on to the front, in order; returns their number.
    `covered` is set where a surfel explains the pixel."""
    row, u, v = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    merged = Merged(row, u, v, np.empty(CHUNK), np.empty(CHUNK), np.empty(CHUNK))
    living = 0
    for start in range(0, n, CHUNK):
        end = min(start + CHUNK, n)
        count = _merge(start, end, rows, depth, camera, R, t, rules, frame, merged)
        # loops of their own: with short ones the processor has more reads from memory under way at once
        _blend(count, merged, rows.color, image)
        _cover(count, merged, rows.radius, camera[0], depth, covered)
        living = _keep_living(start, end, living, rows)
    return living


@jit
def _merge(
    start: int, end: int, rows: Rows, depth: DepthImage, camera: Float, R: Float, t: Float, rules: Rules, frame: int,
    merged: Merged,
) -> int:  # fmt: skip
    """Merge a frame, all but its colours, into those of rows start..end-1 that it sees; returns how many, listed in
    `merged`. Those that have died get weight 0."""
    position, normal, weight, last, violations = rows.position, rows.normal, rows.weight, rows.last, rows.violations
    row, us, vs, zs, gates, parts = merged
    count = 0
    for i in range(start, end):
        if weight[i] < rules.stale_weight and frame - last[i] > rules.stale_frames:
            weight[i] = 0.0
            continue
        x, y, z = _moved(R, t, position, i)
        u, v = _pixel(camera, x, y, z, depth.shape)
        seen = depth[v, u] if u >= 0 else np.float32(0)
        gate = max(rules.floor, rules.share * z)
        if seen <= 0 or seen < z - gate:
            continue  # unknown or hidden
        if seen > z + gate:
            violations[i] += 1
            if violations[i] >= rules.patience:
                weight[i] = 0.0
            continue
        violations[i] = 0
        measured = normal_at(depth, u, v, rules.base, camera, rules.floor, rules.share)
        held = _turned(R, normal[i, 0], normal[i, 1], normal[i, 2])
        if measured[0] * held[0] + measured[1] * held[1] + measured[2] * held[2] < FACING:
            continue
        w = (rules.unit / seen) ** 2
        part = w / (weight[i] + w)
        dx, dy, dz = seen * (u - camera[2]) / camera[0] - x, seen * (v - camera[3]) / camera[1] - y, seen - z
        _average(i, position, normal, R, part, held, measured, held[0] * dx + held[1] * dy + held[2] * dz)
        weight[i], last[i] = min(weight[i] + w, rules.cap), frame
        row[count], us[count], vs[count], zs[count], gates[count], parts[count] = i, u, v, z, gate, part
        count += 1
    return count


@jit
def _blend(count: int, merged: Merged, color: Float32, image: Image) -> None:
    for k in range(count):
        i, u, v = merged.row[k], merged.u[k], merged.v[k]
        for a in range(3):
            color[i, a] += merged.part[k] * (image[v, u, a] - color[i, a])


@jit
def _cover(count: int, merged: Merged, radius: Float32, focal: float, depth: DepthImage, covered: UInt8) -> None:
    """Mark the pixels of merged surfels' squares that are within the gate of their depth."""
    for k in range(count):
        u, v, z, gate = merged.u[k], merged.v[k], merged.z[k], merged.gate[k]
        half = int(radius[merged.row[k]] * focal / z)
        for vv in range(max(v - half, 0), min(v + half + 1, depth.shape[0])):
            for uu in range(max(u - half, 0), min(u + half + 1, depth.shape[1])):
                covered[vv, uu] |= abs(depth[vv, uu] - z) <= gate


@jit
def _keep_living(start: int, end: int, living: int, rows: Rows) -> int:
    """Move the living of rows start..end-1 to row `living` and on, in order; returns where they end."""
    position, normal, color, radius, weight, first, last, violations = rows
    if living == start and weight[start:end].min() > 0:
        return end
    for i in range(start, end):
        if weight[i] > 0:
            for a in range(3):
                position[living, a], normal[living, a], color[living, a] = position[i, a], normal[i, a], color[i, a]
            radius[living], weight[living], first[living] = radius[i], weight[i], first[i]
            last[living], violations[living] = last[i], violations[i]
            living += 1
    return living


@jit
def spawn(
    n: int, rows: Rows, depth: DepthImage, image: Image, camera: Float, R: Float, t: Float, rules: Rules, frame: int,
    pixels: Int64,
) -> int:  # fmt: skip
    """New surfels for the pixels of these row-major indices, one per cube of side `spacing`, the first that has a
    normal; from row n, returns their end. Returns -1 when there are too few rows: add some and repeat."""
    position, normal, color, radius, weight, first, last, violations = rows
    cubes = _no_cubes(len(pixels))
    cube, slot = -1, 0
    for pixel in pixels:
        v, u = pixel // depth.shape[1], pixel % depth.shape[1]
        z = depth[v, u]
        x, y, ahead = _turned(R, z * (u - camera[2]) / camera[0], z * (v - camera[3]) / camera[1], z)
        x, y, ahead = x + t[0], y + t[1], ahead + t[2]
        key = _cube(x / rules.spacing, y / rules.spacing, ahead / rules.spacing)
        if key != cube:  # neighbours are often in one cube
            cube, slot = key, _slot(key, cubes)
        if cubes[slot] == key:
            continue
        measured = normal_at(depth, u, v, rules.base, camera, rules.floor, rules.share)
        if measured[0] == 0 and measured[1] == 0 and measured[2] == 0:
            continue  # another pixel of the cube may do
        if n >= len(position):
            return -1
        cubes[slot] = key
        position[n, 0], position[n, 1], position[n, 2] = x, y, ahead
        turned = _turned(R, measured[0], measured[1], measured[2])
        for a in range(3):
            normal[n, a], color[n, a] = turned[a], image[v, u, a]
        radius[n] = rules.radius * max(rules.spacing, z / camera[0])
        weight[n] = min((rules.unit / z) ** 2, rules.cap)
        first[n], last[n], violations[n] = frame, frame, 0
        n += 1
    return n


@jit
def splat(
    n: int, rows: Rows, camera: Float, R: Float, t: Float, slab: float, near: Float32, total: Float32, mass: Float32
) -> None:
    """Depth of the surfels as squares on the image, each a tilted plane; back faces are left out.

    Two passes: `near` [H,W] gets the nearest depth, then `total` and `mass` the weighted sum of all planes within
    `slab` behind it, because the nearest of many noisy surfels is biased towards the camera.
    """
    position, normal, radius, weight = rows.position, rows.normal, rows.radius, rows.weight
    for second in range(2):
        for i in range(n):
            x, y, z = _moved(R, t, position, i)
            if z <= 1e-9:
                continue
            left, right, top, bottom, reach = _square(camera, x, y, z, DRAWN * radius[i], near.shape)
            if right <= left or bottom <= top:
                continue
            nx, ny, nz = _turned(R, normal[i, 0], normal[i, 1], normal[i, 2])
            offset = nx * x + ny * y + nz * z
            if offset >= 0:
                continue
            for v in range(top, bottom):
                for u in range(left, right):
                    along = nx * (u - camera[2]) / camera[0] + ny * (v - camera[3]) / camera[1] + nz
                    depth = offset / along if along < -0.1 else z
                    depth = min(max(depth, z - reach), z + reach)
                    if depth <= 0:
                        continue
                    if second == 0:
                        if near[v, u] == 0 or depth < near[v, u]:
                            near[v, u] = depth
                    elif depth <= near[v, u] + slab:
                        total[v, u] += weight[i] * depth
                        mass[v, u] += weight[i]


@jit
def _square(
    camera: Float, x: float, y: float, z: float, side: float, shape: tuple[int, int]
) -> tuple[int, int, int, int, float]:
    """Columns and rows that a square of half side `side` covers, ends excluded, and how far its plane is trusted to
    tilt from z."""
    u, v = camera[0] * x / z + camera[2], camera[1] * y / z + camera[3]
    ru, rv = max(side / z * camera[0], 0.5), max(side / z * camera[1], 0.5)
    left, right = max(np.ceil(u - ru), 0.0), min(np.floor(u + ru), shape[1] - 1.0) + 1
    top, bottom = max(np.ceil(v - rv), 0.0), min(np.floor(v + rv), shape[0] - 1.0) + 1
    return int(left), int(right), int(top), int(bottom), 3 * ru * z / camera[0]


@jit
def _turned(R: Float, x: float, y: float, z: float) -> Triple:
    return (
        R[0, 0] * x + R[0, 1] * y + R[0, 2] * z,
        R[1, 0] * x + R[1, 1] * y + R[1, 2] * z,
        R[2, 0] * x + R[2, 1] * y + R[2, 2] * z,
    )


@jit
def _moved(R: Float, t: Float, points: Float32, i: int) -> Triple:
    x, y, z = _turned(R, points[i, 0], points[i, 1], points[i, 2])
    return x + t[0], y + t[1], z + t[2]


@jit
def _pixel(camera: Float, x: float, y: float, z: float, shape: tuple[int, int]) -> tuple[int, int]:
    """The pixel that a point in the camera frame falls on, (-1, -1) where there is none."""
    if z <= 1e-9:
        return -1, -1
    u, v = camera[0] * x / z + camera[2] + 0.5, camera[1] * y / z + camera[3] + 0.5
    if not (0 <= u < shape[1] and 0 <= v < shape[0]):
        return -1, -1
    return int(u), int(v)


@jit
def _average(
    i: int, position: Float32, normal: Float32, R: Float, part: float, held: Triple, measured: Triple, along: float
) -> None:
    """Move a surfel its share of `along` its own normal and turn that; held, measured: normals in the camera frame."""
    step = part * along
    x, y, z = held
    x, y, z = x + part * (measured[0] - x), y + part * (measured[1] - y), z + part * (measured[2] - z)
    length = np.sqrt(x * x + y * y + z * z)
    for a in range(3):
        position[i, a] += step * normal[i, a]
        normal[i, a] = (R[0, a] * x + R[1, a] * y + R[2, a] * z) / length


@jit
def _cube(x: float, y: float, z: float) -> int:
    """A key for an integer cube; 21 bits an axis, which distinguishes what one camera can see at once."""
    low = (1 << 21) - 1
    a, b, c = int(np.floor(x)) & low, int(np.floor(y)) & low, int(np.floor(z)) & low
    key = (a << 42) | (b << 21) | c
    return key


@jit
def _no_cubes(most: int) -> Int64:
    """An empty hash set of cubes, -1 where there is none, at most half full with so many."""
    length = 2
    while length < 2 * most:
        length *= 2
    return np.full(length, -1, np.int64)


@jit
def _slot(key: int, cubes: Int64) -> int:
    """Where the key is in the hash set, or would be."""
    mask = len(cubes) - 1
    slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while cubes[slot] != -1 and cubes[slot] != key:
        slot = (slot + 1) & mask
    return int(slot)


@jit
def normal_at(depth: DepthImage, u: int, v: int, base: int, camera: Float, floor: float, share: float) -> Triple:
    """Unit normal in the camera frame, towards the camera, from pixels `base` away on both sides, or on one where the
    other is missing or beyond a jump in depth of max(floor, share*z); (0, 0, 0) where there is none."""
    z = depth[v, u]
    jump = max(floor, share * z)
    u0 = u - base if u >= base and _beside(depth[v, u - base], z, jump) else u
    u1 = u + base if u + base < depth.shape[1] and _beside(depth[v, u + base], z, jump) else u
    v0 = v - base if v >= base and _beside(depth[v - base, u], z, jump) else v
    v1 = v + base if v + base < depth.shape[0] and _beside(depth[v + base, u], z, jump) else v
    across, down = (depth[v, u0], depth[v, u1]), (depth[v0, u], depth[v1, u])
    # a single return: with several, the references to the arrays would be counted, atomically, for every pixel
    return _normal(u, v, u0, u1, v0, v1, across, down, camera[0], camera[1], camera[2], camera[3])


@jit
def _normal(
    u: int, v: int, u0: int, u1: int, v0: int, v1: int, across: Pair, down: Pair, fx: float, fy: float, cx: float,
    cy: float,
) -> Triple:  # fmt: skip
    """The normal at pixel (u, v) from the depths at columns u0, u1 of its row and at rows v0, v1 of its column."""
    if u0 == u1 or v0 == v1:
        return 0.0, 0.0, 0.0
    x, y = (u - cx) / fx, (v - cy) / fy
    a, b = across
    ax, az = (b * (u1 - cx) - a * (u0 - cx)) / fx, b - a
    ay = az * y
    a, b = down
    by, bz = (b * (v1 - cy) - a * (v0 - cy)) / fy, b - a
    bx = bz * x
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    if length < 1e-20:
        return 0.0, 0.0, 0.0
    if nx * x + ny * y + nz > 0:
        length = -length
    return nx / length, ny / length, nz / length


@jit
def _beside(depth: float, z: float, jump: float) -> bool:
    return depth > 0 and abs(depth - z) <= jump
