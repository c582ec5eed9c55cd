"""The ray caster of `recon.scene` compiled into a few kernels: every image is one batch row with its own scene.

`recon.scene.render` evaluates element by element and cuts the work into chunks, which keeps memory small. Training
wants thousands of small images a second: here the search for the nearest primitive reduces over primitives as it goes,
nothing of size images x primitives x pixels is stored, and the shading is compiled as a whole.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from recon.scene import rays, render
from recon.scene.rays import Solids
from recon.scene.render import SceneTensors

Flat = tuple[Tensor, ...]
"""centre, rotation, half, then the other tensors of `SceneTensors` in order."""


def fused_nearest(solids: Solids, origin: Tensor, direction: Tensor, t_min: float = 1e-4) -> tuple[Tensor, Tensor]:
    """As `recon.scene.rays.nearest`, without chunks and without joining the shapes before the search."""
    boxes, spheres, _ = solids.counts
    total = sum(solids.counts)
    found: tuple[Tensor, Tensor] | None = None
    for start, stop, intersect in (
        (0, boxes, rays._box), (boxes, boxes + spheres, rays._sphere), (boxes + spheres, total, rays._cylinder)
    ):  # fmt: skip
        o, d, half = rays._local(solids, origin, direction, start, stop)
        t, which = intersect(o, d, half, t_min).min(dim=1)
        if found is None:
            found = t, which + start
        else:
            found = torch.minimum(t, found[0]), torch.where(t < found[0], which + start, found[1])
    assert found is not None
    return found


def flatten(scenes: SceneTensors) -> Flat:
    """All tensors of a batch of scenes."""
    rest = [getattr(scenes, field.name) for field in fields(scenes) if field.name != "solids"]
    return (scenes.solids.centre, scenes.solids.rotation, scenes.solids.half, *rest)


def shade(
    flat: Flat, counts: tuple[int, int, int], K: Tensor, pose: Tensor, exposure: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """One image per row: K [M,3,3], T_world_cam [M,4,4], exposure [M] -> rgb [M,N,3] uint8 without noise, depth [M,N]
    (z, 0 = nothing)."""
    scenes = SceneTensors(Solids(counts, *flat[:3]), *flat[3:])
    pixels = torch.arange(width * height, device=K.device)
    view = render._View(K, pose, exposure, 0.0, 0)
    rgb, depth, *_ = render._chunk(scenes, view, pixels, width, True)
    return rgb, depth


class Renderer:
    """Renders rows of a pool of scenes. `compiled=False` is the same arithmetic without the compiler, for CPU tests."""

    def __init__(self, pool: SceneTensors, width: int, height: int, compiled: bool) -> None:
        self.flat, self.counts = flatten(pool), pool.solids.counts
        self.width, self.height = width, height
        if compiled:
            render.nearest = fused_nearest  # in this process only: the chunked search would be unrolled by the compiler
        self._shade = torch.compile(shade, dynamic=False) if compiled else shade

    @torch.no_grad()
    def __call__(self, rows: Tensor, K: Tensor, pose: Tensor, exposure: Tensor) -> tuple[Tensor, Tensor]:
        """rows [M] int64 in the pool; K [M,3,3], pose [M,4,4], exposure [M] -> rgb [M,3,H,W] 0..1, depth [M,H,W]."""
        flat = tuple(value[rows] for value in self.flat)
        rgb, depth = self._shade(flat, self.counts, K, pose, exposure, self.width, self.height)
        shape = (len(rows), self.height, self.width)
        return rgb.view(*shape, 3).permute(0, 3, 1, 2).float() / 255, depth.view(shape)


def moved(scenes: SceneTensors, device: torch.device) -> SceneTensors:
    """The batch on another device."""
    flat = tuple(value.to(device) for value in flatten(scenes))
    return SceneTensors(Solids(scenes.solids.counts, *flat[:3]), *flat[3:])
