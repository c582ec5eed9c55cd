"""Launchers of the fusion's Triton kernels. Imported on CUDA only."""

from __future__ import annotations

import torch

from recon.fusion.device.average_triton import average_kernel
from recon.fusion.device.cameras import Cameras
from recon.fusion.device.pool import COLOR_STEPS, BlockPool
from recon.fusion.kernels.blocks import SIDE


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
    """`update.average` in one launch. Products and sums are not fused, so results are those of the torch twin."""
    views, height, width = depths.shape
    average_kernel[(pool.size,)](
        pool.tsdf, pool.weight, pool.color, pool.coordinates, concerned.view(torch.uint8), depths.contiguous(),
        images.contiguous(), cameras.single, pool.size, views, height, width, voxel, voxel * truncation, cap,
        STRIDE=cameras.single.shape[1], SIDE=SIDE, STEPS=COLOR_STEPS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
