"""Cameras of several views as tensors, so that one operation serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from recon.geometry.cameras import invert
from recon.geometry.views import Array, PosedDepth

Rotation = list[list[torch.Tensor]]
Vector = list[torch.Tensor]
Pinhole = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Cameras:
    """V cameras. packed [V,28] float64: fx, fy, cx, cy; R (by rows) and t of T_world_cam; the same of T_cam_world.

    single: `packed` in float32, with cx and cy half a pixel larger, as Open3D holds them.
    """

    packed: torch.Tensor
    single: torch.Tensor
    _cut: dict[tuple[int, int, int, bool], Vector] = field(default_factory=dict, repr=False, compare=False)

    def pinhole(self, ndim: int, single: bool = False) -> Pinhole:
        """fx, fy, cx, cy, each [V,1,...] with `ndim` axes."""
        fx, fy, cx, cy = self._columns(0, 4, ndim, single)
        return fx, fy, cx, cy

    def world(self, ndim: int) -> tuple[Rotation, Vector]:
        """Rotation and translation from camera to world."""
        return self._rigid(4, ndim, False)

    def extrinsics(self, ndim: int, single: bool = False) -> tuple[Rotation, Vector]:
        """Rotation and translation from world to camera."""
        return self._rigid(16, ndim, single)

    def one(self, index: int) -> Cameras:
        """Camera `index` alone."""
        return Cameras(self.packed[index : index + 1], self.single[index : index + 1])

    def _rigid(self, start: int, ndim: int, single: bool) -> tuple[Rotation, Vector]:
        values = self._columns(start, start + 12, ndim, single)
        return [values[0:3], values[3:6], values[6:9]], values[9:12]

    def _columns(self, start: int, end: int, ndim: int, single: bool) -> Vector:
        key = (start, end, ndim, single)
        if key not in self._cut:  # two hundred views a time step otherwise
            source = self.single if single else self.packed
            self._cut[key] = [source[:, i].reshape(-1, *(1,) * (ndim - 1)) for i in range(start, end)]
        return self._cut[key]


class CameraCache:
    """Uploads the cameras of a set of views once: most stand still."""

    def __init__(self, device: torch.device, kept: int = 8) -> None:
        self.device, self.kept = device, kept
        self._known: dict[bytes, Cameras] = {}

    def of(self, views: Sequence[PosedDepth]) -> Cameras:
        """The cameras of `views`, in order."""
        packed = np.stack([pack_camera(view.K, view.T_world_cam) for view in views])
        key = packed.tobytes()
        if key not in self._known:
            if len(self._known) >= self.kept:
                self._known.pop(next(iter(self._known)))
            self._known[key] = cameras(packed, self.device)
        return self._known[key]


def pack_camera(K: Array, T_world_cam: Array) -> Array:
    """[28] float64: a row of `Cameras.packed`."""
    back = invert(T_world_cam)
    parts = ([K[0, 0], K[1, 1], K[0, 2], K[1, 2]], T_world_cam[:3, :3], T_world_cam[:3, 3], back[:3, :3], back[:3, 3])
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])


def cameras(packed: Array, device: torch.device) -> Cameras:
    """Rows of `pack_camera` [V,28] on `device`."""
    shifted = packed.copy()
    shifted[:, 2:4] += 0.5
    return Cameras(torch.from_numpy(packed).to(device), torch.from_numpy(shifted.astype(np.float32)).to(device))
