"""The TSDF of `recon.fusion.tsdf` on a torch device: same rules, same file, no trip to the host while it is fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from recon.fusion import Map, Mesh, PointCloud
from recon.fusion.device import raycast, update
from recon.fusion.device.inputs import upload
from recon.fusion.device.pool import BlockPool
from recon.fusion.kernels.blocks import SIDE
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
        self.device = torch.device(device)
        self.pool = BlockPool(self.device)

    @torch.inference_mode()
    def integrate(self, view: PosedDepth, frame: int) -> None:
        """Fuse one view.

        Raises:
            ReconError: parts of the view do not fit, or the device has no room for its blocks; the map is unchanged.
        """
        o = self.options
        depth, image = upload(view, self.device, o.max_depth, o.min_confidence)
        check_range(view, o)
        block = o.voxel * SIDE
        touched = update.near_surface(depth, view.K, view.T_world_cam, o.truncation * o.voxel, block)
        found = self.pool.find(touched)
        missing = found < 0
        rows = found[~missing]
        if o.carve and self.pool.size:
            through = update.seen_through(self.pool, rows, depth, view.K, view.T_world_cam, block)
            rows = torch.cat([rows, through])
        fresh = touched[missing]
        if len(fresh):
            rows = torch.cat([rows, self.pool.add(fresh)])
        update.average(
            self.pool, rows, depth, image, view.K, view.T_world_cam, o.voxel, o.truncation, o.weight_cap
        )  # fmt: skip

    def render_depth(self, K: Array, T_world_cam: Array, width: int, height: int) -> DepthImage:
        """`render` as a NumPy array."""
        return cast(DepthImage, self.render(K, T_world_cam, width, height).cpu().numpy())

    @torch.inference_mode()
    def render(self, K: Array, T_world_cam: Array, width: int, height: int) -> torch.Tensor:
        """[height,width] float32 z-depth on the device, where the ray first enters the surface; 0 where it does not."""
        K, T_world_cam = check_intrinsics(K, "render_depth"), check_transform(T_world_cam, "render_depth")
        return raycast.cast(self.pool, K, T_world_cam, (width, height), self.options.voxel, self.options.min_weight)

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
