"""Colour, depth, normals and masks of many cameras in many scenes: one function, any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from recon.scene.description import Scene, Shape
from recon.scene.rays import Solids, nearest
from recon.scene.textures import Hits, albedo, hashed

PIXELS_CPU, PIXELS_GPU = 1 << 14, 1 << 21
"""Pixels shaded at once, over all scenes: on a CPU what one task takes, on a GPU what fills it."""
TILE = 32
"""Side of the squares in whose order pixels are shaded: rays beside each other meet the same few primitives."""


@dataclass(frozen=True)
class SceneTensors:
    """S scenes with equal counts on one device; fields as in `Scene` with a leading S, float32."""

    solids: Solids
    colors: Tensor
    texture: Tensor
    period: Tensor
    detail: Tensor
    glow: Tensor
    salt: Tensor
    moving: Tensor
    room: Tensor
    lights: Tensor
    light_colors: Tensor
    ambient: Tensor


@dataclass(frozen=True)
class Frames:
    """rgb [S,C,H,W,3] uint8, depth [S,C,H,W] float32 z-depth (0 = nothing), normals [S,C,H,W,3] float32 (world, towards
    the camera, 0 where there is nothing), primitive [S,C,H,W] int32 (-1 = nothing), moving [S,C,H,W] bool."""

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    primitive: Tensor
    moving: Tensor


def stack(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> SceneTensors:
    """Scenes as one batch. Scenes with fewer primitives of a shape are padded with disabled ones.

    Primitive numbers in `Frames.primitive` count within the padded arrays; for a single scene they are its own.
    """
    counts = np.max([scene.counts for scene in scenes], axis=0)

    def tensor(name: str, disabled: float, dtype: torch.dtype = torch.float32) -> Tensor:
        padded = [_padded(getattr(scene, name), scene.counts, counts, disabled) for scene in scenes]
        return torch.as_tensor(np.stack(padded), dtype=dtype, device=device)

    def plain(name: str) -> Tensor:
        return torch.as_tensor(np.stack([getattr(s, name) for s in scenes]), dtype=torch.float32, device=device)

    boxes, spheres, cylinders = (int(count) for count in counts)
    return SceneTensors(
        Solids((boxes, spheres, cylinders), tensor("centre", 0), tensor("rotation", 0), tensor("half", -1)),
        colors=tensor("colors", 0),
        texture=tensor("texture", 0, torch.int32),
        period=tensor("period", 1),
        detail=tensor("detail", 0),
        glow=tensor("glow", 0),
        salt=tensor("salt", 0, torch.int32),
        moving=tensor("moving", 0, torch.bool),
        room=plain("room"),
        lights=plain("lights"),
        light_colors=plain("light_colors"),
        ambient=plain("ambient"),
    )


def _padded(values: np.ndarray, have: Sequence[int], want: Sequence[int], disabled: float) -> np.ndarray:
    parts, start = [], 0
    for count, target in zip(have, want, strict=True):
        fill = np.full((target - count, *values.shape[1:]), disabled, values.dtype)
        parts += [values[start : start + count], fill]
        start += count
    return np.concatenate(parts)


@torch.no_grad()
def render(
    scenes: SceneTensors,
    K: Tensor,
    T_world_cam: Tensor,
    width: int,
    height: int,
    *,
    color: bool = True,
    exposure: Tensor | float = 1.0,
    noise: float = 1.5,
    salts: Sequence[int] = (),
) -> Frames:
    """Render C cameras in each of S scenes.

    K [S,C,3,3] pixels, zero skew; T_world_cam [S,C,4,4]. color=False leaves rgb black and saves the shading and the
    shadow rays. exposure: a number or [S,C]. noise: standard deviation of the sensor noise in grey levels of 255; it
    follows from the scene and the camera's entry in `salts` (its number where empty).
    """
    S, C = K.shape[:2]
    gain = torch.as_tensor(exposure, dtype=torch.float32, device=K.device).expand(S, C)
    pixels = _tiled(width, height).to(K.device)
    step = max((PIXELS_CPU if K.device.type == "cpu" else PIXELS_GPU) // S, 64)
    parts = torch.split(pixels, step)
    views = [
        _View(K[:, c].float(), T_world_cam[:, c].float(), gain[:, c], noise, salts[c] if salts else c) for c in range(C)
    ]
    tasks = [partial(_chunk, scenes, view, part, width, color) for view in views for part in parts]
    chunks = _run(tasks, K.device.type == "cpu")
    back = torch.argsort(pixels)
    cameras = [
        [torch.cat(pieces, dim=1)[:, back] for pieces in zip(*chunks[at : at + len(parts)], strict=True)]
        for at in range(0, len(chunks), len(parts))
    ]
    rgb, depth, normals, primitive, moving = (torch.stack(parts, dim=1) for parts in zip(*cameras, strict=True))
    shape = (S, C, height, width)
    return Frames(
        rgb.view(*shape, 3), depth.view(shape), normals.view(*shape, 3), primitive.view(shape), moving.view(shape)
    )


def _tiled(width: int, height: int) -> Tensor:
    """Numbers of all pixels, square by square, rows of squares from left to right and back."""
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // TILE)
    row, column = v // TILE, u // TILE
    tile = row * across + torch.where(row % 2 == 0, column, across - 1 - column)
    return torch.argsort(tile.flatten(), stable=True)


def _run(tasks: Sequence[Callable[[], tuple[Tensor, ...]]], cpu: bool) -> list[tuple[Tensor, ...]]:
    """All results, in order. On a CPU whole tasks run beside each other, each on one core.

    Torch's own threads meet after every operation, and each waits for the slowest: where other programs use the cores,
    that took up to ten times longer than one core alone, and 1.5 times longer even with OMP_WAIT_POLICY=PASSIVE.
    """
    threads = torch.get_num_threads()
    if not cpu:
        return [task() for task in tasks]
    try:
        with ThreadPoolExecutor(threads, "render", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.no_grad()(lambda task: task()), tasks))
    finally:
        torch.set_num_threads(threads)  # the number is partly of the process, not only of the pool's threads


@dataclass(frozen=True)
class _View:
    """One camera of each scene: K [S,3,3], pose [S,4,4], exposure [S]."""

    K: Tensor
    pose: Tensor
    exposure: Tensor
    noise: float
    salt: int


def _chunk(scenes: SceneTensors, view: _View, pixels: Tensor, width: int, color: bool) -> tuple[Tensor, ...]:
    """rgb, depth, normals, primitive, moving of some pixels of one camera, each [S,N,...]."""
    K, pose = view.K[:, None], view.pose[:, None]
    x = ((pixels % width) - K[..., 0, 2]) / K[..., 0, 0]
    y = (pixels // width - K[..., 1, 2]) / K[..., 1, 1]
    direction = (
        x[..., None] * pose[..., :3, 0] + y[..., None] * pose[..., :3, 1] + pose[..., :3, 2]
    )  # z = 1: t is depth
    origin = pose[..., :3, 3]
    t, index = nearest(scenes.solids, origin, direction)
    hit = torch.isfinite(t)
    depth = torch.where(hit, t, 0)
    point = origin + depth[..., None] * direction
    local, normal = _normals(scenes.solids, index, point, direction)
    normal = torch.where(hit[..., None], normal, 0)
    if color:
        cosine = (normal * direction).sum(-1).abs() / direction.norm(dim=-1)
        footprint = depth / K[..., 0, 0] / cosine.clamp_min(0.2).sqrt()
        shaded = _shade(scenes, _hits(scenes, index, local, footprint), index, point, normal)
        rgb = _expose(torch.where(hit[..., None], shaded, 0), view, pixels, scenes.salt[:, :1])
    else:
        rgb = torch.zeros(normal.shape, dtype=torch.uint8, device=normal.device)
    moving = scenes.moving.gather(1, index) & hit
    return rgb, depth, normal, torch.where(hit, index, -1).to(torch.int32), moving


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values [S,P,...] at index [S,N] -> [S,N,...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _normals(solids: Solids, index: Tensor, point: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The point in its primitive's frame and the world normal towards the camera, both [S,N,3]."""
    boxes, spheres, _ = solids.counts
    rotation, half = _rows(solids.rotation, index), _rows(solids.half, index)
    offset = point - _rows(solids.centre, index)
    local = (offset[..., :, None] * rotation).sum(-2)
    face = torch.nn.functional.one_hot((local / half).abs().argmax(-1), 3) * local.sign()
    radial = local * local.new_tensor([1.0, 1.0, 0.0])
    cap = (local[..., 2] / half[..., 2]).abs() > radial.norm(dim=-1) / half[..., 0]
    axis = local.new_tensor([0.0, 0.0, 1.0]) * local
    shape = torch.where(index < boxes, int(Shape.BOX), torch.where(index < boxes + spheres, int(Shape.SPHERE), 2))
    normal = torch.where(cap[..., None], axis, radial)
    normal = torch.where((shape == int(Shape.SPHERE))[..., None], local, normal)
    normal = torch.where((shape == int(Shape.BOX))[..., None], face, normal)
    normal = torch.nn.functional.normalize((normal[..., None, :] * rotation).sum(-1), dim=-1)
    return local, torch.where((normal * direction).sum(-1, keepdim=True) > 0, -normal, normal)


def _hits(scenes: SceneTensors, index: Tensor, local: Tensor, footprint: Tensor) -> Hits:
    colors = _rows(scenes.colors, index)
    texture, period, detail, salt = (
        values.gather(1, index) for values in (scenes.texture, scenes.period, scenes.detail, scenes.salt)
    )
    x, y, z = local.unbind(-1)
    return Hits((x, y, z), footprint, texture, period, detail, salt, colors[..., 0, :], colors[..., 1, :])


def _shade(scenes: SceneTensors, hits: Hits, index: Tensor, point: Tensor, normal: Tensor) -> Tensor:
    """[S,N,3] linear light: ambient from above, Lambert from each light, a shadow from light 0, darker room corners."""
    light = scenes.ambient[:, None] * (0.75 + 0.25 * normal[..., 2:])
    for number in range(scenes.lights.shape[1]):
        lamp = scenes.lights[:, None, number]
        away = point - lamp
        distance = away.norm(dim=-1)
        lambert = (-(away * normal).sum(-1) / distance).clamp_min(0) / (0.5 + 0.25 * distance * distance)
        if number == 0:
            t, _ = nearest(scenes.solids, lamp, away)
            lambert = torch.where((1 - t) * distance > 0.012, 0.0, lambert)  # beyond the thickness of a rug's pile
        light = light + lambert[..., None] * scenes.light_colors[:, None, number]
    glow = scenes.glow.gather(1, index)[..., None]
    return albedo(hits) * (light * _corners(scenes.room, point, normal)[..., None] + glow)


def _corners(room: Tensor, point: Tensor, normal: Tensor) -> Tensor:
    """[S,N] share of light left near walls, floor and ceiling that a surface stands beside: cheap ambient occlusion."""
    share = torch.ones_like(point[..., 0])
    for side, sign in ((0, 1.0), (1, -1.0)):
        distance = (sign * (point - room[:, None, side])).clamp_min(0)
        across = (1 - sign * normal).clamp(0, 1)
        share = share * (1 - 0.45 * across * torch.exp(-distance / 0.18)).prod(-1)
    return share


def _expose(light: Tensor, view: _View, pixels: Tensor, salt: Tensor) -> Tensor:
    """Linear light to 8 bits: saturating response, display gamma, sensor noise from a hash."""
    value = (1 - torch.exp(-1.6 * light * view.exposure[:, None, None])).clamp(1e-6, 1) ** (1 / 2.2) * 255
    if view.noise > 0:
        seed = (salt + view.salt * 7919).to(torch.int32)[..., None] * 16807
        number = ((pixels * 3)[:, None] + torch.arange(3, device=pixels.device)).to(torch.int32) * 5 ^ seed
        uniform = sum((hashed(number + k, 1234567) for k in range(4)), torch.zeros((), device=pixels.device))
        value = value + view.noise * 1.732 * (uniform - 2)  # a sum of four uniforms has the variance 1/3
    return (value + 0.5).clamp(0, 255).to(torch.uint8)
