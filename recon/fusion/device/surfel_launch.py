"""Launchers of the surfels' Triton kernels. Imported on CUDA only."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from recon.fusion.device.surfel_sight import Eye, Sight
from recon.fusion.device.surfel_triton import merge_kernel, normals_kernel, splat_kernel
from recon.fusion.kernels.surfels import DRAWN
from recon.fusion.surfel import base

_BLOCK = 128
_FEW = 32  # surfels a program where each goes through its pixels: the largest square keeps the others waiting
_FARTHEST = 0x7F800000  # the bits of infinity


def normals(sight: Sight) -> torch.Tensor:
    """`Sight.normals` in one launch."""
    height, width = sight.depth.shape
    out = torch.empty((height, width, 3), dtype=torch.float64, device=sight.depth.device)
    normals_kernel[(triton.cdiv(height * width, _BLOCK),)](
        sight.depth, sight.eye.packed, _rules(sight), out, height, width, base(width), BLOCK=_BLOCK, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def merge(
    columns: dict[str, torch.Tensor], sight: Sight, normals: torch.Tensor, frame: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`surfel_update.merge` in one launch. Products and sums are not fused: results are those of the torch twin."""
    (height, width), o, n = sight.depth.shape, sight.options, len(columns["weight"])
    covered = torch.zeros((height, width), dtype=torch.bool, device=sight.depth.device)
    changed = ("position", "normal", "color", "weight", "last", "violations")
    new = columns | {name: torch.empty_like(columns[name]) for name in changed}
    read = ("position", "normal", "color", "radius", "weight", "last", "violations")
    if n:
        merge_kernel[(triton.cdiv(n, _FEW),)](
            *(columns[name] for name in read), *(new[name] for name in changed), covered.view(torch.uint8),
            sight.depth, sight.image, normals, sight.eye.packed, _rules(sight),
            (sight.depth > 0).any().view(torch.uint8), n, height, width, frame, o.patience, o.stale_frames,
            BLOCK=_FEW, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return new, covered


def splat(
    columns: dict[str, torch.Tensor], eye: Eye, size: tuple[int, int], slab: float, steps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`surfel_render._passes` in a launch each."""
    width, height = size
    device, n = eye.packed.device, len(columns["weight"])
    near = torch.full((height * width,), _FARTHEST, dtype=torch.int32, device=device)
    behind, mass = torch.zeros((2, height * width), dtype=torch.int64, device=device)
    read = ("position", "normal", "radius", "weight")
    for sums in (False, True):
        splat_kernel[(triton.cdiv(n, _FEW),)](
            *(columns[name] for name in read), eye.packed, _constants((slab, steps, DRAWN, 1e-9, -0.1), device),
            near, behind, mass, n, height, width, SUMS=sums, BLOCK=_FEW, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return near.view(torch.float32), behind, mass


def _rules(sight: Sight) -> torch.Tensor:
    o = sight.options
    values = (o.gate_voxels * o.voxel, o.gate_share, sight.unit, o.weight_cap, o.stale_weight, 1e-9, 1e-20)
    return _constants(values, sight.depth.device)


@lru_cache(maxsize=32)
def _constants(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers of double precision for kernels, uploaded once."""
    return torch.tensor(values, dtype=torch.float64, device=device)
