"""Surfel loops: every visible surfel reads its pixel, uncovered pixels spawn, and the map is splatted into a z-buffer.

A surfel is a row of the arrays that `recon.fusion.surfel.SurfelMap` holds. Rows keep their order, so a map is the same
bytes for the same input. World to camera is R, t (T_cam_world); camera is (fx, fy, cx, cy).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon.fusion.kernels import jit
from recon.geometry.views import DepthImage, Image

Float = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

DRAWN = 0.67  # share of its side at which a surfel is drawn: whole squares hang over silhouettes
FACING = 0.5  # cosine of 60 degrees: normals further apart are different surfaces


@jit
def normal_at(
    depth: DepthImage, u: int, v: int, base: int, camera: Float, floor: float, share: float
) -> tuple[float, float, float]:
    """Unit normal in the camera frame, towards the camera, from pixels `base` away on both sides, or on one where the
    other is missing or beyond a jump in depth of max(floor, share*z); (0, 0, 0) where there is none."""
    z = depth[v, u]
    jump = max(floor, share * z)
    u0 = u - base if u >= base and abs(depth[v, u - base] - z) <= jump else u
    u1 = u + base if u + base < depth.shape[1] and abs(depth[v, u + base] - z) <= jump else u
    v0 = v - base if v >= base and abs(depth[v - base, u] - z) <= jump else v
    v1 = v + base if v + base < depth.shape[0] and abs(depth[v + base, u] - z) <= jump else v
    if u0 == u1 or v0 == v1:
        return 0.0, 0.0, 0.0
    x, y = (u - camera[2]) / camera[0], (v - camera[3]) / camera[1]
    a, b = depth[v, u0], depth[v, u1]
    ax, az = (b * (u1 - camera[2]) - a * (u0 - camera[2])) / camera[0], b - a
    ay = az * y
    a, b = depth[v0, u], depth[v1, u]
    by, bz = (b * (v1 - camera[3]) - a * (v0 - camera[3])) / camera[1], b - a
    bx = bz * x
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    if length < 1e-20:
        return 0.0, 0.0, 0.0
    if nx * x + ny * y + nz > 0:
        length = -length
    return nx / length, ny / length, nz / length


@jit
def gather(
    n: int,
    position: Float32,
    normal: Float32,
    color: Float32,
    radius: Float32,
    weight: Float32,
    last: Int32,
    violations: UInt8,
    depth: DepthImage,
    image: Image,
    camera: Float,
    R: Float,
    t: Float,
    base: int,
    floor: float,
    share: float,
    unit: float,
    cap: float,
    frame: int,
    patience: int,
    stale: int,
    light: float,
    covered: UInt8,
) -> int:
    """Merge a frame into the surfels it sees; returns how many have died (weight 0).

    Gate |dz| <= max(floor, share*z). A surfel moves along its own normal only; an observation weighs (unit/z)^2.
    `covered` is set where a surfel explains the pixel.
    """
    height, width = depth.shape
    dead = 0
    for i in range(n):
        if weight[i] < light and frame - last[i] > stale:
            weight[i] = 0.0
            dead += 1
            continue
        px, py, pz = position[i, 0], position[i, 1], position[i, 2]
        z = R[2, 0] * px + R[2, 1] * py + R[2, 2] * pz + t[2]
        if z <= 1e-9:
            continue
        x = R[0, 0] * px + R[0, 1] * py + R[0, 2] * pz + t[0]
        y = R[1, 0] * px + R[1, 1] * py + R[1, 2] * pz + t[1]
        fu, fv = camera[0] * x / z + camera[2] + 0.5, camera[1] * y / z + camera[3] + 0.5
        if not (0 <= fu < width and 0 <= fv < height):
            continue
        u, v = int(fu), int(fv)
        seen = depth[v, u]
        if seen <= 0:
            continue
        gate = max(floor, share * z)
        if seen < z - gate:
            continue  # hidden
        if seen > z + gate:
            violations[i] += 1
            if violations[i] >= patience:
                weight[i] = 0.0
                dead += 1
            continue
        violations[i] = 0
        nx, ny, nz = normal_at(depth, u, v, base, camera, floor, share)
        sx, sy, sz = normal[i, 0], normal[i, 1], normal[i, 2]
        cx = R[0, 0] * sx + R[0, 1] * sy + R[0, 2] * sz
        cy = R[1, 0] * sx + R[1, 1] * sy + R[1, 2] * sz
        cz = R[2, 0] * sx + R[2, 1] * sy + R[2, 2] * sz
        if nx * cx + ny * cy + nz * cz < FACING:
            continue
        w = (unit / seen) ** 2
        part = w / (weight[i] + w)
        step = part * (
            cx * (seen * (u - camera[2]) / camera[0] - x)
            + cy * (seen * (v - camera[3]) / camera[1] - y)
            + cz * (seen - z)
        )
        cx, cy, cz = cx + part * (nx - cx), cy + part * (ny - cy), cz + part * (nz - cz)
        length = np.sqrt(cx * cx + cy * cy + cz * cz)
        for a in range(3):
            position[i, a] += step * normal[i, a]
            normal[i, a] = (R[0, a] * cx + R[1, a] * cy + R[2, a] * cz) / length
            color[i, a] += part * (image[v, u, a] - color[i, a])
        weight[i] = min(weight[i] + w, cap)
        last[i] = frame
        _cover(covered, depth, u, v, int(radius[i] * camera[0] / z), z, gate)
    return dead


@jit
def _cover(covered: UInt8, depth: DepthImage, u: int, v: int, half: int, z: float, gate: float) -> None:
    for vv in range(max(v - half, 0), min(v + half + 1, depth.shape[0])):
        for uu in range(max(u - half, 0), min(u + half + 1, depth.shape[1])):
            if abs(depth[vv, uu] - z) <= gate:
                covered[vv, uu] = 1


@jit
def spawn(
    n: int,
    position: Float32,
    normal: Float32,
    color: Float32,
    radius: Float32,
    weight: Float32,
    depth: DepthImage,
    image: Image,
    camera: Float,
    R: Float,
    t: Float,
    base: int,
    floor: float,
    share: float,
    unit: float,
    cap: float,
    spacing: float,
    size: float,
    covered: UInt8,
    seeds: Int64,
    stamps: Int32,
    tick: int,
) -> int:
    """New surfels for uncovered pixels, one per cube of side `spacing`, in scan order from row n; returns their end.

    R, t: T_world_cam. seeds, stamps: hash set of cubes, valid where stamps equals tick. Returns -1 when the arrays or
    the set are too small: grow both and repeat.
    """
    mask = len(seeds) - 1
    start = n
    for v in range(depth.shape[0]):
        for u in range(depth.shape[1]):
            z = depth[v, u]
            if z <= 0 or covered[v, u]:
                continue
            x, y = z * (u - camera[2]) / camera[0], z * (v - camera[3]) / camera[1]
            px = R[0, 0] * x + R[0, 1] * y + R[0, 2] * z + t[0]
            py = R[1, 0] * x + R[1, 1] * y + R[1, 2] * z + t[1]
            pz = R[2, 0] * x + R[2, 1] * y + R[2, 2] * z + t[2]
            key = _cube(px / spacing, py / spacing, pz / spacing)
            slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
            while stamps[slot] == tick and seeds[slot] != key:
                slot = (slot + 1) & mask
            if stamps[slot] == tick:
                continue
            nx, ny, nz = normal_at(depth, u, v, base, camera, floor, share)
            if nx == 0 and ny == 0 and nz == 0:
                continue  # another pixel of the cube may do
            if n >= len(weight) or 2 * (n - start + 1) > len(seeds):
                return -1
            seeds[slot], stamps[slot] = key, tick
            position[n, 0], position[n, 1], position[n, 2] = px, py, pz
            for a in range(3):
                normal[n, a] = R[a, 0] * nx + R[a, 1] * ny + R[a, 2] * nz
                color[n, a] = image[v, u, a]
            radius[n] = size * max(spacing, z / camera[0])
            weight[n] = min((unit / z) ** 2, cap)
            n += 1
    return n


@jit
def _cube(x: float, y: float, z: float) -> int:
    """A key for an integer cube; 21 bits an axis, which distinguishes what one camera can see at once."""
    low = (1 << 21) - 1
    a, b, c = int(np.floor(x)) & low, int(np.floor(y)) & low, int(np.floor(z)) & low
    key = (a << 42) | (b << 21) | c
    return key


@jit
def keep_living(
    n: int,
    position: Float32,
    normal: Float32,
    color: Float32,
    radius: Float32,
    weight: Float32,
    first: Int32,
    last: Int32,
    violations: UInt8,
) -> int:
    """Move living rows to the front in place, in order; returns their number."""
    count = 0
    for i in range(n):
        if weight[i] > 0:
            if count < i:
                for a in range(3):
                    position[count, a], normal[count, a], color[count, a] = position[i, a], normal[i, a], color[i, a]
                radius[count], weight[count], first[count] = radius[i], weight[i], first[i]
                last[count], violations[count] = last[i], violations[i]
            count += 1
    return count


@jit
def splat(
    n: int,
    position: Float32,
    normal: Float32,
    radius: Float32,
    weight: Float32,
    camera: Float,
    R: Float,
    t: Float,
    slab: float,
    near: Float32,
    total: Float32,
    mass: Float32,
) -> None:
    """Depth of the surfels as squares on the image, each a tilted plane; back faces are left out.

    Two passes: `near` [H,W] gets the nearest depth, then `total` and `mass` the weighted sum of all planes within
    `slab` behind it, because the nearest of many noisy surfels is biased towards the camera.
    """
    height, width = near.shape
    for second in range(2):
        for i in range(n):
            px, py, pz = position[i, 0], position[i, 1], position[i, 2]
            z = R[2, 0] * px + R[2, 1] * py + R[2, 2] * pz + t[2]
            if z <= 1e-9:
                continue
            x = R[0, 0] * px + R[0, 1] * py + R[0, 2] * pz + t[0]
            y = R[1, 0] * px + R[1, 1] * py + R[1, 2] * pz + t[1]
            u, v = camera[0] * x / z + camera[2], camera[1] * y / z + camera[3]
            side = DRAWN * radius[i] / z
            ru, rv = max(side * camera[0], 0.5), max(side * camera[1], 0.5)
            if u + ru < 0 or v + rv < 0 or u - ru > width - 1 or v - rv > height - 1:
                continue
            sx, sy, sz = normal[i, 0], normal[i, 1], normal[i, 2]
            nx = R[0, 0] * sx + R[0, 1] * sy + R[0, 2] * sz
            ny = R[1, 0] * sx + R[1, 1] * sy + R[1, 2] * sz
            nz = R[2, 0] * sx + R[2, 1] * sy + R[2, 2] * sz
            offset = nx * x + ny * y + nz * z
            if offset >= 0:
                continue
            reach = 3 * ru * z / camera[0]  # how far its plane is trusted to tilt
            for vv in range(max(int(np.ceil(v - rv)), 0), min(int(np.floor(v + rv)), height - 1) + 1):
                for uu in range(max(int(np.ceil(u - ru)), 0), min(int(np.floor(u + ru)), width - 1) + 1):
                    along = nx * (uu - camera[2]) / camera[0] + ny * (vv - camera[3]) / camera[1] + nz
                    depth = offset / along if along < -0.1 else z
                    depth = min(max(depth, z - reach), z + reach)
                    if depth <= 0:
                        continue
                    if second == 0:
                        if near[vv, uu] == 0 or depth < near[vv, uu]:
                            near[vv, uu] = depth
                    elif depth <= near[vv, uu] + slab:
                        total[vv, uu] += weight[i] * depth
                        mass[vv, uu] += weight[i]
