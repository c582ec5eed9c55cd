"""The surfels of `recon.fusion.surfel` on a torch device: same rules, no trip of an image to the host."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from recon.errors import ReconError
from recon.fusion import Map, PointCloud
from recon.fusion.device import free_bytes, surfel_render, surfel_update
from recon.fusion.device.cameras import CameraCache, cameras, pack_camera
from recon.fusion.device.inputs import upload
from recon.fusion.device.surfel_sight import Eye, Sight
from recon.fusion.surfel import COLUMNS, Surfel
from recon.geometry.cameras import check_intrinsics, check_transform
from recon.geometry.views import Array, DepthImage, PosedDepth

_START = 1024
_ROW_BYTES = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in COLUMNS.values())


class DeviceSurfelMap(Map):
    """See `Surfel`. Views may hold NumPy arrays or tensors (depth, image, confidence); K and pose are NumPy's.

    Columns are tensors that double when full; rows 0..size-1 are in use, oldest first, and are those of `SurfelMap`
    for the same input. Sizes are read back (new surfels, living ones, once the unit), no images.
    """

    def __init__(self, options: Surfel, device: str | torch.device) -> None:
        self.options = options
        self.device: torch.device = torch.device(device)
        self.size = 0
        self.columns: surfel_update.Columns = {
            name: torch.zeros((_START, *shape), dtype=getattr(torch, np.dtype(dtype).name), device=self.device)
            for name, (shape, dtype) in COLUMNS.items()
        }
        self._cameras = CameraCache(self.device, kept=64)
        self._unit = options.unit_depth

    @torch.inference_mode()
    def integrate(self, view: PosedDepth, frame: int) -> None:
        """Fuse one view.

        Raises:
            ReconError: parts of the view do not fit, or the device has no room for its surfels; the map is unchanged.
        """
        o = self.options
        depth, image = upload(view, self.device, o.max_depth, o.min_confidence)
        unit = self._unit or _half_median(depth)
        if not unit:
            return  # no pixel, and none before
        sight = Sight(depth, image, Eye.of(self._cameras.of([view])), o, unit)
        normals = sight.normals()
        merged, covered = surfel_update.merge(self._rows(), sight, normals, frame)
        fresh = surfel_update.spawn(sight, normals, covered)
        living = torch.nonzero(merged["weight"] > 0)[:, 0]
        self._store(merged, living, fresh, frame)
        self._unit = unit

    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """`render` as a NumPy array."""
        return cast(DepthImage, self.render(K, T_world_cam, width, height).cpu().numpy())

    @torch.inference_mode()
    def render(self, K: Array, T_world_cam: Array, width: int, height: int) -> torch.Tensor:
        """[height,width] float32 z-depth on the device, as `SurfelMap.render_depth` draws it; 0 where there is none."""
        K, T_world_cam = check_intrinsics(K, "render_depth"), check_transform(T_world_cam, "render_depth")
        o, eye = self.options, Eye.of(cameras(pack_camera(K, T_world_cam)[None], self.device))
        return surfel_render.splat(self._rows(), eye, (width, height), o.voxel, o.weight_cap)

    @torch.inference_mode()
    def points(self) -> PointCloud:
        """Every surfel, oldest first, copied to the host."""
        rows = self._rows()
        colors = torch.round(rows["color"]).clamp(0, 255).to(torch.uint8)
        return PointCloud(*(part.cpu().numpy().copy() for part in (rows["position"], rows["normal"], colors)))

    def mesh(self) -> None:
        """Surfels have no triangles."""
        return None

    def stats(self) -> dict[str, float]:
        """`surfels`, `surfels_capacity`, `memory_mib` (columns at capacity), `voxel`."""
        capacity = len(self.columns["weight"])
        return {
            "surfels": float(self.size),
            "surfels_capacity": float(capacity),
            "memory_mib": capacity * _ROW_BYTES / 2**20,
            "voxel": self.options.voxel,
        }

    def _rows(self) -> surfel_update.Columns:
        return {name: column[: self.size] for name, column in self.columns.items()}

    def _store(
        self, merged: surfel_update.Columns, living: torch.Tensor, fresh: surfel_update.Columns, frame: int
    ) -> None:
        """Replace the rows by the living ones and new ones after them; all or, where there is no room, nothing."""
        kept, size = len(living), len(living) + len(fresh["weight"])
        if size > len(self.columns["weight"]):
            self._grow(size)
        for name, column in self.columns.items():
            column[:kept] = merged[name] if kept == self.size else merged[name][living]
            column[kept:size] = fresh.get(name, 0 if name == "violations" else frame)
        self.size = size

    def _grow(self, size: int) -> None:
        """Twice the rows, or `size` where that is more; column by column, so that only one exists twice at a time."""
        capacity = max(2 * len(self.columns["weight"]), size)
        self._require_room(size, capacity)
        for name, column in self.columns.items():
            self.columns[name] = column.new_zeros((capacity, *column.shape[1:]))
            self.columns[name][: self.size] = column[: self.size]

    def _require_room(self, size: int, capacity: int) -> None:
        free, needed = free_bytes(self.device), capacity * _ROW_BYTES
        if free is not None and needed > free:
            raise ReconError(
                f"the map needs {size} surfels, {needed / 2**20:.0f} MiB on {self.device}, which has "
                f"{free / 2**20:.0f} MiB left",
                "raise fusion.voxel, lower fusion.max_depth, or fusion.device=cpu",
            )


def _half_median(depth: torch.Tensor) -> float:
    """Half the median of positive depth [H,W], 0 where there is none. Read back: weights are made from it."""
    values = depth[depth > 0].sort().values
    if not len(values):
        return 0.0
    middle = values[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return float(middle.mean().item()) / 2
