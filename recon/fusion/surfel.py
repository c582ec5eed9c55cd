"""Surfels with projective association: oriented discs that average what is seen of them and die when seen through.

After Keller et al. (3DV 2013) and ElasticFusion (Whelan et al., RSS 2015), without the index map: each visible surfel
reads the one pixel it projects to, so that the pass has no scatter conflicts and no search, and finds violations of
free space on the way. On CUDA all of it is torch: see `recon.fusion.device`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.fusion import Fusion, Map, PointCloud
from recon.geometry.cameras import check_intrinsics, check_transform, invert
from recon.geometry.views import Array, DepthImage, PosedDepth

if TYPE_CHECKING:
    from recon.fusion.device.surfels import DeviceSurfelMap
    from recon.fusion.kernels.surfels import Rows, Rules

_START = 1024
COLUMNS: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
    "position": ((3,), np.float32), "normal": ((3,), np.float32), "color": ((3,), np.float32),
    "radius": ((), np.float32), "weight": ((), np.float32), "first": ((), np.int32), "last": ((), np.int32),
    "violations": ((), np.uint8),
}  # fmt: skip


@dataclass
class Surfel(Fusion):
    """Oriented discs: quick to forget what has gone, no mesh."""

    gate_voxels: float = 3.0
    """A pixel belongs to a surfel within max(gate_voxels * voxel, gate_share * depth) along the ray."""
    gate_share: float = 0.03
    """See gate_voxels."""
    radius: float = 0.75
    """Half side of a surfel's square, in voxels, or in pixels where those are larger."""
    unit_depth: float = 0.0
    """Depth at which an observation weighs 1 (it falls with its square); map units. 0: half the median depth of the
    first frame fused."""
    weight_cap: float = 64.0
    """Largest weight of a surfel."""
    patience: int = 3
    """Frames in a row that must see through a surfel before it is removed."""
    stale_weight: float = 0.3
    """A surfel of lower weight is removed when it has not been seen for stale_frames."""
    stale_frames: int = 30
    """See stale_weight; time steps."""

    def check(self) -> None:
        super().check()
        for name, low, high in (
            ("gate_voxels", 0.5, 20), ("gate_share", 0, 0.5), ("radius", 0.5, 4), ("unit_depth", 0, 1e9),
            ("weight_cap", 1e-3, 1e6), ("patience", 1, 255), ("stale_weight", 0, 1e6), ("stale_frames", 1, 1e9),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ReconError(
                    f"fusion.{name}={getattr(self, name)}: must be {low} to {high:g}",
                    f"{getattr(type(self), name)} is the default",
                )

    def create(self) -> SurfelMap | DeviceSurfelMap:
        if self.device == "cpu":
            return SurfelMap(self)
        from recon.fusion.device.surfels import DeviceSurfelMap

        return DeviceSurfelMap(self, self.device)


class SurfelMap(Map):
    """See `Surfel`. Columns are arrays that double when full; rows 0..size-1 are in use, oldest first."""

    def __init__(self, options: Surfel) -> None:
        self.options = options
        self.size = 0
        self.columns: dict[str, NDArray[Any]] = {
            name: np.zeros((_START, *shape), dtype) for name, (shape, dtype) in COLUMNS.items()
        }
        self._unit = options.unit_depth

    def integrate(self, view: PosedDepth, frame: int) -> None:
        from recon.fusion.kernels import depth as prepared
        from recon.fusion.kernels import surfels

        depth, count = prepared.prepare(view, self.options.max_depth, self.options.min_confidence)
        if count == 0:
            return
        self._unit = self._unit or float(np.median(depth[depth > 0])) / 2
        camera, rules = prepared.pinhole(view.K), self._rules(depth.shape[1])
        image = np.array(view.image, order="C")  # a copy reads it in order: so it is cached for reads in surfels' order
        covered, (R, t) = np.zeros(depth.shape, np.uint8), prepared.rigid(invert(view.T_world_cam))
        self.size = surfels.gather(self.size, self._rows(), depth, image, camera, R, t, rules, frame, covered)
        (R, t), pixels = prepared.rigid(view.T_world_cam), np.flatnonzero((depth > 0) > covered)
        while (size := surfels.spawn(self.size, self._rows(), depth, image, camera, R, t, rules, frame, pixels)) < 0:
            self._double()
        self.size = size

    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """[height,width] float32 z-depth of the front faces, 0 where there are none: z-buffered squares, and at each
        pixel the weighted mean of the planes within one voxel behind the nearest."""
        from recon.fusion.kernels.depth import pinhole, rigid
        from recon.fusion.kernels.surfels import splat

        K, T_world_cam = check_intrinsics(K, "render_depth"), check_transform(T_world_cam, "render_depth")
        near, total, mass = (np.zeros((height, width), np.float32) for _ in range(3))
        R, t = rigid(invert(T_world_cam))
        splat(self.size, self._rows(), pinhole(K), R, t, float(self.options.voxel), near, total, mass)
        return np.divide(total, mass, out=near, where=mass > 0)

    def points(self) -> PointCloud:
        """Every surfel, oldest first."""
        c, n = self.columns, self.size
        colors = np.clip(np.rint(c["color"][:n]), 0, 255).astype(np.uint8)
        return PointCloud(c["position"][:n].copy(), c["normal"][:n].copy(), colors)

    def mesh(self) -> None:
        """Surfels have no triangles."""
        return None

    def stats(self) -> dict[str, float]:
        """`surfels`, `surfels_capacity`, `memory_mib` (columns at capacity), `voxel`."""
        used = sum(column.nbytes for column in self.columns.values())
        return {
            "surfels": float(self.size),
            "surfels_capacity": float(len(self.columns["weight"])),
            "memory_mib": used / 2**20,
            "voxel": self.options.voxel,
        }

    def _rows(self) -> Rows:
        from recon.fusion.kernels.surfels import Rows

        return Rows(**self.columns)

    def _rules(self, width: int) -> Rules:
        """For images of this width; of the types that the compiled loops were compiled for."""
        from recon.fusion.kernels.surfels import Rules

        o = self.options
        return Rules(
            base(width), float(o.gate_voxels * o.voxel), float(o.gate_share), float(self._unit), float(o.weight_cap),
            o.patience, o.stale_frames, float(o.stale_weight), float(o.voxel), float(o.radius),
        )  # fmt: skip

    def _double(self) -> None:
        """Twice the rows."""
        for name, column in self.columns.items():
            grown = np.zeros((2 * len(column), *column.shape[1:]), column.dtype)
            grown[: self.size] = column[: self.size]
            self.columns[name] = grown


def base(width: int) -> int:
    """Distance, in pixels of an image of `width`, at which depth is compared for normals: the noise of a depth sensor
    grows with the square of a shorter one."""
    return max(1, round(width * 3.5 / 640))
