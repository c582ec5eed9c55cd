"""Launchers of the fusion's Triton kernels. Imported on CUDA only."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from recon.fusion.device.average_triton import average_kernel, through_kernel
from recon.fusion.device.cameras import Cameras
from recon.fusion.device.pool import COLOR_STEPS, BlockPool
from recon.fusion.kernels.blocks import SIDE

_ROWS = 128


def seen_through(
    pool: BlockPool, concerned: torch.Tensor, before: torch.Tensor, depths: torch.Tensor, cameras: Cameras, block: float
) -> None:
    """`update.add_seen_through` in one launch. Products and sums are not fused: results are those of the torch twin."""
    views, height, width = depths.shape
    with torch.cuda.device(depths.device):  # Triton launches on the current one
        through_kernel[(triton.cdiv(pool.size, _ROWS), views)](
            pool.coordinates, concerned.view(torch.uint8), before, depths, cameras.packed,
            _constants(block, depths.device), pool.size, height, width, STRIDE=cameras.packed.shape[1], BLOCK=_ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def average(
    pool: BlockPool,
    concerned: torch.Tensor,
    depths: torch.Tensor,
    images: torch.Tensor,
    cameras: Cameras,
    voxel: float,
    truncation: float,
    cap: int,
) -> None:
    """`update.average` in one launch; products and sums are not fused here either."""
    views, height, width = depths.shape
    with torch.cuda.device(depths.device):
        average_kernel[(pool.size,)](
            pool.tsdf, pool.weight, pool.color, pool.coordinates, concerned.view(torch.uint8), depths, images,
            cameras.single, pool.size, views, height, width, voxel, voxel * truncation, cap,
            STRIDE=cameras.single.shape[1], SIDE=SIDE, STEPS=COLOR_STEPS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _constants(block: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([block, 0.7], dtype=torch.float64, device=device)
