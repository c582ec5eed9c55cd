"""Posed depth as tensors of one device. What lies there already is not copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recon.fusion.kernels.depth import check_view
from recon.geometry.views import PosedDepth

Pinhole = tuple[float, float, float, float]


def upload(
    view: PosedDepth, device: torch.device, max_depth: float, min_confidence: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(depth [H,W] float32 that may be fused, image [H,W,3] uint8) on `device`; the view's own may be NumPy or torch.

    Depth is 0 where it is not finite, not in (0, max_depth], or not trusted, as in `kernels.depth.prepare`.

    Raises:
        ReconError: shapes that do not belong together, or intrinsics or a pose that no camera can have.
    """
    check_view(view)
    depth = tensor(view.depth, device).to(torch.float32)
    good = (depth > 0) & (depth <= max_depth)  # false for NaN, and for infinity
    if view.confidence is not None and min_confidence > 0:
        good &= tensor(view.confidence, device) >= min_confidence
    return torch.where(good, depth, 0.0), tensor(view.image, device)


def upload_all(
    views: Sequence[PosedDepth], device: torch.device, max_depth: float, min_confidence: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`upload` of views of one size that `check_view` has passed: depths [V,H,W], images [V,H,W,3]."""
    depths = torch.stack([tensor(view.depth, device).to(torch.float32) for view in views])
    good = (depths > 0) & (depths <= max_depth)
    for i, view in enumerate(views):
        if view.confidence is not None and min_confidence > 0:
            good[i] &= tensor(view.confidence, device) >= min_confidence
    return torch.where(good, depths, 0.0), torch.stack([tensor(view.image, device) for view in views])


def tensor(array: Any, device: torch.device) -> torch.Tensor:
    """The array as a contiguous tensor on `device`."""
    if not isinstance(array, torch.Tensor):
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    moved: torch.Tensor = array.to(device, non_blocking=True).contiguous()
    return moved


def pinhole(K: NDArray[Any]) -> Pinhole:
    """(fx, fy, cx, cy): numbers, not tensors, so that nothing is copied for them."""
    return float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])


def rigid(T: NDArray[Any], single: bool = False) -> tuple[list[list[float]], list[float]]:
    """Rotation, by rows, and translation; `single`: rounded to float32, as Open3D holds them."""
    matrix = np.asarray(T, np.float32 if single else np.float64)
    R: list[list[float]] = matrix[:3, :3].tolist()
    t: list[float] = matrix[:3, 3].tolist()
    return R, t


def turned(R: Sequence[Sequence[Any]], x: Any, y: Any, z: Any) -> tuple[Any, Any, Any]:
    """R applied to tensors of coordinates, each sum from left to right."""
    a, b, c = (row[0] * x + row[1] * y + row[2] * z for row in R)
    return a, b, c
