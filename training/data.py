"""Training data: a pool of procedural rooms, and fresh cameras, exposure and noise for every step, all on the device.

A batch is a function of (seed, step) alone, so a run that is resumed sees what an undisturbed run would have seen.
Seeds below 10 000 are never trained on: 0..199 are the held-out scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recon.scene.description import Scene
from recon.scene.generate import generate
from recon.scene.render import SceneTensors, stack
from training.fast import Renderer

FIRST_SEED = 10_000
VIEWS = (1, 2, 3, 4, 6, 8)
VIEW_SHARES = (0.04, 0.14, 0.16, 0.36, 0.18, 0.12)
CANDIDATES = 24
"""Positions drawn per camera; the first that stands clear of everything is taken."""
CLEARANCE = 0.22
"""Least distance of a camera from any surface, metres."""


@dataclass(frozen=True)
class Batch:
    """B scenes of V views. images [B,V,3,H,W] 0..1, depth [B,V,H,W] metres, pose [B,V,4,4] T_world_cam, K [B,V,3,3]."""

    images: Tensor
    depth: Tensor
    pose: Tensor
    K: Tensor


def make_pool(count: int, device: torch.device, workers: int, first: int = FIRST_SEED) -> SceneTensors:
    """`count` rooms with the seeds first.., their moving objects at a moment that the seed picks."""
    seeds = range(first, first + count)
    if workers < 2:
        return stack([moment(seed) for seed in seeds], device)
    with ProcessPoolExecutor(workers) as pool:
        return stack(list(pool.map(moment, seeds, chunksize=max(count // (8 * workers), 1))), device)


def moment(seed: int) -> Scene:
    """A room with 0 to 3 moving objects, at a time between 0 and 10 s."""
    rng = np.random.default_rng([seed, 9])
    return generate(seed, int(rng.integers(4))).at(float(rng.uniform(0, 10)))


class Stream:
    """Batches of `images` images each, by step."""

    def __init__(self, pool: SceneTensors, size: tuple[int, int], images: int, seed: int, compiled: bool) -> None:
        self.pool, self.size, self.images, self.seed = pool, size, images, seed
        self.device = pool.room.device
        self.render = Renderer(pool, size[1], size[0], compiled)
        self.generator = torch.Generator(self.device)

    def batch(self, step: int, views: int | None = None) -> Batch:
        """The batch of a step; `views` fixes the number of views instead of drawing it."""
        picked = np.random.default_rng([self.seed, step]).choice(VIEWS, p=VIEW_SHARES)
        V = views or int(picked)
        B = self.images // V
        g = self.generator.manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(len(self.pool.room), (B,), generator=g, device=self.device)
        K = intrinsics(B, V, self.size, g, self.device)
        pose = cameras(self.pool, rows, V, g)
        exposure = 0.65 + 0.9 * self._rand(g, B, 1) + 0.15 * (2 * self._rand(g, B, V) - 1)
        flat = rows.repeat_interleave(V)
        rgb, depth = self.render(flat, K.flatten(0, 1), pose.flatten(0, 1), exposure.flatten())
        rgb = self._sensor(rgb, g)
        H, W = self.size
        return Batch(rgb.view(B, V, 3, H, W), depth.view(B, V, H, W), pose, K)

    def _sensor(self, rgb: Tensor, g: torch.Generator) -> Tensor:
        """White balance, a soft lens, and noise, each of a random amount, then 8 bits."""
        M = len(rgb)
        rgb = rgb * (1 + 0.06 * (2 * self._rand(g, M, 3, 1, 1) - 1))
        soft = torch.nn.functional.avg_pool2d(rgb, 3, 1, 1, count_include_pad=False)
        rgb = torch.lerp(rgb, soft, 0.8 * self._rand(g, M, 1, 1, 1))
        noise = torch.randn(rgb.shape, generator=g, device=self.device)
        rgb = rgb + noise * (4 / 255 * self._rand(g, M, 1, 1, 1))
        return (rgb.clamp(0, 1) * 255).round() / 255

    def _rand(self, g: torch.Generator, *shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=self.device)


def intrinsics(B: int, V: int, size: tuple[int, int], g: torch.Generator, device: torch.device) -> Tensor:
    """[B,V,3,3]: horizontal fields of view of 40 to 90 degrees, a third of them about the demo's; equal within a rig in
    three of four scenes."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=device)

    one = torch.where(rand(B, 1) < 0.35, 60 + 12 * rand(B, 1), 40 + 50 * rand(B, 1))
    many = 40 + 50 * rand(B, V)
    fov = torch.deg2rad(torch.where(rand(B, 1) < 0.75, one.expand(B, V), many))
    H, W = size
    focal = W / 2 / torch.tan(fov / 2)
    K = torch.zeros(B, V, 3, 3, device=device)
    K[..., 0, 0] = K[..., 1, 1] = focal
    K[..., 0, 2], K[..., 1, 2], K[..., 2, 2] = (W - 1) / 2, (H - 1) / 2, 1
    return K


def cameras(pool: SceneTensors, rows: Tensor, V: int, g: torch.Generator) -> Tensor:
    """[B,V,4,4] T_world_cam. Half of the rigs are arcs on the -y side as a user would place them, a quarter arcs on any
    side, the rest scattered through the room or a short walk; all look at what lies around a common point."""
    device, B = rows.device, len(rows)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, device=device)

    def signed(*shape: int) -> Tensor:
        return 2 * rand(*shape) - 1

    room = pool.room[rows]
    size = room[:, 1] - room[:, 0]
    kind = rand(B, 1, 1)
    N = CANDIDATES
    spread = torch.deg2rad(10 + 25 * rand(B, 1, 1)).clamp(max=np.deg2rad(150) / max(V, 1))
    turn = torch.where(kind < 0.5, 0.25 * signed(B, 1, 1), np.pi * signed(B, 1, 1))
    place = torch.rand(B, V, generator=g, device=device).argsort(1)[..., None].float() - (V - 1) / 2
    ordered = torch.arange(V, device=device).float()[None, :, None] - (V - 1) / 2
    place = torch.where(rand(B, 1, 1) < 0.6, ordered, place)
    angle = turn + place * spread + 0.06 * signed(B, V, N)
    reach = (size[:, :2] / 2 - 0.35)[:, None, None]
    radius = torch.where(kind < 0.5, 0.9 + 0.1 * rand(B, V, N), 0.55 + 0.45 * rand(B, V, N))
    arc = torch.stack([angle.sin(), -angle.cos()], -1) * reach * radius[..., None]
    free = signed(B, V, N, 2) * reach
    start = free[:, :1]
    walk = start + 0.5 * signed(B, V, N, 2)
    ground = torch.where((kind < 0.75)[..., None], arc, torch.where((kind < 0.9)[..., None], free, walk))
    high = torch.where(kind < 0.5, 1.4 + 0.7 * rand(B, V, N), 0.8 + 1.4 * rand(B, V, N))
    eye = torch.cat([ground, high[..., None]], -1)
    eye = _first_clear(pool, rows, eye, g)
    middle = torch.cat([torch.zeros_like(size[:, :1]), 0.12 * size[:, 1:2], torch.full_like(size[:, :1], 0.7)], -1)
    wide = torch.where(kind[:, 0] < 0.5, 0.3, 0.9) * signed(B, 3) * torch.tensor([1.0, 1.0, 0.5], device=device)
    aim = (middle + wide)[:, None] + 0.25 * signed(B, V, 3)
    roll = torch.where(kind[..., 0] < 0.5, 0.05, 0.2) * signed(B, V)
    return look_at(eye, aim, roll)


def _first_clear(pool: SceneTensors, rows: Tensor, eye: Tensor, g: torch.Generator) -> Tensor:
    """eye [B,V,N,3] -> the first candidate of each camera that is clear of all primitives and inside the room."""
    B, V, N, _ = eye.shape
    room = pool.room[rows]
    points = eye.flatten(1, 2)
    offset = points[:, :, None] - pool.solids.centre[rows][:, None]
    local = (offset[..., :, None] * pool.solids.rotation[rows][:, None]).sum(-2)
    half = pool.solids.half[rows][:, None]
    outside = (local.abs() - half).clamp_min(0).norm(dim=-1)  # to the bounding box: safe for spheres and cylinders
    outside = torch.where(half[..., 0] < 0, torch.inf, outside).amin(-1).view(B, V, N)
    margin = torch.minimum(eye - room[:, None, None, 0], room[:, None, None, 1] - eye).amin(-1)
    clear = (outside > CLEARANCE) & (margin > CLEARANCE)
    first = torch.where(clear.any(-1), clear.int().argmax(-1), (outside + margin.clamp(max=0) * 10).argmax(-1))
    return eye.gather(2, first[..., None, None].expand(B, V, 1, 3))[:, :, 0]


def look_at(eye: Tensor, aim: Tensor, roll: Tensor) -> Tensor:
    """[...,4,4] T_world_cam as `recon.scene.generate.look_at`, batched. Closer than 0.4 m to its aim, a camera looks
    past it."""
    towards = aim - eye
    level = towards[..., :2]
    level = level / level.norm(dim=-1, keepdim=True).clamp_min(1e-6) * level.norm(dim=-1, keepdim=True).clamp_min(0.4)
    z = torch.nn.functional.normalize(torch.cat([level, towards[..., 2:]], -1), dim=-1)
    up = torch.zeros_like(z)
    up[..., 2] = 1
    x = torch.nn.functional.normalize(torch.linalg.cross(z, up), dim=-1)
    y = torch.linalg.cross(z, x)
    c, s = roll.cos()[..., None], roll.sin()[..., None]
    T = torch.zeros(*eye.shape[:-1], 4, 4, device=eye.device)
    T[..., :3, 0], T[..., :3, 1], T[..., :3, 2], T[..., :3, 3], T[..., 3, 3] = c * x + s * y, c * y - s * x, z, eye, 1
    return T


def held_out(seeds: Sequence[int]) -> list[Scene]:
    """The scenes of evaluation: as generated, at time 0."""
    return [generate(seed) for seed in seeds]
