"""Depth of surfels by two passes over all (surfel, pixel) pairs: the nearest of each pixel, then the mean behind it.

The sums of the second pass are of integers, which come out the same in any order: float sums by atomics would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from recon.fusion.device.surfel_sight import Eye, dot, turned
from recon.fusion.device.surfel_windows import Windows
from recon.fusion.kernels.surfels import DRAWN

_STEPS = 2.0**40  # of the largest weight: 2^23 surfels may share a pixel before the sum leaves int64
Drawn = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


def splat(columns: dict[str, torch.Tensor], eye: Eye, size: tuple[int, int], slab: float, cap: float) -> torch.Tensor:
    """[height,width] float32 z-depth as `kernels.surfels.splat` draws it, 0 where there is no front face.

    size: (width, height). slab: planes within it behind the nearest are averaged, by weight. cap: the largest weight.
    """
    width, height = size
    if not len(columns["weight"]):
        return torch.zeros((height, width), device=eye.focal.device)
    near, behind, mass = _passes(columns, eye, size, slab, _STEPS / cap)
    mean = near + slab * (behind.to(torch.float64) / mass.clamp(min=1))
    return torch.where(torch.isfinite(near), mean, 0.0).to(torch.float32).reshape(height, width)


def _passes(
    columns: dict[str, torch.Tensor], eye: Eye, size: tuple[int, int], slab: float, steps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nearest depth [H*W] float32, inf where there is none; sums of weighted offsets behind it, in slabs, and of
    weights [H*W] int64, `steps` a unit of weight). On CUDA one kernel a pass; elsewhere its twin below."""
    if eye.focal.is_cuda:
        from recon.fusion.device.surfel_launch import splat as launched

        return launched(columns, eye, size, slab, steps)
    near = torch.full((size[0] * size[1],), torch.inf, device=eye.focal.device)
    weight, drawn = columns["weight"].to(torch.float64), _squares(columns, eye, size)
    for _, pixel, depth in drawn():
        near.scatter_reduce_(0, pixel, torch.where(depth > 0, depth, torch.inf).to(torch.float32), "amin")
    behind, mass = torch.zeros((2, len(near)), dtype=torch.int64, device=near.device)
    for row, pixel, depth in drawn():
        offset = depth - near[pixel]
        part = torch.where((depth > 0) & (offset <= slab), weight[row] * steps, 0.0)
        mass.scatter_add_(0, pixel, torch.floor(part + 0.5).to(torch.int64))
        behind.scatter_add_(0, pixel, torch.floor(part * (offset / slab) + 0.5).to(torch.int64))
    return near, behind, mass


def _squares(columns: dict[str, torch.Tensor], eye: Eye, size: tuple[int, int]) -> Drawn:
    """All (row, pixel, depth) of the squares on the image, depth where the pixel's ray meets the surfel's plane; to be
    gone through as often as needed, and kept where they are few."""
    planes, windows = _planes(columns, eye, size)

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
    """Tangent planes in the camera frame: normal [N,3], offset of the plane [N], depth of the centre [N], and how far
    from it the plane is trusted to tilt [N]; float64."""

    eye: Eye
    normal: torch.Tensor
    offset: torch.Tensor
    z: torch.Tensor
    reach: torch.Tensor

    def depth(self, row: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """z-depth [P] at which the rays of pixels meet the planes of rows."""
        normal, z, reach = self.normal[row], self.z[row], self.reach[row]
        x, y = (normal[:, :2] * (torch.stack([u, v], 1) - self.eye.centre) / self.eye.focal).unbind(1)
        along = x + y + normal[:, 2]
        met = torch.where(along < -0.1, self.offset[row] / along, z)
        return torch.minimum(torch.maximum(met, z - reach), z + reach)


def _planes(columns: dict[str, torch.Tensor], eye: Eye, size: tuple[int, int]) -> tuple[_Planes, Windows]:
    """Planes of all surfels and the pixels that their squares cover: none for back faces and what is behind."""
    local = eye.seen(columns["position"].to(torch.float64))
    normal = turned(eye.R_in, columns["normal"].to(torch.float64))
    offset = dot(normal, local)
    shown = (local[:, 2] > 1e-9) & (offset < 0)
    local[:, 2] = torch.where(shown, local[:, 2], 1.0)
    side = DRAWN * columns["radius"].to(torch.float64) / local[:, 2]
    half, centre = (side[:, None] * eye.focal).clamp_(min=0.5), eye.pixels(local)
    left, top = torch.ceil(centre - half).to(torch.int64).unbind(1)
    right, bottom = torch.floor(centre + half).to(torch.int64).unbind(1)
    right = torch.where(shown, right, -1)  # and with it the width is 0
    windows = Windows.clipped(left, right, top, bottom, (size[1], size[0]))
    z, reach = local[:, 2], 3 * half[:, 0] * local[:, 2] / eye.focal[0]
    return _Planes(eye, normal, offset, z, reach), windows
