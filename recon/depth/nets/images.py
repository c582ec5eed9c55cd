"""Depth Anything's image processing, on the CPU and for images that lie on a GPU. Without `transformers`, which takes
seconds to import and is needed where a network is built, not where an engine runs."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,3,h,w] uint8 RGB -> [N,3,H,W] FP32, normalised: the network's own image processing at a stated `size` (H, W).

    Bicubic with antialiasing to whole grey values, then ImageNet's mean and standard deviation. The resize is torch's
    uint8 kernel, which is what the processor runs on its torchvision backend (equal to the last bit); its Pillow
    backend differs by one or two grey levels in less than one value of a hundred. On the CPU only.
    """
    whole = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    mean, std = _statistics(images.device)
    return (whole.float() - mean) / std


def restore(disparity: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,H,W] -> [N,*size] FP32 at the image's own size (height, width).

    Bicubic, align_corners=False, as `DPTImageProcessor.post_process_depth_estimation`; at strong edges it may overshoot
    the range of the prediction, below 0 included.
    """
    return F.interpolate(disparity.float()[:, None], size, mode="bicubic", align_corners=False)[:, 0]


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
