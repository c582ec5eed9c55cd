"""`recon.live.movers` for all cameras of a batch at once, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from recon.geometry.views import Array


@dataclass
class _Memory:
    """What is known of one camera: its pose, its last small depth [h,w] and how often each pixel's was the same."""

    pose: bytes
    last: Tensor
    stable: Tensor


@dataclass
class DeviceMovers:
    """The memories of all cameras; frames and tolerance as in `MoverMask`."""

    frames: int
    tolerance: float
    _known: dict[str, _Memory] = field(default_factory=dict, init=False)

    @torch.inference_mode()
    def apply(
        self,
        cameras: Sequence[str],
        depth: Tensor,
        reference: Tensor,
        anchored: Tensor,
        poses: Sequence[Array],
        tolerances: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """`MoverMask.apply` for one frame of each camera: depth [C,H,W] with 0 where something moves, and the shares
        of the images taken out [C], NaN where a camera was not judged; None where none was.

        reference: [C,h,w]. anchored: [C,h,w] bool, where it is the bootstrap's. tolerances: [C] from `tolerance`.
        """
        if not self.frames:
            return depth, None
        small = _shrunk(depth, tuple(reference.shape[1:]))
        before = [self._known.get(camera) for camera in cameras]
        moved = [
            known is not None and (known.pose != pose.tobytes() or known.last.shape != small.shape[1:])
            for known, pose in zip(before, poses, strict=True)
        ]
        kept = [None if gone else known for known, gone in zip(before, moved, strict=True)]
        last = torch.stack([small[i] if known is None else known.last for i, known in enumerate(kept)])
        none = torch.zeros_like(small[0], dtype=torch.int32)
        stable = torch.stack([none if known is None else known.stable for known in kept])
        out, stable = self._judge(small, last, stable, reference, anchored, tolerances[:, None, None])
        shares = out.to(torch.float32).mean((1, 2))
        for i, camera in enumerate(cameras):
            if moved[i]:
                out[i], stable[i], shares[i] = False, 0, torch.nan
            self._known[camera] = _Memory(poses[i].tobytes(), small[i], stable[i])
        return torch.where(_enlarged(out, tuple(depth.shape[1:])), 0.0, depth), shares

    def _judge(
        self, small: Tensor, last: Tensor, stable: Tensor, reference: Tensor, anchored: Tensor, tolerance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which pixels are not to be fused, and how often each was the same; all [C,h,w]."""
        new = (small > 0) & ~_explained(small, reference, tolerance, anchored)
        same = (small - last).abs() <= tolerance.to(small.dtype) * small
        stable = torch.where(new, torch.where(same, stable + 1, 1), 0)
        out = _grown(new & (stable < self.frames)) & ~_explained(small, reference, tolerance / 2, anchored)
        return out, stable


def _explained(small: Tensor, reference: Tensor, tolerance: Tensor, anchored: Tensor) -> Tensor:
    nearer, farther = ((1 + sign * tolerance).to(small.dtype) for sign in (-1, 1))
    known = (small > 0) & (reference > 0)
    return known & (small >= reference * nearer) & (anchored | (small <= reference * farther))


def _shrunk(depth: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, columns = (_middles(large, small, depth.device) for large, small in zip(depth.shape[1:], shape, strict=True))
    return depth[:, rows[:, None], columns[None, :]]


def _enlarged(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, columns = (_owners(large, small, mask.device) for large, small in zip(shape, mask.shape[1:], strict=True))
    return mask[:, rows[:, None], columns[None, :]]


def _grown(mask: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    rows = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]


@lru_cache(maxsize=32)
def _middles(large: int, small: int, device: torch.device) -> Tensor:
    return ((torch.arange(small, device=device) + 0.5).to(torch.float64) * large / small).to(torch.int64)


@lru_cache(maxsize=32)
def _owners(large: int, small: int, device: torch.device) -> Tensor:
    return torch.arange(large, device=device) * small // large
