"""Colours that go together, and the materials made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recon.scene.description import Material, Texture, Vector

_PALETTES = (
    # wall, accent wall, floor, fabric, accents ...
    ("e9e2d3", "7d9a93", "b98552", "39617a", "d9753b", "e8b84a", "6f8f5a", "8c3b3b"),
    ("dfe4e6", "b5654a", "9c6b43", "55606b", "c94f3d", "efc06c", "3f7f86", "d8d0bc"),
    ("ece5ee", "58688f", "c69a6a", "8a4f63", "e0a23d", "5d9c8f", "d86f5c", "3c4257"),
    ("e6e9dc", "8f9f6b", "a8764d", "c08a3e", "3e6a66", "d7603f", "73578a", "ead9b0"),
    ("f0e4d8", "c58f6e", "805a3e", "4f7f6d", "b8433f", "f0c453", "456990", "9a6a94"),
)


@dataclass(frozen=True)
class Palette:
    """Linear colours by role; `accents` for everything small."""

    wall: Vector
    accent_wall: Vector
    floor: Vector
    fabric: Vector
    accents: tuple[Vector, ...]
    wood: Vector

    def accent(self, rng: np.random.Generator) -> Vector:
        """One of the accents, at random."""
        return self.accents[int(rng.integers(len(self.accents)))]


def draw_palette(rng: np.random.Generator) -> Palette:
    """One of the fixed palettes, each colour varied a little."""
    chosen = _PALETTES[int(rng.integers(len(_PALETTES)))]
    colors = [vary(linear(code), rng, 0.12) for code in chosen]
    wood = vary(linear(("8a5a33", "b78550", "5e3d28", "c9a574")[int(rng.integers(4))]), rng, 0.1)
    return Palette(colors[0], colors[1], colors[2], colors[3], tuple(colors[3:]), wood)


def linear(code: str) -> Vector:
    """`rrggbb` in display gamma to linear."""
    r, g, b = ((int(code[i : i + 2], 16) / 255) ** 2.2 for i in (0, 2, 4))
    return r, g, b


def vary(color: Vector, rng: np.random.Generator, amount: float) -> Vector:
    """The colour times 1 +- amount, per channel a quarter of it."""
    factors = (1 + amount * rng.uniform(-1, 1)) * (1 + 0.25 * amount * rng.uniform(-1, 1, 3))
    return shade(color, *factors)


def shade(color: Vector, r: float, g: float | None = None, b: float | None = None) -> Vector:
    """The colour times a factor (or one per channel), at most 1."""
    factors = (r, r if g is None else g, r if b is None else b)
    red, green, blue = (float(min(c * f, 1.0)) for c, f in zip(color, factors, strict=True))
    return red, green, blue


def wood(color: Vector, period: float = 0.16) -> Material:
    """Wood grain of two tones of the colour."""
    return Material(shade(color, 0.45), shade(color, 1.1), Texture.WOOD, period, 0.2)


def plaster(color: Vector) -> Material:
    """A wall of almost even colour."""
    return Material(shade(color, 0.82), color, Texture.NOISE, 0.5, 0.3)


def cloth(color: Vector, pattern: Texture = Texture.NOISE, period: float = 0.12) -> Material:
    """Cloth in a dark and a light tone of the colour, with a strong grain; `period`: of the pattern, in metres."""
    return Material(shade(color, 0.6), shade(color, 1.25), pattern, period, 0.4)


def painted(color: Vector) -> Material:
    """A painted surface: finer blotches than plaster, less grain than cloth."""
    return Material(shade(color, 0.75), color, Texture.NOISE, 0.3, 0.22)


def patterned(rng: np.random.Generator, palette: Palette) -> Material:
    """Any texture in two contrasting colours: for small things."""
    textures = (Texture.NOISE, Texture.CHECKS, Texture.STRIPES, Texture.BRICKS, Texture.PAINTING)
    texture = textures[int(rng.integers(len(textures)))]
    color = palette.accent(rng)
    other = shade(color, 0.25) if rng.random() < 0.5 else palette.wall
    return Material(color, other, texture, float(rng.uniform(0.05, 0.14)), 0.3)
