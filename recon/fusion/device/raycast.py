"""Depth from a truncated signed distance field in a `BlockPool`.

`kernels.raycast` walks each ray with steps as long as the field allows, which is right for a core that runs one ray at
a time. Here all rays are sampled a voxel apart where blocks are near, in few large operations: every change of sign on
nearest voxels is a candidate, all candidates are solved for the zero of the trilinear interpolant at once, and each ray
takes its nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recon.fusion.device.inputs import pinhole, rigid, turned
from recon.fusion.device.pool import BlockPool, pack
from recon.fusion.kernels.blocks import SIDE
from recon.geometry.views import Array

_CLOSE = 2e-3  # of the truncation: under a hundredth of a voxel, as in kernels.raycast
_SAMPLES = {"cuda": 1 << 23, "cpu": 1 << 18}  # looked up at once: launches are few on a GPU, caches small on a CPU


def cast(
    pool: BlockPool, cameras: Sequence[tuple[Array, Array]], size: tuple[int, int], voxel: float, least: int
) -> torch.Tensor:
    """[C,height,width] float32 z-depth of cameras (K, T_world_cam), 0 where a ray meets no surface.

    The rays of all cameras go through the field together. size: (width, height). least: observations that every corner
    of the interpolation needs.
    """
    width, height = size
    if not pool.size:
        return torch.zeros((len(cameras), height, width), device=pool.device)
    rays, origins = zip(*(_rays(K, pose, size, voxel, pool.device) for K, pose in cameras), strict=True)
    field = _Field(pool, torch.cat(origins), torch.cat(rays), least)
    index, near, far = field.candidates()
    hits = field.solve(index, near, far)
    out = torch.full((len(cameras) * height * width,), torch.inf, dtype=torch.float64, device=pool.device)
    out = out.scatter_reduce(0, index, torch.where(hits > 0, hits, torch.inf), "amin")
    return torch.where(torch.isfinite(out), out, 0.0).to(torch.float32).reshape(len(cameras), height, width)


def _rays(
    K: Array, T_world_cam: Array, size: tuple[int, int], voxel: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions [N,3] of a camera's rays, in voxels per unit of depth, and their origin [N,3], in voxels."""
    (width, height), (fx, fy, cx, cy), (R, t) = size, pinhole(K), rigid(T_world_cam)
    v = torch.arange(height, device=device, dtype=torch.float64)[:, None].expand(height, width)
    u = torch.arange(width, device=device, dtype=torch.float64)[None, :].expand(height, width)
    local = turned(R, (u - cx) / fx, (v - cy) / fy, 1.0)
    ray = (torch.stack(local, -1) / voxel).reshape(-1, 3)
    origin = torch.tensor(t, dtype=torch.float64, device=device) / voxel
    return ray, origin.expand(height * width, 3)


class _Field:
    """Rays: origin [N,3] in voxels, ray [N,3] in voxels per unit of depth, one [N] depth per voxel."""

    def __init__(self, pool: BlockPool, origin: torch.Tensor, ray: torch.Tensor, least: int) -> None:
        self.pool, self.origin, self.ray, self.least = pool, origin, ray, least
        self.one = 1.0 / ray.norm(dim=1)
        self.tsdf, self.weight = pool.tsdf.reshape(-1), pool.weight.reshape(-1)
        shift = torch.arange(8, device=pool.device)
        self.corners = torch.stack([shift & 1, (shift >> 1) & 1, shift >> 2], 1)

    def candidates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ray index, depth before and depth behind each change from positive to not positive on nearest voxels."""
        begin, end = self._span()
        rays = torch.nonzero(begin < end)[:, 0]
        if not len(rays):
            empty = begin[:0]
            return rays, empty, empty
        begin, one = begin[rays] + 1e-3 * self.one[rays], self.one[rays]
        parts = int(((end[rays] - begin) / one).max().item()) // SIDE + 1
        most, found = _SAMPLES[self.pool.device.type], []
        for some in torch.split(torch.arange(len(rays), device=rays.device), max(1, most // parts)):
            ray, part = self._stretches(rays[some], begin[some], parts)
            for few in torch.split(torch.stack([some[ray], part]), most // (SIDE + 1), dim=1):
                found.append(self._changes(rays[few[0]], begin[few[0]] + few[1] * SIDE * one[few[0]]))
        index, near, far = (torch.cat(part) for part in zip(*found, strict=True))
        return index, near, far

    def _stretches(self, rays: torch.Tensor, begin: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rays, and which stretches of 8 voxels of them, may meet a block: those with one at or next to their
        middle, as nothing on them is further from it than 4 voxels."""
        middle = (torch.arange(parts, device=rays.device) + 0.5) * SIDE
        voxels = self._nearest(rays, begin[:, None] + middle * self.one[rays, None])
        ray, part = torch.nonzero(self.pool.close(pack(*(axis >> 3 for axis in voxels))), as_tuple=True)
        return ray, part

    def _changes(self, rays: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Candidates among nine samples from `begin`, the last of which is the first of the next stretch."""
        one = self.one[rays]
        state = self._state(rays, begin[:, None] + torch.arange(SIDE + 1, device=rays.device) * one[:, None])
        ray, at = torch.nonzero((state[:, :-1] == 1) & (state[:, 1:] == 2), as_tuple=True)
        near = begin[ray] + at * one[ray]
        return rays[ray], near, near + one[ray]

    def solve(self, index: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """Zero of the interpolant around each [near, far] on ray `index`; 0 where it has none there."""
        one, at_near = self.one[index], self._trilinear(index, near)
        for _ in range(2):
            back = at_near <= 0  # false for NaN
            near, far = torch.where(back, near - one, near), torch.where(back, near, far)
            at_near = torch.where(back, self._trilinear(index, near), at_near)
        at_far = self._trilinear(index, far)
        for _ in range(2):
            on = at_far > 0
            near, at_near = torch.where(on, far, near), torch.where(on, at_far, at_near)
            far = torch.where(on, far + one, far)
            at_far = torch.where(on, self._trilinear(index, far), at_far)
        crossed = (at_near > 0) & (at_far <= 0)  # not where a corner was never observed: no surface in the mesh either
        root = self._regula_falsi(index, near, at_near, far, at_far)
        return torch.where(crossed, root, 0.0)

    def _regula_falsi(
        self, index: torch.Tensor, near: torch.Tensor, at_near: torch.Tensor, far: torch.Tensor, at_far: torch.Tensor
    ) -> torch.Tensor:
        root, done = torch.zeros_like(near), torch.zeros_like(near, dtype=torch.bool)
        for _ in range(4):
            middle = near + (far - near) * at_near / (at_near - at_far)
            value = self._trilinear(index, middle)
            stop = ~done & ~(value.abs() >= _CLOSE)  # near enough, or unknown
            root, done = torch.where(stop, middle, root), done | stop
            outside = value > 0
            near, at_near = torch.where(outside, middle, near), torch.where(outside, value, at_near)
            far, at_far = torch.where(outside, far, middle), torch.where(outside, at_far, value)
        return torch.where(done, root, near + (far - near) * at_near / (at_near - at_far))

    def _span(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Depths [N] at which rays enter and leave the box of all blocks."""
        used = self.pool.coordinates[: self.pool.size]
        low, high = used.amin(0) * 8 - 0.5 - self.origin, (used.amax(0) + 1) * 8 - 0.5 - self.origin
        safe = torch.where(self.ray.abs() > 1e-30, self.ray, 1e-30)
        p, q = low / safe, high / safe
        return torch.minimum(p, q).amax(1).clamp(min=0), torch.maximum(p, q).amin(1)

    def _state(self, rays: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """[N,K] uint8 of the nearest voxels at depths s: 1 outside, 2 inside or on and observed enough, 0 else."""
        voxels = self._nearest(rays, s)
        row = self.pool.find(pack(*(axis >> 3 for axis in voxels)))
        known = torch.nonzero(row.reshape(-1) >= 0)[:, 0]  # few: the rest of the work is on these alone
        x, y, z = (axis.reshape(-1)[known] & 7 for axis in voxels)
        at = row.reshape(-1)[known] * 512 + (z * 8 + y) * 8 + x
        enough = (self.weight[at].to(torch.int32) & 0xFFFF) >= self.least
        out = torch.zeros(s.numel(), dtype=torch.uint8, device=s.device)
        out[known] = torch.where(self.tsdf[at] > 0, 1, torch.where(enough, 2, 0)).to(torch.uint8)
        return out.reshape(s.shape)

    def _nearest(self, rays: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        """x, y and z [N,K] of the voxels nearest to depths s."""
        return [
            torch.floor(self.origin[rays, a, None] + 0.5 + s * self.ray[rays, a, None]).to(torch.int64)
            for a in range(3)
        ]

    def _trilinear(self, index: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The field at depth s on ray `index`, NaN unless all eight voxels around have `least` observations."""
        p = self.origin[index] + s[:, None] * self.ray[index]
        base = torch.floor(p)
        part = (p - base)[:, None]
        corner = base.to(torch.int64)[:, None] + self.corners
        row = self.pool.find(pack(*(corner >> 3).unbind(-1)))
        x, y, z = (corner & 7).unbind(-1)
        at = row.clamp(min=0) * 512 + (z * 8 + y) * 8 + x
        good = (row >= 0) & ((self.weight[at].to(torch.int32) & 0xFFFF) >= self.least)
        share = torch.where(self.corners > 0, part, 1 - part).prod(-1)
        return torch.where(good.all(1), (share * self.tsdf[at]).sum(1), torch.nan)
