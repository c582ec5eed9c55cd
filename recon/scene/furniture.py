"""Furniture from boxes, spheres and cylinders. Every piece stands on the floor of its group, its front towards -y."""

from __future__ import annotations

import numpy as np

from recon.scene.description import Builder, Material, Texture, Vector, tilt, turn
from recon.scene.palette import Palette, cloth, painted, patterned, shade, wood

METAL = Material((0.10, 0.10, 0.11), (0.22, 0.22, 0.24), Texture.NOISE, 0.1, 0.3)
PAPER = Material((0.75, 0.72, 0.64), (0.9, 0.88, 0.82), Texture.STRIPES, 0.012, 0.15)


def table(b: Builder, palette: Palette, width: float, depth: float, height: float) -> None:
    """Top and four legs, with a few things on it."""
    top = wood(palette.wood)
    b.box((0, 0, height - 0.025), (width, depth, 0.05), top)
    for x in (-1, 1):
        for y in (-1, 1):
            b.box(
                (x * (width / 2 - 0.07), y * (depth / 2 - 0.07), (height - 0.05) / 2), (0.07, 0.07, height - 0.05), top
            )
    _vase(b, palette, b.rng.uniform(-0.12, 0.12), 0.05, height)
    _books(b, palette, -width * 0.3, -depth * 0.1, height)
    bowl = b.rng.uniform(0.08, 0.11)
    b.sphere((width * 0.28, depth * b.rng.uniform(-0.2, 0.2), height + bowl), bowl, patterned(b.rng, palette))
    mug = painted(palette.accent(b.rng))
    b.cylinder((width * 0.08, -depth * 0.3, height + 0.05), 0.042, 0.10, mug)


def chair(b: Builder, palette: Palette) -> None:
    """A wooden chair with a checked seat, its back towards +y."""
    frame, seat = wood(palette.wood), cloth(palette.accent(b.rng), Texture.CHECKS, 0.05)
    b.box((0, 0, 0.44), (0.44, 0.44, 0.06), seat)
    for x in (-0.19, 0.19):
        b.box((x, -0.19, 0.205), (0.045, 0.045, 0.41), frame)
        b.box((x, 0.19, 0.45), (0.045, 0.045, 0.9), frame)
    b.box((0, 0.19, 0.74), (0.335, 0.03, 0.24), frame)


def sofa(b: Builder, palette: Palette, width: float) -> None:
    """Base, back, arms, seat cushions and two loose cushions."""
    fabric = cloth(palette.fabric)
    seats = cloth(shade(palette.fabric, 1.25))
    b.box((0, 0, 0.16), (width, 0.85, 0.22), fabric)
    b.box((0, 0.34, 0.5), (width, 0.2, 0.62), fabric, tilt(-0.08))
    for side in (-1, 1):
        b.box((side * (width / 2 - 0.09), -0.02, 0.34), (0.18, 0.85, 0.56), fabric)
        b.box((side * (width / 4 - 0.05), -0.07, 0.34), (width / 2 - 0.13, 0.66, 0.15), seats)
        cushion = cloth(
            palette.accent(b.rng), (Texture.STRIPES, Texture.CARPET, Texture.CHECKS)[int(b.rng.integers(3))], 0.07
        )
        lean = tilt(-0.35) @ turn(0.0)
        b.box((side * (width / 2 - 0.42), 0.13, 0.58), (0.42, 0.13, 0.40), cushion, turn(side * -0.2) @ lean)


def shelf(b: Builder, palette: Palette, width: float, height: float, boards: int) -> None:
    """Two sides, a back, boards, and a row of books or a vase on each board."""
    depth, board = 0.32, wood(palette.wood)
    for side in (-1, 1):
        b.box((side * (width / 2 - 0.0125), 0, height / 2), (0.025, depth, height), board)
    b.box((0, depth / 2 - 0.01, height / 2), (width - 0.05, 0.02, height), painted(shade(palette.accent_wall, 1.1)))
    gap = (height - 0.1) / boards
    for level in range(boards + 1):
        z = 0.05 + level * gap
        b.box((0, -0.01, z), (width - 0.05, depth - 0.02, 0.03), board)
        if level < boards:
            _row_of_books(b, palette, width - 0.12, z + 0.015, gap - 0.06)


def cabinet(b: Builder, palette: Palette, width: float) -> None:
    """A low chest with drawers and knobs, a lamp and a box on it."""
    body, front = wood(palette.wood, 0.2), painted(palette.accent(b.rng))
    b.box((0, 0, 0.42), (width, 0.45, 0.72), body)
    columns = 2 if width < 1.3 else 3
    for column in range(columns):
        x = (column - (columns - 1) / 2) * width / columns
        for z in (0.26, 0.59):
            b.box((x, -0.228, z), (width / columns - 0.05, 0.02, 0.28), front)
            b.sphere((x, -0.25, z), 0.022, METAL)
    for x in (-1, 1):
        b.box((x * (width / 2 - 0.06), 0, 0.03), (0.06, 0.4, 0.06), METAL)
    shade_color = shade(palette.wall, 1.0)
    b.cylinder((-width * 0.3, 0.03, 0.90), 0.03, 0.24, METAL)
    lamp = Material(shade_color, shade(shade_color, 0.9), Texture.STRIPES, 0.02, 0.1, glow=0.9)
    b.cylinder((-width * 0.3, 0.03, 1.12), 0.14, 0.2, lamp)
    b.box((width * 0.25, 0.0, 0.86), (0.3, 0.22, 0.16), patterned(b.rng, palette), turn(b.rng.uniform(-0.4, 0.4)))


def floor_lamp(b: Builder, palette: Palette) -> None:
    """A standing lamp with a glowing globe."""
    b.cylinder((0, 0, 0.02), 0.15, 0.04, METAL)
    b.cylinder((0, 0, 0.78), 0.018, 1.52, METAL)
    glow = Material(shade(palette.wall, 1.1), palette.wall, Texture.NOISE, 0.1, 0.1, glow=1.2)
    b.sphere((0, 0, 1.62), 0.17, glow)


def plant(b: Builder, palette: Palette) -> None:
    """A pot with leaves as overlapping balls."""
    b.cylinder((0, 0, 0.17), 0.17, 0.34, patterned(b.rng, palette))
    b.cylinder((0, 0, 0.55), 0.025, 0.5, wood((0.2, 0.12, 0.06)))
    green = Material((0.02, 0.09, 0.02), (0.18, 0.38, 0.08), Texture.NOISE, 0.05, 0.6)
    for _ in range(6):
        angle, out = b.rng.uniform(0, 2 * np.pi), b.rng.uniform(0.05, 0.2)
        radius = b.rng.uniform(0.11, 0.19)
        b.sphere((out * np.cos(angle), out * np.sin(angle), b.rng.uniform(0.75, 1.2)), radius, green)


def rug(b: Builder, palette: Palette, width: float, depth: float) -> None:
    """A flat patterned rug."""
    first, second = palette.accent(b.rng), palette.wall
    if first == second:
        second = palette.fabric
    b.box((0, 0, 0.006), (width, depth, 0.012), Material(first, second, Texture.CARPET, 0.13, 0.4))


def picture(b: Builder, palette: Palette, x: float, z: float, width: float, height: float) -> None:
    """A framed painting on the wall behind the group's y = 0."""
    frame = wood(palette.wood) if b.rng.random() < 0.6 else METAL
    b.box((x, -0.015, z), (width + 0.08, 0.03, height + 0.08), frame)
    art = Material(
        palette.accent(b.rng), palette.accent(b.rng), Texture.PAINTING, float(b.rng.uniform(0.12, 0.3)), 0.15
    )
    b.box((x, -0.03, z), (width, 0.024, height), art)


def window(b: Builder, x: float, z: float, width: float, height: float) -> None:
    """A bright pane with bars and a sill."""
    white = painted((0.8, 0.8, 0.78))
    sky = Material((0.32, 0.5, 0.8), (0.85, 0.92, 1.0), Texture.NOISE, 0.45, 0.05, glow=0.8)
    b.box((x, -0.02, z), (width + 0.12, 0.04, height + 0.12), white)
    b.box((x, -0.035, z), (width, 0.02, height), sky)
    b.box((x, -0.045, z), (0.04, 0.03, height), white)
    b.box((x, -0.045, z), (width, 0.03, 0.04), white)
    b.box((x, -0.08, z - height / 2 - 0.07), (width + 0.25, 0.16, 0.035), white)


def clutter(b: Builder, palette: Palette, size: float) -> None:
    """One box, ball, drum or stack of two on the floor."""
    material, kind = patterned(b.rng, palette), int(b.rng.integers(4))
    if kind == 0:
        b.sphere((0, 0, size / 2), size / 2, material)
    elif kind == 1:
        b.cylinder((0, 0, size * 0.6), size * 0.45, size * 1.2, material)
    else:
        b.box((0, 0, size * 0.4), (size * 1.2, size, size * 0.8), material)
        if kind == 2:
            b.box((0.03, 0, size * 1.05), (size * 0.7, size * 0.6, size * 0.5), patterned(b.rng, palette), turn(0.5))


def _vase(b: Builder, palette: Palette, x: float, y: float, z: float) -> None:
    material = patterned(b.rng, palette)
    b.sphere((x, y, z + 0.085), 0.09, material)
    b.cylinder((x, y, z + 0.2), 0.035, 0.14, material)


def _books(b: Builder, palette: Palette, x: float, y: float, z: float) -> None:
    """A stack of three lying books."""
    for _ in range(3):
        thick = float(b.rng.uniform(0.025, 0.045))
        size: Vector = (float(b.rng.uniform(0.2, 0.27)), float(b.rng.uniform(0.15, 0.19)), thick)
        b.box((x, y, z + thick / 2), size, patterned(b.rng, palette), turn(float(b.rng.uniform(-0.35, 0.35))))
        z += thick


def _row_of_books(b: Builder, palette: Palette, width: float, z: float, room: float) -> None:
    """Blocks of standing books with a gap, or an ornament."""
    x, stop = -width / 2, width / 2
    while x < stop - 0.12:
        if b.rng.random() < 0.28:
            radius = min(0.075, room / 2 - 0.01)
            b.sphere((x + 0.11, -0.04, z + radius), radius, patterned(b.rng, palette))
            x += 0.24
            continue
        thick, tall = float(b.rng.uniform(0.09, 0.22)), room * float(b.rng.uniform(0.65, 0.98))
        spines = Material(palette.accent(b.rng), shade(palette.accent(b.rng), 0.6), Texture.STRIPES, 0.034, 0.2)
        b.box((x + thick / 2, 0.0, z + tall / 2), (thick, 0.2, tall), spines)
        x += thick + 0.015
