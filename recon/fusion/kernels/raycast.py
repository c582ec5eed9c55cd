"""Depth from a truncated signed distance field, read where Open3D keeps it.

Open3D's own `VoxelBlockGrid.ray_cast` places tilted surfaces more than one voxel too far and differs from call to call.
Here each ray walks the blocks (empty ones in one step), finds the change of sign on nearest voxels and then solves for
the zero of the trilinear interpolant, as the mesh of the same field would have it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.fusion.kernels import jit
from recon.fusion.kernels.blocks import CLUSTER, SIDE, pack, slot_of
from recon.geometry.views import DepthImage

Float = NDArray[np.float64]
Field = NDArray[np.float32]
Weight = NDArray[np.uint16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


_CLOSE = 2e-3  # of the truncation: under a hundredth of a voxel
_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def render(out: DepthImage, *arguments: Any) -> None:
    """`cast_depth` over the rows of `out`, interleaved among up to four threads; the result does not depend on them."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(cast_depth, out, i, _THREADS, *arguments) for i in range(_THREADS)]:
            done.result()


@jit
def cast_depth(
    out: DepthImage,
    first: int,
    every: int,
    camera: Float,
    R: Float,
    t: Float,
    voxel: float,
    reach: float,
    least: int,
    low: Float,
    high: Float,
    clusters: Int64,
    keys: Int64,
    rows: Int32,
    tsdf: Field,
    weight: Weight,
) -> None:
    """Fills every `every`-th row of `out` [height,width] with z-depth, 0 where a ray meets no surface.

    R, t: T_world_cam. reach: truncation in voxels. least: observations that every corner of the interpolation needs.
    low, high: corners of the map in voxels. clusters, keys, rows: block index. tsdf, weight: [rows,512], x fastest.
    """
    origin = t / voxel
    ray = np.empty(3)
    for v in range(first, out.shape[0], every):
        for u in range(out.shape[1]):
            x, y = (u - camera[2]) / camera[0], (v - camera[3]) / camera[1]
            for a in range(3):
                ray[a] = (R[a, 0] * x + R[a, 1] * y + R[a, 2]) / voxel
            begin, end = _span(origin, ray, low, high)
            out[v, u] = _march(origin, ray, begin, end, reach, least, clusters, keys, rows, tsdf, weight)


@jit
def _span(origin: Float, ray: Float, low: Float, high: Float) -> tuple[float, float]:
    begin, end = 0.0, np.inf
    for a in range(3):
        if ray[a] == 0:
            if origin[a] < low[a] or origin[a] > high[a]:
                return 1.0, 0.0
        else:
            p, q = (low[a] - origin[a]) / ray[a], (high[a] - origin[a]) / ray[a]
            begin, end = max(begin, min(p, q)), min(end, max(p, q))
    return begin, end


@jit
def _march(
    origin: Float,
    ray: Float,
    begin: float,
    end: float,
    reach: float,
    least: int,
    clusters: Int64,
    keys: Int64,
    rows: Int32,
    tsdf: Field,
    weight: Weight,
) -> float:
    ox, oy, oz = origin[0] + 0.5, origin[1] + 0.5, origin[2] + 0.5  # so that floor() gives the nearest voxel
    dx, dy, dz = ray[0], ray[1], ray[2]
    one = 1.0 / np.sqrt(dx * dx + dy * dy + dz * dz)  # depth per voxel of path
    ix, iy, iz = _reciprocal(dx), _reciprocal(dy), _reciprocal(dz)
    s, before = begin + 1e-3 * one, -1.0
    current = row = -1
    while s < end:
        px, py, pz = ox + s * dx, oy + s * dy, oz + s * dz
        vx, vy, vz = int(np.floor(px)), int(np.floor(py)), int(np.floor(pz))
        key = pack(vx >> 3, vy >> 3, vz >> 3)
        if key != current:
            current = key
            slot = slot_of(keys, key)
            row = rows[slot] if keys[slot] == key else -1
        if row < 0:
            far = pack(vx >> 3 >> CLUSTER, vy >> 3 >> CLUSTER, vz >> 3 >> CLUSTER)
            side = SIDE if clusters[slot_of(clusters, far)] == far else SIDE << CLUSTER
            leave = min(_leave(px, vx, side, ix), _leave(py, vy, side, iy), _leave(pz, vz, side, iz))
            s, before = s + leave + 1e-3 * one, -1.0
            continue
        at = ((vz & 7) * SIDE + (vy & 7)) * SIDE + (vx & 7)
        value = tsdf[row, at]
        if value > 0:  # observed, then; whether often enough is found out at the zero
            before = s
            s += one * max(1.0, 0.8 * reach * value)
            continue
        if before >= 0 and weight[row, at] >= least:
            hit = _solve(origin, ray, before, s, one, least, keys, rows, tsdf, weight)
            if hit > 0:
                return hit
        s, before = s + 2 * one, -1.0  # behind a surface or never observed: no crossing before free space is met
    return 0.0


@jit
def _reciprocal(d: float) -> float:
    return 1.0 / d if abs(d) > 1e-30 else 1e30


@jit
def _leave(p: float, voxel: int, side: int, reciprocal: float) -> float:
    """Depth until coordinate p, in that voxel, leaves its cell of that side (a power of two) along a ray."""
    low = voxel & ~(side - 1)
    edge = low + side if reciprocal > 0 else low
    leave: float = (edge - p) * reciprocal
    return leave


@jit
def _solve(
    origin: Float,
    ray: Float,
    near: float,
    far: float,
    one: float,
    least: int,
    keys: Int64,
    rows: Int32,
    tsdf: Field,
    weight: Weight,
) -> float:
    """Zero of the interpolant around [near, far], which nearest voxels bracket; 0 when it has none there."""
    at_near = _trilinear(origin, ray, near, least, keys, rows, tsdf, weight)
    for _ in range(2):
        if at_near > 0 or np.isnan(at_near):
            break
        far, near = near, near - one
        at_near = _trilinear(origin, ray, near, least, keys, rows, tsdf, weight)
    at_far = _trilinear(origin, ray, far, least, keys, rows, tsdf, weight)
    for _ in range(2):
        if at_far <= 0 or np.isnan(at_far):
            break
        near, at_near, far = far, at_far, far + one
        at_far = _trilinear(origin, ray, far, least, keys, rows, tsdf, weight)
    if not (at_near > 0 and at_far <= 0):  # also where a corner was never observed: the mesh has no surface there
        return 0.0
    for _ in range(4):
        middle = near + (far - near) * at_near / (at_near - at_far)
        value = _trilinear(origin, ray, middle, least, keys, rows, tsdf, weight)
        if np.isnan(value) or abs(value) < _CLOSE:
            return middle
        if value > 0:
            near, at_near = middle, value
        else:
            far, at_far = middle, value
    return near + (far - near) * at_near / (at_near - at_far)


@jit
def _trilinear(
    origin: Float, ray: Float, s: float, least: int, keys: Int64, rows: Int32, tsdf: Field, weight: Weight
) -> float:
    """The field at depth s, NaN unless all eight voxels around have `least` observations."""
    px, py, pz = origin[0] + s * ray[0], origin[1] + s * ray[1], origin[2] + s * ray[2]
    ix, iy, iz = int(np.floor(px)), int(np.floor(py)), int(np.floor(pz))
    fx, fy, fz = px - ix, py - iy, pz - iz
    total = 0.0
    if (ix & 7) < 7 and (iy & 7) < 7 and (iz & 7) < 7:  # mostly, all corners lie in one block
        key = pack(ix >> 3, iy >> 3, iz >> 3)
        slot = slot_of(keys, key)
        if keys[slot] != key or rows[slot] < 0:
            return np.nan
        inside, w = rows[slot], weight[rows[slot]]
        at = ((iz & 7) * SIDE + (iy & 7)) * SIDE + (ix & 7)
        for corner in range(8):
            a = at + (corner & 1) + ((corner >> 1) & 1) * SIDE + (corner >> 2) * SIDE * SIDE
            if w[a] < least:
                return np.nan
            share = (fx if corner & 1 else 1 - fx) * (fy if corner & 2 else 1 - fy) * (fz if corner & 4 else 1 - fz)
            total += share * tsdf[inside, a]
        return total
    current = row = -1
    for corner in range(8):
        x, y, z = ix + (corner & 1), iy + ((corner >> 1) & 1), iz + (corner >> 2)
        key = pack(x >> 3, y >> 3, z >> 3)
        if key != current:
            current = key
            slot = slot_of(keys, key)
            row = rows[slot] if keys[slot] == key else -1
        if row < 0:
            return np.nan
        at = ((z & 7) * SIDE + (y & 7)) * SIDE + (x & 7)
        if weight[row, at] < least:
            return np.nan
        share = (fx if corner & 1 else 1 - fx) * (fy if corner & 2 else 1 - fy) * (fz if corner & 4 else 1 - fz)
        total += share * tsdf[row, at]
    return total
