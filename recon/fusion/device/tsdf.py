"""The TSDF of `recon.fusion.tsdf` on a torch device: same rules, same file, no trip to the host while it is fused."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch

from recon.fusion import Map, Mesh, PointCloud
from recon.fusion.device import raycast, update
from recon.fusion.device.cameras import CameraCache, Cameras
from recon.fusion.device.inputs import upload_all
from recon.fusion.device.pool import BlockPool
from recon.fusion.kernels.blocks import SIDE
from recon.fusion.kernels.depth import check_view
from recon.fusion.tsdf import Tsdf, TsdfMap, check_range, save_volume
from recon.geometry.cameras import check_intrinsics, check_transform
from recon.geometry.views import Array, DepthImage, PosedDepth


class DeviceTsdfMap(Map):
    """See `Tsdf`. Views may hold NumPy arrays or tensors (depth, image, confidence); K and pose are NumPy's.

    Differs from `TsdfMap` in two things: depth is not rounded to 65535 steps, and colours average without losing their
    fractions. Rays are sampled a voxel apart, so things thinner than a voxel may be hit that it steps over.
    """

    def __init__(self, options: Tsdf, device: str | torch.device) -> None:
        self.options = options
        self.device: torch.device = torch.device(device)
        self.pool = BlockPool(self.device)
        self._cameras = CameraCache(self.device)

    def integrate(self, view: PosedDepth, frame: int) -> None:
        """Fuse one view.

        Raises:
            ReconError: parts of the view do not fit, or the device has no room for its blocks; the map is unchanged.
        """
        self.integrate_all([view], frame)

    @torch.inference_mode()
    def integrate_all(self, views: Sequence[PosedDepth], frame: int) -> None:
        """Fuse several views, in their order, with the result of one after another and few operations.

        Raises:
            ReconError: parts of a view do not fit, and the map is unchanged; or the device has no room for the blocks
                of views of one size, and those and later ones are not in the map.
        """
        o = self.options
        for view in views:
            check_view(view)
            check_range(view, o)
        for _, run in groupby(views, key=lambda view: tuple(view.depth.shape)):
            equal = list(run)
            depths, images = upload_all(equal, self.device, o.max_depth, o.min_confidence)
            self._fuse(depths, images, self._cameras.of(equal))

    def _fuse(self, depths: torch.Tensor, images: torch.Tensor, cameras: Cameras) -> None:
        """Average views [V,H,W] into the blocks near their surfaces, and into those that they see through."""
        o = self.options
        block = o.voxel * SIDE
        touched, by = update.near_surface(depths, cameras, o.truncation * o.voxel, block)
        before = self._grow(touched, by)
        if not self.pool.size:
            return
        concerned = torch.zeros((len(depths), self.pool.size), dtype=torch.bool, device=self.device)
        concerned.index_copy_(1, self.pool.find(touched), by)
        if o.carve:
            update.add_seen_through(self.pool, concerned, before, depths, cameras, block)
        update.average(self.pool, concerned, depths, images, cameras, o.voxel, o.truncation, o.weight_cap)

    def _grow(self, touched: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Make the blocks that are missing, in the order in which the views meet them; [V] how many each view found."""
        size, numbers = self.pool.size, torch.arange(len(by), device=self.device)
        missing = torch.nonzero(self.pool.find(touched) < 0)[:, 0]
        if not len(missing):
            return torch.full_like(numbers, size)
        first, order = by[:, missing].to(torch.uint8).argmax(0).sort(stable=True)
        self.pool.add(touched[missing[order]])
        return size + torch.searchsorted(first, numbers)

    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """`render` as a NumPy array."""
        return cast(DepthImage, self.render(K, T_world_cam, width, height).cpu().numpy())

    def render(self, K: Array, T_world_cam: Array, width: int, height: int) -> torch.Tensor:
        """[height,width] float32 z-depth on the device, where the ray first enters the surface; 0 where it does not."""
        return self.render_all([(K, T_world_cam)], width, height)[0]

    @torch.inference_mode()
    def render_all(self, cameras: Sequence[tuple[Array, Array]], width: int, height: int) -> torch.Tensor:
        """`render` for several cameras (K, T_world_cam) at once: [C,height,width]."""
        cameras = [(check_intrinsics(K, "render_depth"), check_transform(T, "render_depth")) for K, T in cameras]
        return raycast.cast(self.pool, cameras, (width, height), self.options.voxel, self.options.min_weight)

    def points(self) -> PointCloud:
        """Surface crossings on grid edges, in a fixed order; extracted on the host.

        Raises:
            ReconError: open3d is missing.
        """
        return self.on_host().points()

    def mesh(self) -> Mesh:
        """Marching cubes, in a fixed order; extracted on the host; may be empty.

        Raises:
            ReconError: open3d is missing.
        """
        return self.on_host().mesh()

    def on_host(self) -> TsdfMap:
        """A copy of the map on the CPU."""
        copy, arrays = TsdfMap(self.options), self._arrays()
        copy.grid.restore(arrays["block_keys"], arrays["tsdf"], arrays["weight"], arrays["color"])
        return copy

    def stats(self) -> dict[str, float]:
        """`blocks`, `blocks_capacity`, `memory_mib` (all buffers at capacity and the index), `voxel`."""
        return {
            "blocks": float(self.pool.size),
            "blocks_capacity": float(self.pool.capacity),
            "memory_mib": self.pool.nbytes / 2**20,
            "voxel": self.options.voxel,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write `tsdf_volume.npz` as `TsdfMap.save` does; `recon.fusion.tsdf.load` reads it."""
        return [save_volume(folder, self.options, self._arrays())]

    @torch.inference_mode()
    def _arrays(self) -> dict[str, Any]:
        return self.pool.arrays()
