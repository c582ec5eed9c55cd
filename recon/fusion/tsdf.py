"""Truncated signed distance field in sparse blocks: Open3D's VoxelBlockGrid with its traps closed.

Weighted running average of projective distances (Curless and Levoy, SIGGRAPH 1996) in hashed voxel blocks (Niessner et
al., SIGGRAPH Asia 2013). Open3D integrates and extracts; which blocks a frame concerns, growth, forgetting and
rendering are done here, on Open3D's own buffers. On CUDA all but the extraction is torch: see `recon.fusion.device`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from recon.artifact import atomic_file
from recon.errors import ReconError
from recon.fusion import Fusion, Map, Mesh, PointCloud
from recon.geometry.cameras import check_intrinsics, check_transform
from recon.geometry.views import Array, DepthImage, PosedDepth

if TYPE_CHECKING:
    from recon.fusion.device.tsdf import DeviceTsdfMap
    from recon.fusion.kernels.grid import BlockGrid

_RANGE = 65535  # Open3D takes depth as uint16 next to uint8 colour, or both as float, which costs a colour conversion


@dataclass
class Tsdf(Fusion):
    """Signed distances on a sparse grid: fine surfaces and a mesh, at 12 bytes a voxel near the surface."""

    truncation: float = 4.0
    """Half width of the band around the surface that is kept, in voxels."""
    weight_cap: int = 20
    """Observations that a voxel remembers: the fewer, the sooner it follows a change."""
    carve: bool = True
    """Also update blocks that the camera sees through: what has gone is worn away, at a pace set by weight_cap."""
    min_weight: int = 1
    """Observations that a voxel needs before it takes part in a surface."""

    def check(self) -> None:
        super().check()
        if not 2 <= self.truncation <= 16:
            raise ReconError(f"fusion.truncation={self.truncation}: must be 2 to 16 voxels", "4 suits most depth")
        if not 1 <= self.weight_cap <= 60000:
            raise ReconError(f"fusion.weight_cap={self.weight_cap}: must be 1 to 60000", "20 is the default")
        if not 1 <= self.min_weight <= self.weight_cap:
            raise ReconError(
                f"fusion.min_weight={self.min_weight}: must be 1 to fusion.weight_cap={self.weight_cap}",
                "1 is the default",
            )
        if self.voxel * _RANGE < 8 * self.max_depth:
            raise ReconError(
                f"fusion.voxel={self.voxel} with fusion.max_depth={self.max_depth}: depth is kept in {_RANGE} steps, "
                "and a voxel must span at least 8 of them",
                f"fusion.max_depth={self.voxel * _RANGE / 8:.4g} or less",
            )

    def create(self) -> TsdfMap | DeviceTsdfMap:
        if self.device == "cpu":
            return TsdfMap(self)
        from recon.fusion.device.tsdf import DeviceTsdfMap

        return DeviceTsdfMap(self, self.device)


class TsdfMap(Map):
    """See `Tsdf`. Memory follows the blocks in use: capacity is at most 1.25 of them after growth."""

    def __init__(self, options: Tsdf) -> None:
        """An empty map.

        Raises:
            ReconError: open3d is missing.
        """
        from recon.fusion.kernels.grid import BlockGrid

        self.options = options
        self.grid: BlockGrid = BlockGrid(options.voxel)

    def integrate(self, view: PosedDepth, frame: int) -> None:
        from recon.fusion.kernels import depth as prepared

        o = self.options
        depth, count = prepared.prepare(view, o.max_depth, o.min_confidence)
        check_range(view, o)
        if count == 0:
            return  # Open3D raises on an image that touches no block
        listed = self.grid.blocks_of(depth, view.K, view.T_world_cam, o.truncation, o.carve)
        self.grid.cap(listed, o.weight_cap)
        self.grid.integrate(listed, depth, view.image, view.K, view.T_world_cam, o.max_depth, o.truncation)

    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """[height,width] float32 z-depth where the ray first enters the surface from outside, 0 where it does not.

        Rays against the field itself, trilinear at the zero: on planes within 0.1 voxel, where Open3D's ray_cast is
        off by more than one.
        """
        from recon.fusion.kernels.depth import pinhole, rigid
        from recon.fusion.kernels.raycast import render

        K, T_world_cam = check_intrinsics(K, "render_depth"), check_transform(T_world_cam, "render_depth")
        out = np.zeros((height, width), np.float32)
        if self.grid.size:
            g, o = self.grid, self.options
            low, high = g.corners()
            render(
                out, pinhole(K), *rigid(T_world_cam), o.voxel, o.truncation, o.min_weight, low, high,
                g.clusters, g.keys, g.rows, g.tsdf, g.weight,
            )  # fmt: skip
        return out

    def points(self) -> PointCloud:
        """Surface crossings on grid edges, in a fixed order."""
        positions, normals, colors = self.grid.extract_points(self.options.min_weight)
        return PointCloud(positions, normals, colors)

    def mesh(self) -> Mesh:
        """Marching cubes over voxels with min_weight observations, in a fixed order; may be empty."""
        vertices, triangles, colors = self.grid.extract_mesh(self.options.min_weight)
        return Mesh(vertices, triangles, colors)

    def stats(self) -> dict[str, float]:
        """`blocks`, `blocks_capacity`, `memory_mib` (all buffers at capacity and the index), `voxel`."""
        return {
            "blocks": float(self.grid.size),
            "blocks_capacity": float(self.grid.capacity),
            "memory_mib": self.grid.nbytes / 2**20,
            "voxel": self.options.voxel,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write `tsdf_volume.npz`, plain arrays without pickle, blocks in the order of their keys.

        format: int64, 1. voxel, max_depth: float64, map units. truncation: float64, voxels. block_keys [B,3] int32:
        the block holds voxels 8*key .. 8*key+7 on each axis, and the voxel with integer coordinate i has its centre
        at i*voxel in world coordinates. tsdf [B,8,8,8] float32, axes z, y, x: signed distance over truncation*voxel,
        positive outside. weight [B,8,8,8] uint16: observations, 0 = unseen. color [B,8,8,8,3] uint8 RGB.
        """
        return [save_volume(folder, self.options, self.grid.arrays())]


def save_volume(folder: Path, options: Tsdf, arrays: dict[str, NDArray[Any]]) -> Path:
    """Write block_keys, tsdf, weight and color with the options that give them a meaning: see `TsdfMap.save`."""
    path = folder / "tsdf_volume.npz"
    with atomic_file(path) as partial:
        np.savez(
            partial, format=np.int64(1), voxel=np.float64(options.voxel), truncation=np.float64(options.truncation),
            max_depth=np.float64(options.max_depth), **cast(dict[str, Any], arrays),
        )  # fmt: skip
    return path


def check_range(view: PosedDepth, options: Tsdf) -> None:
    """Raise ReconError where the view could see blocks whose coordinates have no key."""
    from recon.fusion.kernels.blocks import REACH, SIDE

    farthest = float(np.abs(view.T_world_cam[:3, 3]).max()) + 4 * options.max_depth
    if farthest >= REACH * SIDE * options.voxel:
        raise ReconError(
            f"camera {view.camera!r} stands {farthest:.4g} from the origin: at voxel {options.voxel} the map "
            f"reaches {REACH * SIDE * options.voxel:.4g}",
            "raise fusion.voxel or move the origin to the scene",
        )


def load(path: Path) -> TsdfMap:
    """The map that `TsdfMap.save` wrote; it can be rendered, extracted and fused into.

    Raises:
        ReconError: not such a file, or arrays that do not belong together.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: np.asarray(data[name]) for name in data.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ReconError(f"{path}: cannot be read as a TSDF volume: {error}", "run fusion=tsdf again") from error
    _check_arrays(path, arrays)
    voxel, truncation, max_depth = (float(arrays[name]) for name in ("voxel", "truncation", "max_depth"))
    options = Tsdf(name="tsdf", voxel=voxel, truncation=truncation, max_depth=max_depth)
    options.check()
    fused = TsdfMap(options)
    fused.grid.restore(arrays["block_keys"], arrays["tsdf"], arrays["weight"], arrays["color"])
    return fused


def _check_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    n = len(arrays.get("block_keys", ()))
    cube = (n, 8, 8, 8)
    expected = {
        "format": ((), "int64"), "voxel": ((), "float64"), "truncation": ((), "float64"), "max_depth": ((), "float64"),
        "block_keys": ((n, 3), "int32"), "tsdf": (cube, "float32"), "weight": (cube, "uint16"),
        "color": ((*cube, 3), "uint8"),
    }  # fmt: skip
    for name, (shape, dtype) in expected.items():
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            seen = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise ReconError(f"{path}: {name} is {seen}, must be {dtype} {shape}", "run fusion=tsdf again")
    if arrays["format"] != 1:
        raise ReconError(f"{path}: format {int(arrays['format'])}, this version reads 1", "run fusion=tsdf again")
    if not np.isfinite(arrays["tsdf"]).all() or len(np.unique(arrays["block_keys"], axis=0)) != n:
        raise ReconError(f"{path}: distances that are not finite, or a block twice", "run fusion=tsdf again")
