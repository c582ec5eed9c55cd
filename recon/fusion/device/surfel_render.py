"""Depth of surfels by two passes over all (surfel, pixel) pairs: the nearest of each pixel, then the mean behind it.

The sums of the second pass are of integers, which come out the same in any order: float sums by atomics would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from recon.fusion.device.inputs import Pinhole, pinhole, rigid, turned
from recon.fusion.device.surfel_windows import Windows
from recon.fusion.kernels.surfels import DRAWN
from recon.geometry.cameras import invert
from recon.geometry.views import Array

_STEPS = 2.0**40  # of the largest weight: 2^23 surfels may share a pixel before the sum leaves int64
Drawn = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


def splat(
    columns: dict[str, torch.Tensor], K: Array, T_world_cam: Array, size: tuple[int, int], slab: float, cap: float
) -> torch.Tensor:
    """[height,width] float32 z-depth as `kernels.surfels.splat` draws it, 0 where there is no front face.

    size: (width, height). slab: planes within it behind the nearest are averaged, by weight. cap: the largest weight.
    """
    width, height = size
    weight = columns["weight"].to(torch.float64)
    near = torch.full((height * width,), torch.inf, device=weight.device)
    if not len(weight):
        return torch.zeros((height, width), device=weight.device)
    drawn = _squares(columns, K, T_world_cam, size)
    for _, pixel, depth in drawn():
        near.scatter_reduce_(0, pixel, torch.where(depth > 0, depth, torch.inf).to(torch.float32), "amin")
    behind, mass = (torch.zeros(len(near), dtype=torch.int64, device=near.device) for _ in range(2))
    for row, pixel, depth in drawn():
        offset = depth - near[pixel]
        part = torch.where((depth > 0) & (offset <= slab), weight[row] * (_STEPS / cap), 0.0)
        mass.scatter_add_(0, pixel, torch.round(part).to(torch.int64))
        behind.scatter_add_(0, pixel, torch.round(part * (offset / slab)).to(torch.int64))
    mean = near + slab * (behind.to(torch.float64) / mass.clamp(min=1))
    return torch.where(torch.isfinite(near), mean, 0.0).to(torch.float32).reshape(height, width)


def _squares(columns: dict[str, torch.Tensor], K: Array, T_world_cam: Array, size: tuple[int, int]) -> Drawn:
    """All (row, pixel, depth) of the squares on the image, depth where the pixel's ray meets the surfel's plane; to be
    gone through as often as needed, and kept where they are few."""
    planes, windows = _planes(columns, K, T_world_cam, size)

    def drawn() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for row, u, v in windows.pairs():
            yield row, v * size[0] + u, planes.depth(row, u, v)

    pieces = drawn()
    held = [next(pieces, None), next(pieces, None)]
    if held[1] is None:
        return lambda: iter([piece for piece in held if piece is not None])
    return drawn


@dataclass(frozen=True)
class _Planes:
    """Tangent planes in the camera frame, [N] float64 each: normal, offset of the plane, depth of the centre, and how
    far from it the plane is trusted to tilt."""

    camera: Pinhole
    normal: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    offset: torch.Tensor
    z: torch.Tensor
    reach: torch.Tensor

    def depth(self, row: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """z-depth [P] at which the rays of pixels meet the planes of rows."""
        (fx, fy, cx, cy), (nx, ny, nz) = self.camera, self.normal
        u, v = u.to(torch.float64) - cx, v.to(torch.float64) - cy
        along = nx[row] * u / fx + ny[row] * v / fy + nz[row]
        z, reach = self.z[row], self.reach[row]
        met = torch.where(along < -0.1, self.offset[row] / along, z)
        return torch.minimum(torch.maximum(met, z - reach), z + reach)


def _planes(
    columns: dict[str, torch.Tensor], K: Array, T_world_cam: Array, size: tuple[int, int]
) -> tuple[_Planes, Windows]:
    """Planes of all surfels and the pixels that their squares cover: none for back faces and what is behind."""
    (fx, fy, cx, cy), (R, t) = pinhole(K), rigid(invert(T_world_cam))
    x, y, z = turned(R, *columns["position"].to(torch.float64).unbind(1))
    x, y, z = x + t[0], y + t[1], z + t[2]
    nx, ny, nz = turned(R, *columns["normal"].to(torch.float64).unbind(1))
    offset = nx * x + ny * y + nz * z
    shown = (z > 1e-9) & (offset < 0)
    z = torch.where(shown, z, 1.0)
    side = DRAWN * columns["radius"].to(torch.float64) / z
    ru, rv = (side * fx).clamp(min=0.5), (side * fy).clamp(min=0.5)
    u, v = fx * x / z + cx, fy * y / z + cy
    left, top = (torch.ceil(value).to(torch.int64) for value in (u - ru, v - rv))
    right, bottom = (torch.floor(value).to(torch.int64) for value in (u + ru, v + rv))
    right = torch.where(shown, right, -1)  # and with it the width is 0
    windows = Windows.clipped(left, right, top, bottom, (size[1], size[0]))
    return _Planes((fx, fy, cx, cy), (nx, ny, nz), offset, z, 3 * ru * z / fx), windows
