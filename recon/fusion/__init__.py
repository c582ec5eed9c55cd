"""Fusion: posed depth in, a map out that can be rendered back into any camera."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recon.component import Component
from recon.errors import ReconError
from recon.geometry.views import Array, DepthImage, PosedDepth

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PointCloud:
    """points [N,3] float32 in map units, normals [N,3] float32 unit, colors [N,3] uint8 RGB."""

    points: NDArray[np.float32]
    normals: NDArray[np.float32]
    colors: NDArray[np.uint8]


@dataclass(frozen=True)
class Mesh:
    """vertices [V,3] float32, triangles [F,3] int32, colors [V,3] uint8 RGB."""

    vertices: NDArray[np.float32]
    triangles: NDArray[np.int32]
    colors: NDArray[np.uint8]


class Map(ABC):
    """A growing map. Not thread-safe: one owner."""

    device: torch.device | None = None
    """Where the map lies, if it takes and gives tensors; None: on the host, in NumPy arrays."""

    @abstractmethod
    def integrate(self, view: PosedDepth, frame: int) -> None:
        """Fuse one posed depth image; `frame` counts time steps. Pixels with depth 0 or non-finite are left out."""

    def integrate_all(self, views: Sequence[PosedDepth], frame: int) -> None:
        """Fuse the views of one time step, in their order; the result is that of one after another."""
        for view in views:
            self.integrate(view, frame)

    def render(self, K: Array, T_world_cam: Array, width: int, height: int) -> torch.Tensor:
        """`render_depth` as a tensor on `device`; only maps that have one."""
        raise NotImplementedError(f"{type(self).__name__} is on the host")

    def render_all(self, cameras: Sequence[tuple[Array, Array]], width: int, height: int) -> torch.Tensor:
        """`render` for several cameras (K, T_world_cam): [C,height,width]."""
        import torch

        return torch.stack([self.render(K, T_world_cam, width, height) for K, T_world_cam in cameras])

    @abstractmethod
    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """[height,width] float32 z-depth of the map's surface, 0 where there is none. Deterministic."""

    @abstractmethod
    def points(self) -> PointCloud:
        """The surface as oriented, coloured points. May be empty."""

    @abstractmethod
    def mesh(self) -> Mesh | None:
        """The surface as triangles, or None where the representation has none."""

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Size and memory in named units, e.g. `points`, `memory_mib`."""

    def save(self, folder: Path) -> list[Path]:
        """Write what only this representation has (`tsdf_volume.npz`); returns the files. Nothing by default."""
        return []


@dataclass
class Fusion(Component):
    """A map representation and its knobs. Lengths are in map units (metres when the scale is known)."""

    voxel: float = 0.02
    """Voxel side of the TSDF, spacing of surfels; map units."""
    max_depth: float = 10.0
    """Depth beyond this is not fused; map units."""
    min_confidence: float = 0.0
    """Pixels whose confidence is lower are left out, where the depth comes with one. 0: all are taken."""
    device: str = "cpu"
    """cpu, cuda or cuda:N: where the map lies and is fused and rendered."""

    def check(self) -> None:
        from recon.machine import require_device

        super().check()
        require_device(self.device, "fusion.device")
        if not 0 < self.max_depth < float("inf"):
            raise ReconError(f"fusion.max_depth={self.max_depth}: must be positive and finite", "10 is ten map units")
        if not 0 < self.voxel < float("inf"):
            raise ReconError(f"fusion.voxel={self.voxel}: must be positive and finite", "0.02 is 2 cm in a metric map")
        if self.voxel >= self.max_depth:
            raise ReconError(
                f"fusion.voxel={self.voxel}: a voxel as large as fusion.max_depth={self.max_depth} holds no surface",
                "0.02 is 2 cm in a metric map",
            )

    @abstractmethod
    def create(self) -> Map:
        """An empty map."""


__all__ = ["Fusion", "Map", "Mesh", "PointCloud"]
