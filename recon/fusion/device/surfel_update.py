"""A frame into surfels: every surfel reads the pixel it projects to, and pixels that none explains spawn new ones.

The rules, and the order of every sum, are those of `kernels.surfels`; float64 in between as there. Rows are columns of
`recon.fusion.surfel`: nothing here changes them, new values are returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon.fusion.device.surfel_sight import Sight, dot, turned
from recon.fusion.device.surfel_windows import Windows
from recon.fusion.kernels.surfels import FACING

Columns = dict[str, torch.Tensor]
_ROWS = 1 << 20  # surfels updated at once: bounds the temporaries to some 300 MB


def merge(columns: Columns, sight: Sight, normals: torch.Tensor, frame: int) -> tuple[Columns, torch.Tensor]:
    """(the columns after a frame, weight 0 where a surfel has died; [H,W] bool: pixels that a surfel explains).

    On CUDA one kernel does it; elsewhere its twin below.
    """
    if sight.depth.is_cuda:
        from recon.fusion.device.surfel_launch import merge as launched

        return launched(columns, sight, normals, frame)
    height, width = sight.depth.shape
    covered = torch.zeros(height * width + 1, dtype=torch.bool, device=sight.depth.device)  # the last: for no pixel
    parts = []
    for start in range(0, max(1, len(columns["weight"])), _ROWS):
        rows = {name: column[start : start + _ROWS] for name, column in columns.items()}
        stale = _stale(rows, sight, frame)
        look = _look(rows["position"], sight, ~stale)
        through = look.valid & (look.seen > look.z + look.gate)
        near = look.valid & (look.seen >= look.z - look.gate) & ~through
        changed, merged = _average(rows, look, near, sight, normals)
        _cover(covered, rows["radius"], merged, look, sight)
        violations = torch.where(near, 0, rows["violations"] + through)
        dead = stale | (through & (violations >= sight.options.patience))
        changed["weight"] = torch.where(dead, 0.0, changed["weight"])
        changed |= {"last": torch.where(merged, frame, rows["last"]), "violations": violations}
        parts.append({name: changed.get(name, column).to(column.dtype) for name, column in rows.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in columns}, covered[:-1].reshape(height, width)


def spawn(sight: Sight, normals: torch.Tensor, covered: torch.Tensor) -> Columns:
    """New surfels for uncovered pixels, in scan order, one per cube of side voxel: its first pixel with a normal.

    Only position, normal, color, radius and weight.
    """
    o, eye = sight.options, sight.eye
    at = torch.nonzero((sight.depth > 0) & ~covered & (normals != 0).any(-1))
    z = sight.depth[at[:, 0], at[:, 1]].to(torch.float64)
    position = eye.placed(eye.points(at.flip(1).to(torch.float64), z))  # an integer less a number would be float32
    keys, order = torch.sort(_cubes(position / o.voxel), stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    chosen = order[first].sort().values
    z, (v, u) = z[chosen], at[chosen].unbind(1)
    return {
        "position": position[chosen].to(torch.float32),
        "normal": turned(eye.R, normals[v, u]).to(torch.float32),
        "color": sight.image[v, u].to(torch.float32),
        "radius": (o.radius * (z / eye.focal[0]).clamp_(min=o.voxel)).to(torch.float32),
        "weight": ((sight.unit / z) ** 2).clamp_(max=o.weight_cap).to(torch.float32),
    }


@dataclass(frozen=True)
class _Look:
    """What surfels read from a frame, [N] each. local [N,3] float64: the surfel in the camera frame, z = 1 where it is
    not looked at; u, v: its pixel; seen: the depth there; gate: see `Sight.gate`; valid: looked at, and there is one.
    """

    local: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    gate: torch.Tensor
    valid: torch.Tensor

    @property
    def z(self) -> torch.Tensor:
        return self.local[:, 2]


def _stale(rows: Columns, sight: Sight, frame: int) -> torch.Tensor:
    """Which are too light to stay unseen for so long; a frame without depth ages nothing."""
    light = rows["weight"].to(torch.float64) < sight.options.stale_weight
    return (sight.depth > 0).any() & light & (frame - rows["last"] > sight.options.stale_frames)


def _look(position: torch.Tensor, sight: Sight, awake: torch.Tensor) -> _Look:
    height, width = sight.depth.shape
    local = sight.eye.seen(position.to(torch.float64))
    ahead = awake & (local[:, 2] > 1e-9)
    local[:, 2] = torch.where(ahead, local[:, 2], 1.0)
    u, v = (sight.eye.pixels(local) + 0.5).unbind(1)
    inside = ahead & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = torch.where(inside, u, 0.0).to(torch.int64), torch.where(inside, v, 0.0).to(torch.int64)
    seen = sight.depth[v, u].to(torch.float64)
    return _Look(local, u, v, seen, sight.gate(local[:, 2]), inside & (seen > 0))


def _average(
    rows: Columns, look: _Look, near: torch.Tensor, sight: Sight, normals: torch.Tensor
) -> tuple[Columns, torch.Tensor]:
    """(position, normal, color and weight with the frame averaged in, [N] bool: where it was).

    A surfel moves along its own normal only.
    """
    eye, measured = sight.eye, normals[look.v, look.u]
    held = turned(eye.R_in, rows["normal"].to(torch.float64))
    merged = near & (dot(measured, held) >= FACING)
    weight = rows["weight"].to(torch.float64)
    observed = (sight.unit / look.seen) ** 2
    part = torch.where(merged, observed / (weight + observed), 0.0)[:, None]
    pixels = torch.stack([look.u, look.v], 1).to(torch.float64)
    step = part * dot(held, eye.points(pixels, look.seen) - look.local)[:, None]
    mixed = held + part * (measured - held)
    normal = turned(eye.R_in.T, mixed) / torch.sqrt(dot(mixed, mixed))[:, None]
    return {
        "position": rows["position"] + step * rows["normal"],
        "normal": torch.where(merged[:, None], normal, rows["normal"]),
        "color": rows["color"] + part * (sight.image[look.v, look.u] - rows["color"]),
        "weight": torch.where(merged, (weight + observed).clamp_(max=sight.options.weight_cap), weight),
    }, merged


def _cover(covered: torch.Tensor, radius: torch.Tensor, merged: torch.Tensor, look: _Look, sight: Sight) -> None:
    """Mark pixels within the squares of surfels, and within the gate of their depth."""
    half = (radius * sight.eye.focal[0] / look.z).to(torch.int64)
    right = torch.where(merged, look.u + half, -1)  # and with it the width is 0
    windows = Windows.clipped(look.u - half, right, look.v - half, look.v + half, sight.depth.shape)
    depth, width = sight.depth.reshape(-1), sight.depth.shape[1]
    for row, u, v in windows.pairs():
        pixel = v * width + u
        covered[torch.where((depth[pixel] - look.z[row]).abs() <= look.gate[row], pixel, len(covered) - 1)] = True


def _cubes(cells: torch.Tensor) -> torch.Tensor:
    """One int64 for each integer cube of [N,3] positions in cubes; 21 bits an axis, as in `kernels.surfels`."""
    x, y, z = (torch.floor(cells).to(torch.int64) & ((1 << 21) - 1)).unbind(1)
    return (x << 42) | (y << 21) | z
