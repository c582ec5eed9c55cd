"""A frame into surfels: every surfel reads the pixel it projects to, and pixels that none explains spawn new ones.

The rules, and the order of every sum, are those of `kernels.surfels`; float64 in between as there. Rows are columns of
`recon.fusion.surfel`: nothing here changes them, new values are returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon.fusion.device.inputs import Pinhole, pinhole, rigid, turned
from recon.fusion.device.surfel_windows import Windows
from recon.fusion.kernels.surfels import FACING
from recon.fusion.surfel import Surfel, base
from recon.geometry.cameras import invert
from recon.geometry.views import Array

Columns = dict[str, torch.Tensor]
_ROWS = 1 << 20  # surfels updated at once: bounds the temporaries to some 300 MB


@dataclass(frozen=True)
class Sight:
    """One view. depth [H,W] float32, 0 = none; image [H,W,3] uint8; unit: depth at which an observation weighs 1."""

    depth: torch.Tensor
    image: torch.Tensor
    K: Array
    T_world_cam: Array
    options: Surfel
    unit: float

    @property
    def camera(self) -> Pinhole:
        return pinhole(self.K)

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        """How far from depth z a pixel may lie along the ray and still belong to the same surface."""
        return (self.options.gate_share * z).clamp_(min=self.options.gate_voxels * self.options.voxel)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """u [W] and v [H,1], float64."""
        height, width = self.depth.shape
        u, v = (torch.arange(n, device=self.depth.device, dtype=torch.float64) for n in (width, height))
        return u, v[:, None]

    def normals(self) -> torch.Tensor:
        """[H,W,3] float64, unit, in the camera frame and towards the camera; 0 where there is none.

        From pixels `surfel.base` away on both sides, or on one where the other is missing or beyond a jump in depth.
        """
        (fx, fy, cx, cy), (u, v) = self.camera, self.grid()
        step, jump = base(self.depth.shape[1]), self.gate(self.depth.to(torch.float64))
        u0, a0 = self._neighbour(1, -step, u, jump)
        u1, a1 = self._neighbour(1, step, u, jump)
        v0, b0 = self._neighbour(0, -step, v, jump)
        v1, b1 = self._neighbour(0, step, v, jump)
        ax, az = (a1 * (u1 - cx) - a0 * (u0 - cx)) / fx, a1 - a0
        by, bz = (b1 * (v1 - cy) - b0 * (v0 - cy)) / fy, b1 - b0
        x, y = (u - cx) / fx, (v - cy) / fy
        ay, bx = az * y, bz * x
        normal = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
        nx, ny, nz = normal.unbind(-1)
        length = torch.sqrt(nx * nx + ny * ny + nz * nz)
        good = (u0 != u1) & (v0 != v1) & (length >= 1e-20)
        length = torch.where(nx * x + ny * y + nz > 0, -length, length)
        return torch.where(good[..., None], normal / length[..., None], 0.0)

    def _neighbour(
        self, axis: int, step: int, place: torch.Tensor, jump: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Place on an axis and depth of the neighbour on one side, the pixel's own where that will not do."""
        end, aim = self.depth.shape[axis] - 1, place + step
        moved = self.depth.index_select(axis, aim.clamp(0, end).to(torch.int64).flatten())
        near = (aim >= 0) & (aim <= end) & (moved > 0) & ((moved - self.depth).abs() <= jump)
        return torch.where(near, aim, place), torch.where(near, moved, self.depth)


def merge(columns: Columns, sight: Sight, normals: torch.Tensor, frame: int) -> tuple[Columns, torch.Tensor]:
    """(the columns after a frame, weight 0 where a surfel has died; [H,W] bool: pixels that a surfel explains)."""
    height, width = sight.depth.shape
    covered = torch.zeros(height * width + 1, dtype=torch.bool, device=sight.depth.device)  # the last: for no pixel
    parts = []
    for start in range(0, max(1, len(columns["weight"])), _ROWS):
        rows = {name: column[start : start + _ROWS] for name, column in columns.items()}
        stale = _stale(rows, sight, frame)
        look = _look(rows["position"], sight, ~stale)
        changed, merged = _average(rows, look, sight, normals)
        _cover(covered, rows["radius"], merged, look, sight)
        violations = torch.where(look.near, 0, rows["violations"] + look.through)
        dead = stale | (look.through & (violations >= sight.options.patience))
        changed["weight"] = torch.where(dead, 0.0, changed["weight"])
        changed |= {"last": torch.where(merged, frame, rows["last"]), "violations": violations}
        parts.append({name: changed.get(name, column).to(column.dtype) for name, column in rows.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in columns}, covered[:-1].reshape(height, width)


def spawn(sight: Sight, normals: torch.Tensor, covered: torch.Tensor) -> Columns:
    """New surfels for uncovered pixels, in scan order, one per cube of side voxel: its first pixel with a normal.

    Only position, normal, color, radius and weight.
    """
    o, (fx, fy, cx, cy), (R, t) = sight.options, sight.camera, rigid(sight.T_world_cam)
    free = (sight.depth > 0) & ~covered & (normals != 0).any(-1)
    v, u = torch.nonzero(free, as_tuple=True)
    z = sight.depth[v, u].to(torch.float64)  # integers minus a number would be float32
    x, y, ahead = turned(R, z * (u.to(torch.float64) - cx) / fx, z * (v.to(torch.float64) - cy) / fy, z)
    position = torch.stack([x + t[0], y + t[1], ahead + t[2]], 1)
    keys, order = torch.sort(_cubes(position / o.voxel), stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    chosen = order[first].sort().values
    u, v, z = u[chosen], v[chosen], z[chosen]
    return {
        "position": position[chosen].to(torch.float32),
        "normal": torch.stack(turned(R, *normals[v, u].unbind(1)), 1).to(torch.float32),
        "color": sight.image[v, u].to(torch.float32),
        "radius": (o.radius * (z / fx).clamp(min=o.voxel)).to(torch.float32),
        "weight": ((sight.unit / z) ** 2).clamp(max=o.weight_cap).to(torch.float32),
    }


@dataclass(frozen=True)
class _Look:
    """What surfels read from a frame, [N] each. x, y, z: the surfel in the camera frame, z = 1 where it is not looked
    at; u, v: its pixel; seen: the depth there; gate: see `Sight.gate`; valid: it is looked at and there is a depth."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    gate: torch.Tensor
    valid: torch.Tensor

    @property
    def through(self) -> torch.Tensor:
        return self.valid & (self.seen > self.z + self.gate)

    @property
    def near(self) -> torch.Tensor:
        return self.valid & (self.seen >= self.z - self.gate) & (self.seen <= self.z + self.gate)


def _stale(rows: Columns, sight: Sight, frame: int) -> torch.Tensor:
    """Which are too light to stay unseen for so long; a frame without depth ages nothing."""
    light = rows["weight"].to(torch.float64) < sight.options.stale_weight
    return (sight.depth > 0).any() & light & (frame - rows["last"] > sight.options.stale_frames)


def _look(position: torch.Tensor, sight: Sight, awake: torch.Tensor) -> _Look:
    (fx, fy, cx, cy), (R, t) = sight.camera, rigid(invert(sight.T_world_cam))
    height, width = sight.depth.shape
    x, y, z = turned(R, *position.to(torch.float64).unbind(1))
    x, y, z = x + t[0], y + t[1], z + t[2]
    ahead = awake & (z > 1e-9)
    z = torch.where(ahead, z, 1.0)
    u, v = fx * x / z + cx + 0.5, fy * y / z + cy + 0.5
    inside = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = torch.where(inside, u, 0.0).to(torch.int64), torch.where(inside, v, 0.0).to(torch.int64)
    seen = sight.depth[v, u].to(torch.float64)
    return _Look(x, y, z, u, v, seen, sight.gate(z), inside & (seen > 0))


def _average(rows: Columns, look: _Look, sight: Sight, normals: torch.Tensor) -> tuple[Columns, torch.Tensor]:
    """(position, normal, color and weight with the frame averaged in, [N] bool: where it was).

    A surfel moves along its own normal only.
    """
    (fx, fy, cx, cy), (R, _) = sight.camera, rigid(invert(sight.T_world_cam))
    measured = normals[look.v, look.u].unbind(1)
    local = turned(R, *rows["normal"].to(torch.float64).unbind(1))
    merged = look.near & (_dot(measured, local) >= FACING)
    weight = rows["weight"].to(torch.float64)
    observed = (sight.unit / look.seen) ** 2
    part = torch.where(merged, observed / (weight + observed), 0.0)
    u, v, seen = look.u.to(torch.float64), look.v.to(torch.float64), look.seen
    step = part * _dot(local, (seen * (u - cx) / fx - look.x, seen * (v - cy) / fy - look.y, seen - look.z))
    mixed = [n + part * (m - n) for n, m in zip(local, measured, strict=True)]
    length = torch.sqrt(_dot(mixed, mixed))
    back = [[R[row][axis] for row in range(3)] for axis in range(3)]
    normal = torch.stack(turned(back, *mixed), 1) / length[:, None]
    color = part[:, None] * (sight.image[look.v, look.u] - rows["color"])
    return {
        "position": rows["position"] + step[:, None] * rows["normal"],
        "normal": torch.where(merged[:, None], normal, rows["normal"]),
        "color": rows["color"] + color,
        "weight": torch.where(merged, (weight + observed).clamp(max=sight.options.weight_cap), weight),
    }, merged


def _cover(covered: torch.Tensor, radius: torch.Tensor, merged: torch.Tensor, look: _Look, sight: Sight) -> None:
    """Mark pixels within the squares of surfels, and within the gate of their depth."""
    half = (radius.to(torch.float64) * sight.camera[0] / look.z).to(torch.int64)
    right = torch.where(merged, look.u + half, -1)  # and with it the width is 0
    windows = Windows.clipped(look.u - half, right, look.v - half, look.v + half, sight.depth.shape)
    depth, width = sight.depth.reshape(-1), sight.depth.shape[1]
    for row, u, v in windows.pairs():
        pixel = v * width + u
        covered[torch.where((depth[pixel] - look.z[row]).abs() <= look.gate[row], pixel, len(covered) - 1)] = True


def _dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cubes(cells: torch.Tensor) -> torch.Tensor:
    """One int64 for each integer cube of [N,3] positions in cubes; 21 bits an axis, as in `kernels.surfels`."""
    x, y, z = (torch.floor(cells).to(torch.int64) & ((1 << 21) - 1)).unbind(1)
    return (x << 42) | (y << 21) | z
