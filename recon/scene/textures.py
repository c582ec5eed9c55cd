"""Solid procedural textures with detail at every scale, filtered by the size of the pixel on the surface.

Randomness is an integer hash of lattice points, so pixels are the same on every device and torch version up to
rounding. Value noise after K. Perlin's and S. Worley's lattice constructions; filter widths as in L. Gritz and
J. Hahn, "BMRT: a global illumination implementation of the RenderMan standard" (1996): fade what a pixel cannot hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.scene.description import Texture
from recon.scene.rays import XYZ

GRAIN = (0.09, 0.045, 0.02)
"""Sizes of the fine grain that every surface carries, metres."""


@dataclass(frozen=True)
class Hits:
    """What a texture is asked for, each [S,N]: point in the primitive's frame, pixel size on the surface, settings.

    first, second: [S,N,3] linear colours.
    """

    point: XYZ
    footprint: Tensor
    texture: Tensor
    period: Tensor
    detail: Tensor
    salt: Tensor
    first: Tensor
    second: Tensor


def albedo(hits: Hits) -> Tensor:
    """[S,N,3] linear reflectance."""
    x, y, z = (axis / hits.period for axis in hits.point)
    width = hits.footprint / hits.period
    salt = hits.salt
    grain = _wood(x, y, z, salt, width)
    cloud = _octaves(x, y, z, salt, width, 3)
    patterns = {
        Texture.NOISE: _contrast(cloud),
        Texture.CHECKS: 0.5 + 0.5 * _square(x, width) * _square(y, width) * _square(z, width),
        Texture.STRIPES: 0.5 + 0.5 * _square(x + y + 0.3 * _square(4 * (x + y), 4 * width), width),
        Texture.WOOD: grain,
        Texture.PLANKS: _planks(x, y, z, salt, width),
        Texture.BRICKS: _bricks(x + y, z, salt, width) * (0.8 + 0.4 * cloud),
        Texture.CARPET: _carpet(x, y, width),
    }
    mix = torch.zeros_like(x)
    for kind, pattern in patterns.items():
        mix = torch.where(hits.texture == int(kind), pattern, mix)
    color = torch.lerp(hits.first, hits.second, mix.clamp(0, 1)[..., None])
    color = torch.where((hits.texture == int(Texture.PAINTING))[..., None], _painting(x, y, z, hits, width), color)
    return color * (1 + hits.detail * _grain(hits))[..., None].clamp_min(0)


def hashed(x: Tensor, salt: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) from int32 lattice values; the multiplications wrap."""
    h = x ^ salt
    h = (h ^ (h >> 15)) * 1274126177
    h = (h ^ (h >> 13)) * 668265263
    h = h ^ (h >> 16)
    return (h & 0xFFFFFF).to(torch.float32) * (1 / 0x1000000)


def noise(x: Tensor, y: Tensor, z: Tensor, salt: Tensor) -> Tensor:
    """Value noise in [0, 1) with unit lattice and smoothstep interpolation."""
    cells = [torch.floor(axis) for axis in (x, y, z)]
    fx, fy, fz = (_smooth(axis - cell) for axis, cell in zip((x, y, z), cells, strict=True))
    hx, hy, hz = (
        cell.to(torch.int32) * prime for cell, prime in zip(cells, (374761393, 668265263, 974711), strict=True)
    )
    edges = []
    for py in (hy, hy + 668265263):
        for pz in (hz, hz + 974711):
            corner = py ^ pz
            edges.append(torch.lerp(hashed(hx ^ corner, salt), hashed((hx + 374761393) ^ corner, salt), fx))
    return torch.lerp(torch.lerp(edges[0], edges[1], fz), torch.lerp(edges[2], edges[3], fz), fy)


def _smooth(f: Tensor) -> Tensor:
    return f * f * (3 - 2 * f)


def _visible(width: Tensor) -> Tensor:
    """Weight of a pattern of unit size under a pixel of this width: 1 when fine, 0 when it would alias."""
    return (1.5 - 1.5 * width).clamp(0, 1)


def _octaves(x: Tensor, y: Tensor, z: Tensor, salt: Tensor, width: Tensor, count: int) -> Tensor:
    """Fractal sum around 0.5."""
    total = torch.full_like(x, 0.5)
    for octave in range(count):
        f = 2.0**octave
        total = total + (noise(x * f, y * f, z * f, salt + octave) - 0.5) * _visible(width * f) * 0.6**octave
    return total


def _contrast(value: Tensor) -> Tensor:
    return (0.5 + 1.6 * (value - 0.5)).clamp(0, 1)


def _square(u: Tensor, width: Tensor) -> Tensor:
    """Square wave of +-1 with half period 1, its edges as wide as the pixel; constant around u = 0."""
    triangle = ((u + 0.13).remainder(2) - 1).abs() * 2 - 1
    return (triangle / width.clamp_min(1e-3)).clamp(-1, 1)


def _line(u: Tensor, half: float, width: Tensor) -> Tensor:
    """1 within `half` of an integer, 0 elsewhere, smoothed over the pixel and fainter where the line is thinner."""
    distance = (u - torch.round(u)).abs()
    soft = width.clamp_min(1e-3)
    return ((half - distance) / soft + 0.5).clamp(0, 1) * (2 * half / soft).clamp(max=1)


def _wood(x: Tensor, y: Tensor, z: Tensor, salt: Tensor, width: Tensor) -> Tensor:
    """Growth rings along x, cut by the surface, with fibres."""
    bend = noise(x * 0.25, y, z, salt)
    rings = 0.5 + 0.5 * torch.sin(2 * math.pi * 5 * bend) * _visible(width * 4)
    fibre = (noise(x * 1.5, y * 14, z * 14, salt) - 0.5) * _visible(width * 14)
    return 0.15 + 0.65 * rings + 0.5 * fibre


def _planks(x: Tensor, y: Tensor, z: Tensor, salt: Tensor, width: Tensor) -> Tensor:
    """Boards one period wide and seven long, each with its own tone and grain, dark joints between them."""
    row = torch.floor(y)
    start = hashed(row.to(torch.int32) * 7919, salt) * 7
    board = torch.floor((x + start) / 7)
    number = (row * 131 + board * 17).to(torch.int32)
    tone = hashed(number * 31337, salt)
    grain = _wood(x * 0.5 + 9 * tone, y, z, salt + number, width)
    joint = torch.maximum(_line(y, 0.02, width), _line((x + start) / 7, 0.003, width / 7))
    return (0.15 + 0.45 * tone + 0.4 * grain) * (1 - 0.8 * joint)


def _bricks(u: Tensor, v: Tensor, salt: Tensor, width: Tensor) -> Tensor:
    """Courses half a period high in running bond; joints are 0."""
    row = torch.floor(v * 2)
    along = u + 0.5 * row.remainder(2)
    tone = hashed((row * 57 + torch.floor(along) * 131).to(torch.int32) * 7919, salt)
    joint = torch.maximum(_line(v * 2, 0.06, width * 2), _line(along, 0.03, width))
    return (0.35 + 0.65 * tone) * (1 - joint)


def _carpet(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Nested diamonds, mirrored about both axes, over a fine weave."""
    ax, ay = x.abs(), y.abs()
    diamonds = _square(ax + ay, 1.5 * width) * _square(2 * (ax - ay), 3 * width)
    bands = _square(torch.maximum(ax, ay) * 0.5, 0.5 * width)
    weave = _square(8 * x, 8 * width) * _square(8 * y, 8 * width) * _visible(8 * width)
    return 0.5 + 0.25 * diamonds + 0.2 * bands + 0.1 * weave


def _painting(x: Tensor, y: Tensor, z: Tensor, hits: Hits, width: Tensor) -> Tensor:
    """Warped noise through a cosine palette: brush strokes of many colours, half way towards the two given."""
    warp = noise(x, y, z, hits.salt + 5)
    m = _octaves(x + 2 * warp, y - 2 * warp, z + warp, hits.salt, width, 3)
    steps = torch.floor(m * 7) / 7
    channels = [
        0.45 + 0.45 * torch.cos(2 * math.pi * (2 * steps + hashed(hits.salt * 3 + channel, 77))) for channel in range(3)
    ]
    base = torch.lerp(hits.first, hits.second, steps.clamp(0, 1)[..., None])
    return torch.lerp(torch.stack(channels, dim=-1), base, 0.55)


def _grain(hits: Hits) -> Tensor:
    """Zero-mean speckle that does not depend on the period, about +-1."""
    total = torch.zeros_like(hits.footprint)
    for octave, size in enumerate(GRAIN):
        x, y, z = (axis / size for axis in hits.point)
        total = total + (noise(x, y, z, hits.salt + 11 + octave) - 0.5) * _visible(hits.footprint / size)
    return total * 1.2
