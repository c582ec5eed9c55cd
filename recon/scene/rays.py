"""Rays against boxes, spheres and cylinders, batched over scenes, without a loop over rays or primitives.

Everything is element-wise on [S,P,N] tensors (S scenes, P primitives, N rays) and kept as separate x, y, z: no matrix
product, so neither TF32 nor autocast can take precision away on a GPU, and no reduction over a last axis of three. Rays
come last, so that the innermost loops are long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ELEMENTS_CPU, ELEMENTS_GPU = 1 << 17, 1 << 26
"""Rays times primitives held at once: on a CPU what stays in its cache, on a GPU what fills it (some GiB)."""
BUNDLE = 2048
"""Neighbouring rays of one origin that are tested together on a CPU, and only against what they may meet."""
SLACK = 2e-3
"""Radians by which a bundle's cone is widened: more than single precision takes away from its angle."""

XYZ = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Solids:
    """Primitives of S scenes with equal counts. centre, half [S,P,3], rotation [S,P,3,3] (world from local)."""

    counts: tuple[int, int, int]
    centre: Tensor
    rotation: Tensor
    half: Tensor


def nearest(solids: Solids, origin: Tensor, direction: Tensor, t_min: float = 1e-4) -> tuple[Tensor, Tensor]:
    """First surface along each ray beyond `t_min`, in units of the direction's length.

    origin: [S,1,3] or [S,N,3]; direction: [S,N,3], any length. A ray that starts inside a solid meets its far side.
    Returns t [S,N], inf where nothing is met, and the primitive's index [S,N] int64 (meaningless where t is inf).
    """
    if direction.device.type == "cpu" and len(direction) == 1 and origin.shape[1] == 1:
        bundles = [_bundle(solids, origin, part, t_min) for part in torch.split(direction, BUNDLE, dim=1)]
        return torch.cat([t for t, _ in bundles], dim=1), torch.cat([index for _, index in bundles], dim=1)
    budget = ELEMENTS_CPU if direction.device.type == "cpu" else ELEMENTS_GPU
    block = max(budget // (len(direction) * sum(solids.counts)), 64)
    count = direction.shape[1]
    starts = origin if origin.shape[1] == 1 else origin.expand(-1, count, -1)
    parts = [
        _nearest(
            solids, starts if starts.shape[1] == 1 else starts[:, at : at + block], direction[:, at : at + block], t_min
        )
        for at in range(0, count, block)
    ]
    return torch.cat([t for t, _ in parts], dim=1), torch.cat([index for _, index in parts], dim=1)


def _bundle(solids: Solids, origin: Tensor, direction: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
    """`_nearest` for rays of one scene from one point, without the primitives beside all of them: the same result."""
    kept = _ahead(solids, origin[0, 0].double(), direction[0])
    boxes, spheres, _ = solids.counts
    bounds = torch.tensor([boxes, boxes + spheres, sum(solids.counts)])
    first, second, third = torch.searchsorted(kept, bounds).tolist()
    few = Solids(
        (first, second - first, third - second), solids.centre[:, kept], solids.rotation[:, kept], solids.half[:, kept]
    )
    t, index = _nearest(few, origin, direction, t_min)
    return t, kept[index]


def _ahead(solids: Solids, origin: Tensor, direction: Tensor) -> Tensor:
    """Ascending numbers of the primitives whose bounding sphere meets the cone around all rays [N,3]; one at least."""
    rays = torch.nn.functional.normalize(direction, dim=-1)
    axis = torch.nn.functional.normalize(rays.mean(dim=0), dim=0)
    spread = torch.acos((rays @ axis).min().double().clamp(-1, 1)) + SLACK
    boxes, spheres, _ = solids.counts
    half = solids.half[0].double()
    radius = half.norm(dim=-1)
    radius[boxes : boxes + spheres] = half[boxes : boxes + spheres, 0]
    away = solids.centre[0].double() - origin
    distance = away.norm(dim=-1)
    aside = torch.acos(((away @ axis.double()) / distance.clamp_min(1e-12)).clamp(-1, 1))
    meets = aside <= spread + torch.asin((radius / distance.clamp_min(1e-12)).clamp(max=1))
    meets |= distance <= radius * (1 + SLACK)
    kept = (meets & (half > 0).all(dim=-1)).nonzero()[:, 0]
    return kept if len(kept) else kept.new_zeros(1)


def _nearest(solids: Solids, origin: Tensor, direction: Tensor, t_min: float) -> tuple[Tensor, Tensor]:
    boxes, spheres, _ = solids.counts
    ranges = ((0, boxes, _box), (boxes, boxes + spheres, _sphere), (boxes + spheres, sum(solids.counts), _cylinder))
    hits = []
    for start, stop, intersect in ranges:
        if stop > start:
            o, d, half = _local(solids, origin, direction, start, stop)
            hits.append(intersect(o, d, half, t_min))
    t, index = torch.cat(hits, dim=1).min(dim=1)
    return t, index


def _local(solids: Solids, origin: Tensor, direction: Tensor, start: int, stop: int) -> tuple[XYZ, XYZ, XYZ]:
    """Rays in the frames of primitives start..stop, as x, y, z of [S,P,N] (or [S,P,1]), and half extents [S,P,1]."""
    centre, rotation, half = (value[:, start:stop, None] for value in (solids.centre, solids.rotation, solids.half))
    o = [origin[:, None, :, axis] - centre[..., axis] for axis in range(3)]
    d = [direction[:, None, :, axis].contiguous() for axis in range(3)]

    def turned(v: list[Tensor], axis: int) -> Tensor:
        out = v[0] * rotation[..., 0, axis]
        return out.addcmul_(v[1], rotation[..., 1, axis]).addcmul_(v[2], rotation[..., 2, axis])

    return (
        (turned(o, 0), turned(o, 1), turned(o, 2)),
        (turned(d, 0), turned(d, 1), turned(d, 2)),
        (half[..., 0], half[..., 1], half[..., 2]),
    )


def _choose(near: Tensor, far: Tensor, hit: Tensor, t_min: float) -> Tensor:
    """The first of the two crossings that lies ahead, inf where there is none."""
    t = torch.where(near > t_min, near, far)
    return t.masked_fill_(hit.logical_and_(t > t_min).logical_not_(), torch.inf)


def _slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves |x| <= half. The tiny addend keeps rays parallel to the slab finite."""
    inverse = (d + 1e-20).reciprocal_()
    middle = inverse * -o
    reach = inverse.abs_().mul_(half)
    return middle - reach, middle.add_(reach)


def _box(o: XYZ, d: XYZ, half: XYZ, t_min: float) -> Tensor:
    near, far = _slab(o[0], d[0], half[0])
    for axis in (1, 2):
        enter, leave = _slab(o[axis], d[axis], half[axis])
        torch.maximum(near, enter, out=near)
        torch.minimum(far, leave, out=far)
    return _choose(near, far, near < far, t_min)


def _sphere(o: XYZ, d: XYZ, half: XYZ, t_min: float) -> Tensor:
    """From the foot of the perpendicular, which keeps single precision where b^2 - c would lose it."""
    inverse = 1 / (d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    foot = -(o[0] * d[0] + o[1] * d[1] + o[2] * d[2]) * inverse
    x, y, z = (o[axis] + foot * d[axis] for axis in range(3))
    room = half[0] * half[0].abs() - (x * x + y * y + z * z)  # a negative radius stays negative: disabled
    reach = (room.clamp_min(0) * inverse).sqrt()
    return _choose(foot - reach, foot + reach, room > 0, t_min)


def _cylinder(o: XYZ, d: XYZ, half: XYZ, t_min: float) -> Tensor:
    inverse = 1 / (d[0] * d[0] + d[1] * d[1]).clamp_min(1e-12)
    foot = -(o[0] * d[0] + o[1] * d[1]) * inverse
    x, y = o[0] + foot * d[0], o[1] + foot * d[1]
    room = half[0] * half[0].abs() - (x * x + y * y)
    reach = (room.clamp_min(0) * inverse).sqrt()
    enter, leave = _slab(o[2], d[2], half[2])
    near, far = torch.maximum(foot - reach, enter), torch.minimum(foot + reach, leave)
    return _choose(near, far, (room > 0) & (near < far), t_min)
