"""Blocks of 8x8x8 voxels: an index from block coordinate to buffer row, and which blocks one frame concerns.

The index is an open-addressing hash table in two arrays, `keys` (packed coordinates, -1 = free) and `rows`. It is
what lets the ray caster walk Open3D's buffers, and it spares one of Open3D's own look-ups per frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon.fusion.kernels import jit
from recon.geometry.views import DepthImage

Float = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

REACH = 1 << 20  # block coordinates lie in [-REACH, REACH): 21 bits each
SIDE = 8
CLUSTER = 2  # clusters of (2^CLUSTER)^3 blocks let rays pass empty space in longer steps
_FREE = -1
_PENDING = -2  # row of a block that this frame has found and that has no buffer yet


@jit
def pack(x: int, y: int, z: int) -> int:
    """One integer for a block coordinate."""
    return ((x + REACH) << 42) | ((y + REACH) << 21) | (z + REACH)


@jit
def unpack(packed: Int64) -> Int32:
    """[N,3] block coordinates of packed keys."""
    out = np.empty((len(packed), 3), np.int32)
    for i in range(len(packed)):
        out[i, 0] = (packed[i] >> 42) - REACH
        out[i, 1] = ((packed[i] >> 21) & (2 * REACH - 1)) - REACH
        out[i, 2] = (packed[i] & (2 * REACH - 1)) - REACH
    return out


@jit
def slot_of(keys: Int64, key: int) -> int:
    """Where `key` is, or the free slot where it belongs. len(keys) is a power of two, at most half used."""
    mask = len(keys) - 1
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    slot = int(mixed >> np.uint64(32)) & mask
    while keys[slot] != _FREE and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@jit
def insert(keys: Int64, rows: Int32, coordinates: Int32, buffer_rows: Int64) -> None:
    """Set the buffer row of each coordinate [N,3]."""
    for i in range(len(coordinates)):
        key = pack(coordinates[i, 0], coordinates[i, 1], coordinates[i, 2])
        slot = slot_of(keys, key)
        keys[slot] = key
        rows[slot] = buffer_rows[i]


@jit
def extent(coordinates: Int32, active: Int32) -> tuple[Float, Float]:
    """Lowest and highest coordinates [3] of the active rows."""
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for i in range(len(active)):
        for a in range(3):
            low[a], high[a] = min(low[a], coordinates[active[i], a]), max(high[a], coordinates[active[i], a])
    return low, high


@jit
def mark_clusters(clusters: Int64, coordinates: Int32) -> None:
    """Add the clusters of block coordinates [N,3] to the set `clusters`."""
    for i in range(len(coordinates)):
        x, y, z = coordinates[i, 0] >> CLUSTER, coordinates[i, 1] >> CLUSTER, coordinates[i, 2] >> CLUSTER
        key = pack(x, y, z)
        clusters[slot_of(clusters, key)] = key


@jit
def find(keys: Int64, rows: Int32, coordinates: Int32) -> Int32:
    """Buffer rows of coordinates [N,3] that are in the table."""
    out = np.empty(len(coordinates), np.int32)
    for i in range(len(coordinates)):
        out[i] = rows[slot_of(keys, pack(coordinates[i, 0], coordinates[i, 1], coordinates[i, 2]))]
    return out


@jit
def touch(
    depth: DepthImage,
    camera: Float,
    R: Float,
    t: Float,
    reach: float,
    block: float,
    stride: int,
    keys: Int64,
    rows: Int32,
    used: int,
    stamps: Int32,
    tick: int,
    known: Int32,
    fresh: Int64,
) -> tuple[int, int]:
    """Blocks within `reach` of the measured surface along every `stride`-th ray, each once.

    Rows of blocks that exist go to `known`, packed keys of the others to `fresh`; returns both counts. `stamps` holds,
    for each row, the last tick it was listed at. Returns (-1, -1) when the table is too full: grow it and repeat.
    """
    n_known = n_fresh = 0
    for v in range(stride // 2, depth.shape[0], stride):
        for u in range(stride // 2, depth.shape[1], stride):
            z = depth[v, u]
            if z <= 0:
                continue
            x, y = (u - camera[2]) / camera[0], (v - camera[3]) / camera[1]
            dx = (R[0, 0] * x + R[0, 1] * y + R[0, 2]) / block
            dy = (R[1, 0] * x + R[1, 1] * y + R[1, 2]) / block
            dz = (R[2, 0] * x + R[2, 1] * y + R[2, 2]) / block
            last = -1
            for step in range(-2, 3):
                s = max(z + 0.5 * step * reach, 0.0)
                key = pack(
                    int(np.floor(t[0] / block + s * dx)),
                    int(np.floor(t[1] / block + s * dy)),
                    int(np.floor(t[2] / block + s * dz)),
                )
                if key == last:
                    continue
                last = key
                slot = slot_of(keys, key)
                if keys[slot] == _FREE:
                    if 2 * (used + n_fresh + 1) > len(keys):
                        return -1, -1
                    keys[slot] = key
                    rows[slot] = _PENDING
                    fresh[n_fresh] = key
                    n_fresh += 1
                elif rows[slot] >= 0 and stamps[rows[slot]] != tick:
                    stamps[rows[slot]] = tick
                    known[n_known] = rows[slot]
                    n_known += 1
    return n_known, n_fresh


@jit
def in_view(
    coordinates: Int32,
    active: Int32,
    depth: DepthImage,
    camera: Float,
    R: Float,
    t: Float,
    block: float,
    stamps: Int32,
    tick: int,
    known: Int32,
    n_known: int,
) -> int:
    """Adds the active blocks that the camera sees through; returns the new count.

    A block counts when everything measured around it lies more than one block behind its centre: at silhouettes, where
    poses and edges are least certain, nothing is worn away. R, t: T_cam_world. Blocks listed at this tick already are
    left alone.
    """
    for i in range(len(active)):
        row = active[i]
        if stamps[row] == tick:
            continue
        x = (coordinates[row, 0] + 0.5) * block
        y = (coordinates[row, 1] + 0.5) * block
        z = (coordinates[row, 2] + 0.5) * block
        cz = R[2, 0] * x + R[2, 1] * y + R[2, 2] * z + t[2]
        if cz <= 0:
            continue
        cx = R[0, 0] * x + R[0, 1] * y + R[0, 2] * z + t[0]
        cy = R[1, 0] * x + R[1, 1] * y + R[1, 2] * z + t[1]
        u = int(np.floor(camera[0] * cx / cz + camera[2] + 0.5))
        v = int(np.floor(camera[1] * cy / cz + camera[3] + 0.5))
        half = int(camera[0] * 0.7 * block / cz) + 1  # pixels from its centre to beyond its sides
        if _is_free(depth, u, v, half, cz + block):
            stamps[row] = tick
            known[n_known] = row
            n_known += 1
    return n_known


@jit
def _is_free(depth: DepthImage, u: int, v: int, half: int, nearest: float) -> bool:
    """Whether the pixel sees beyond `nearest`, and none of the eight around it at distance `half` something nearer."""
    if not (0 <= u < depth.shape[1] and 0 <= v < depth.shape[0] and depth[v, u] > nearest):
        return False
    for dv in range(-half, half + 1, half):
        for du in range(-half, half + 1, half):
            uu, vv = u + du, v + dv
            if 0 <= uu < depth.shape[1] and 0 <= vv < depth.shape[0] and 0 < depth[vv, uu] <= nearest:
                return False
    return True


@jit
def cap_weights(weight: NDArray[np.uint16], listed: Int32, cap: int) -> None:
    """Clip the weights [rows,512] of the listed rows, so that new observations keep their say."""
    for i in range(len(listed)):
        row = listed[i]
        for j in range(weight.shape[1]):
            if weight[row, j] > cap:
                weight[row, j] = cap


@jit
def quantise(depth: DepthImage, scale: float) -> NDArray[np.uint16]:
    """round(depth * scale); the caller keeps depth * scale within 65535."""
    out = np.empty(depth.shape, np.uint16)
    for v in range(depth.shape[0]):
        for u in range(depth.shape[1]):
            out[v, u] = np.uint16(depth[v, u] * scale + 0.5)
    return out
