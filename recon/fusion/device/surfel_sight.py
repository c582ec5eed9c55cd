"""One view as the surfels' update sees it: a camera in few operations, and the normal of every pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from recon.fusion.device.cameras import Cameras
from recon.fusion.surfel import Surfel, base


@dataclass(frozen=True)
class Eye:
    """One camera, float64 on the device. packed [28]: a row of `Cameras.packed`, and its parts: focal, centre [2]; R
    [3,3], t [3]: T_world_cam; R_in, t_in: T_cam_world.

    Points are [...,3]. Every sum has the order of the compiled loops, which matrix products would not keep.
    """

    packed: torch.Tensor
    focal: torch.Tensor
    centre: torch.Tensor
    R: torch.Tensor
    t: torch.Tensor
    R_in: torch.Tensor
    t_in: torch.Tensor

    @classmethod
    def of(cls, cameras: Cameras) -> Eye:
        """The first of several."""
        packed = cameras.packed[0]
        focal, centre, R, t, R_in, t_in = torch.split(packed, [2, 2, 9, 3, 9, 3])
        return cls(packed, focal, centre, R.reshape(3, 3), t, R_in.reshape(3, 3), t_in)

    def seen(self, points: torch.Tensor) -> torch.Tensor:
        """World to camera."""
        return turned(self.R_in, points) + self.t_in

    def placed(self, points: torch.Tensor) -> torch.Tensor:
        """Camera to world."""
        return turned(self.R, points) + self.t

    def pixels(self, points: torch.Tensor) -> torch.Tensor:
        """[...,2] float64 pixels (u, v) of points in the camera frame."""
        return self.focal * points[..., :2] / points[..., 2:] + self.centre

    def points(self, pixels: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Points in the camera frame, from pixels [...,2] and their depth [...]."""
        z = z[..., None]
        return torch.cat([z * (pixels - self.centre) / self.focal, z], -1)


@dataclass(frozen=True)
class Sight:
    """One view. depth [H,W] float32, 0 = none; image [H,W,3] uint8; unit: depth at which an observation weighs 1."""

    depth: torch.Tensor
    image: torch.Tensor
    eye: Eye
    options: Surfel
    unit: float

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        """How far from depth z a pixel may lie along the ray and still belong to the same surface."""
        return (self.options.gate_share * z).clamp_(min=self.options.gate_voxels * self.options.voxel)

    def normals(self) -> torch.Tensor:
        """[H,W,3] float64, unit, in the camera frame and towards the camera; 0 where there is none.

        From pixels `surfel.base` away on both sides, or on one where the other is missing or beyond a jump in depth.
        On CUDA one kernel does it; elsewhere its twin below.
        """
        if self.depth.is_cuda:
            from recon.fusion.device.surfel_launch import normals

            return normals(self)
        (height, width), (fx, fy), (cx, cy) = self.depth.shape, self.eye.focal, self.eye.centre
        step, jump = base(width), self.gate(self.depth.to(torch.float64))
        known = pad(torch.where(self.depth > 0, self.depth, torch.nan), (step, step, step, step), value=torch.nan)
        u = torch.arange(width, device=self.depth.device, dtype=torch.float64)
        v = torch.arange(height, device=self.depth.device, dtype=torch.float64)[:, None]
        rows, columns = known[:, step : step + width], known[step : step + height]
        left, a0 = self._neighbour(columns[:, :width], jump)
        right, a1 = self._neighbour(columns[:, 2 * step :], jump)
        above, b0 = self._neighbour(rows[:height], jump)
        below, b1 = self._neighbour(rows[2 * step :], jump)
        ax, az = (a1 * (u + step * right - cx) - a0 * (u - step * left - cx)) / fx, a1 - a0
        by, bz = (b1 * (v + step * below - cy) - b0 * (v - step * above - cy)) / fy, b1 - b0
        x, y = (u - cx) / fx, (v - cy) / fy
        ay, bx = az * y, bz * x
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        length = torch.sqrt(nx * nx + ny * ny + nz * nz)
        good = (left | right) & (above | below) & (length >= 1e-20)
        length = torch.where(nx * x + ny * y + nz > 0, -length, length)
        return torch.where(good[..., None], torch.stack([nx, ny, nz], -1) / length[..., None], 0.0)

    def _neighbour(self, depth: torch.Tensor, jump: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the neighbours on one side (NaN: none) will do, and their depths, the pixel's own where not."""
        near = (depth - self.depth).abs() <= jump
        return near, torch.where(near, depth, self.depth)


def turned(R: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """R [3,3] applied to vectors [...,3], each sum from left to right."""
    return vectors[..., :1] * R[:, 0] + vectors[..., 1:2] * R[:, 1] + vectors[..., 2:] * R[:, 2]


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[...] products of vectors [...,3], each sum from left to right."""
    x, y, z = (a * b).unbind(-1)
    return x + y + z
