"""Open3D's VoxelBlockGrid with tight memory, an index that NumPy code can read, and extraction in a fixed order."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.fusion.kernels import blocks
from recon.fusion.kernels.depth import pinhole, rigid
from recon.geometry.cameras import invert
from recon.geometry.views import Array, DepthImage, Image
from recon.optional import open3d

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
UInt8 = NDArray[np.uint8]

_ATTRIBUTES = ("tsdf", "weight", "color")
_SLACK, _GROWTH = 1.08, 1.25  # capacity over used blocks: grown to _GROWTH when it falls below _SLACK
_LEVELS = 65535


class BlockGrid:
    """Blocks of 8^3 voxels, float32 distance, uint16 weight and colour: 12 bytes a voxel.

    `tsdf`, `weight` [capacity,512], `color` [capacity,512,3] and `coordinates` [capacity,3] are views of Open3D's own
    buffers; `keys` and `rows` index them (see kernels.blocks). Rows of blocks in use are `active`.
    """

    def __init__(self, voxel: float) -> None:
        self.o3d = open3d()
        self.voxel = voxel
        self.block = voxel * blocks.SIDE
        self.frames = 0
        self.active: Int32 = np.empty(0, np.int32)
        self._grid = self._new(8)
        self._adopt()
        # Open3D ends the process with status 1 if a tensor outlives the interpreter: one does where somebody (a
        # debugger, a profiler) still holds a frame that holds this grid. So what it has is let go of at exit.
        weakref.finalize(self, vars(self).clear)

    @property
    def size(self) -> int:
        """Blocks in use."""
        return len(self.active)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers at capacity, of the keys and of the index."""
        buffers = self.tsdf.nbytes + self.weight.nbytes + self.color.nbytes + self.coordinates.nbytes
        return int(buffers + self.keys.nbytes + self.rows.nbytes + self.clusters.nbytes + self._stamps.nbytes)

    def corners(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest corner of the blocks in use, in voxels."""
        low, high = blocks.extent(self.coordinates, self.active)
        return low * blocks.SIDE - 0.5, (high + 1) * blocks.SIDE - 0.5

    def blocks_of(self, depth: DepthImage, K: Array, T_world_cam: Array, truncation: float, carve: bool) -> Int32:
        """Rows of the blocks near the measured surface, made where missing; with `carve` also of those seen through."""
        camera, (R, t) = pinhole(K), rigid(T_world_cam)
        stride = max(1, round(depth.shape[1] / 160))
        reach = truncation * self.voxel
        while True:
            self.frames += 1
            known = np.empty(self.size, np.int32)
            fresh = np.empty(len(self.keys), np.int64)
            n_known, n_fresh = blocks.touch(
                depth, camera, R, t, reach, self.block, stride, self.keys, self.rows, self.size, self._stamps,
                self.frames, known, fresh,
            )  # fmt: skip
            if n_known >= 0:
                break
            self._index(2 * len(self.keys))
        if carve and self.size:
            R, t = rigid(invert(T_world_cam))
            n_known = blocks.in_view(
                self.coordinates, self.active, depth, camera, R, t, self.block, self._stamps, self.frames, known,
                n_known,
            )  # fmt: skip
        if not n_fresh:
            return known[:n_known]
        kept = self.coordinates[known[:n_known]]
        self._activate(blocks.unpack(fresh[:n_fresh]))
        return np.concatenate([self._rows_of(kept), self.active[-n_fresh:]])

    def cap(self, listed: Int32, cap: int) -> None:
        """Clip weights before a frame is added. Without it they would wrap at 65536 and the surface be forgotten."""
        if self.frames > cap:
            blocks.cap_weights(self.weight, listed, cap)

    def integrate(
        self,
        listed: Int32,
        depth: DepthImage,
        image: Image,
        K: Array,
        T_world_cam: Array,
        max_depth: float,
        truncation: float,
    ) -> None:
        """Average one frame into the listed blocks."""
        core, scale = self.o3d.core, _LEVELS / max_depth
        intrinsics = np.array(K, np.float64)
        intrinsics[:2, 2] += 0.5  # Open3D has pixel centres at +0.5
        intrinsics, extrinsics = core.Tensor(intrinsics), core.Tensor(invert(T_world_cam))
        depth_image = self.o3d.t.geometry.Image(blocks.quantise(depth, scale))
        color_image = self.o3d.t.geometry.Image(np.ascontiguousarray(image))
        coordinates = np.ascontiguousarray(self.coordinates[listed])
        # Open3D doubles the capacity unless size + blocks passed fits, even when all of them exist
        chunk = self.capacity - self.size
        for first in range(0, len(coordinates), chunk):
            self._grid.integrate(
                core.Tensor(coordinates[first : first + chunk]),
                depth_image,
                color_image,
                intrinsics,
                extrinsics,
                float(scale),
                float(max_depth) * 1.001,
                float(truncation),
            )

    def extract_points(self, least: int) -> tuple[Float32, Float32, UInt8]:
        """Positions and unit normals [N,3], colours [N,3], sorted by position."""
        if not self.size:
            return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
        cloud = self._grid.extract_point_cloud(least - 0.5).point  # its threshold is strict
        positions, normals = cloud.positions.numpy(), cloud.normals.numpy()
        colors = _bytes(cloud.colors.numpy())
        order = _order(positions)
        return positions[order], normals[order], colors[order]

    def extract_mesh(self, least: int) -> tuple[Float32, Int32, UInt8]:
        """Vertices [V,3], triangles [F,3], colours [V,3]; vertices sorted by position, triangles by vertex."""
        if not self.size:
            return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32), np.zeros((0, 3), np.uint8)
        mesh = self._grid.extract_triangle_mesh(least - 0.5)
        positions, colors = mesh.vertex.positions.numpy(), _bytes(mesh.vertex.colors.numpy())
        order = _order(positions)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        triangles = rank[mesh.triangle.indices.numpy()].reshape(-1, 3)
        first = triangles.argmin(1)[:, None]
        triangles = np.take_along_axis(triangles, (first + np.arange(3)) % 3, 1)
        triangles = triangles[np.lexsort((triangles[:, 2], triangles[:, 1], triangles[:, 0]))]
        return positions[order], triangles, colors[order]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Copies of the blocks in use, ordered by their keys: see TsdfMap.save."""
        keys = self.coordinates[self.active]
        order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
        rows, cube = self.active[order], (len(order), 8, 8, 8)
        return {
            "block_keys": keys[order],
            "tsdf": self.tsdf[rows].reshape(cube),
            "weight": self.weight[rows].reshape(cube),
            "color": self.color[rows].astype(np.uint8).reshape(*cube, 3),
        }

    def restore(self, keys: Int32, tsdf: Float32, weight: NDArray[np.uint16], color: UInt8) -> None:
        """Fill an empty grid with what `arrays` gave."""
        self.frames = int(weight.max(initial=0))
        if len(keys):
            self._activate(np.ascontiguousarray(keys))
            self.tsdf[self.active] = tsdf.reshape(-1, 512)
            self.weight[self.active] = weight.reshape(-1, 512)
            self.color[self.active] = color.reshape(-1, 512, 3)

    def _activate(self, fresh: Int32) -> None:
        """Give new coordinates [N,3] buffers, growing where needed."""
        if self.size + len(fresh) > self.capacity / _SLACK:
            self._grow(int((self.size + len(fresh)) * _GROWTH) + 1)
        rows = self._grid.hashmap().activate(self.o3d.core.Tensor(fresh))[0].numpy()
        self.active = np.concatenate([self.active, rows])
        if 2 * self.size > len(self.keys):
            self._index(2 * len(self.keys))
        blocks.insert(self.keys, self.rows, fresh, rows.astype(np.int64))
        blocks.mark_clusters(self.clusters, fresh)

    def _grow(self, capacity: int) -> None:
        """A larger grid with the same blocks. Open3D's own `reserve` takes five times as long."""
        old, rows = {name: getattr(self, name) for name in _ATTRIBUTES}, self.active
        keys, grid = self.coordinates[rows], self._grid  # keeps the old buffers alive until they are copied
        self._grid = self._new(capacity)
        self.active = np.empty(0, np.int32)
        if len(keys):
            self.active = self._grid.hashmap().activate(self.o3d.core.Tensor(keys))[0].numpy()
        self._adopt()
        for name in _ATTRIBUTES:
            getattr(self, name)[self.active] = old[name][rows]
        del grid

    def _new(self, capacity: int) -> Any:
        core = self.o3d.core
        dtypes = (core.float32, core.uint16, core.uint16)
        return self.o3d.t.geometry.VoxelBlockGrid(_ATTRIBUTES, dtypes, ((1), (1), (3)), self.voxel, 8, capacity)

    def _adopt(self) -> None:
        """Take views of the grid's buffers and index its blocks."""
        self.capacity = int(self._grid.hashmap().capacity())
        self.tsdf: Float32 = self._grid.attribute("tsdf").numpy().reshape(self.capacity, 512)
        self.weight: NDArray[np.uint16] = self._grid.attribute("weight").numpy().reshape(self.capacity, 512)
        self.color: NDArray[np.uint16] = self._grid.attribute("color").numpy().reshape(self.capacity, 512, 3)
        self.coordinates: Int32 = self._grid.hashmap().key_tensor().numpy()
        self._stamps: Int32 = np.zeros(self.capacity, np.int32)
        self._index(1 << max(12, int(2 * self.capacity - 1).bit_length()))

    def _index(self, length: int) -> None:
        self.keys: NDArray[np.int64] = np.full(length, -1, np.int64)
        self.rows: Int32 = np.full(length, -1, np.int32)
        self.clusters: NDArray[np.int64] = np.full(length, -1, np.int64)
        used = self.coordinates[self.active]
        blocks.insert(self.keys, self.rows, used, self.active.astype(np.int64))
        blocks.mark_clusters(self.clusters, used)

    def _rows_of(self, coordinates: Int32) -> Int32:
        return blocks.find(self.keys, self.rows, coordinates)


def _order(positions: Float32) -> NDArray[np.int64]:
    return np.lexsort((positions[:, 2], positions[:, 1], positions[:, 0]))


def _bytes(colors: Float32) -> UInt8:
    return np.clip(np.rint(colors * 255), 0, 255).astype(np.uint8)
