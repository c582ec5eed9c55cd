"""The network's image processing for images that lie on a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from recon.depth.nets.depth_anything import IMAGE_MEAN, IMAGE_STD, preprocess


def prepare(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,h,w,3] uint8 RGB -> [N,3,H,W] FP32, normalised, on the images' device; size: (H, W).

    As `preprocess`, which the CPU takes. CUDA has no resize of uint8: FP32 values are rounded to whole grey levels, of
    which about one in two hundred is one off.
    """
    planes = images.permute(0, 3, 1, 2)
    return resized(planes, size) if images.is_cuda else preprocess(planes, size)


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,3,h,w] uint8 -> [N,3,H,W] FP32, normalised, by FP32 arithmetic on any device."""
    found = planes.float()
    for part in ((planes.shape[2], size[1]), size):  # columns first, rounded in between, as the kernel of uint8 does it
        found = F.interpolate(found, part, mode="bicubic", antialias=True, align_corners=False).round_().clamp_(0, 255)
    mean, std = _statistics(planes.device)
    return (found - mean) / std


@lru_cache(maxsize=16)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) * 255 for values in (IMAGE_MEAN, IMAGE_STD))
    return mean.to(device), std.to(device)
