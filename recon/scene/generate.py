"""Rooms from a seed: walls, furniture in slots along them, a group in the middle, moving objects, and camera rigs."""

from __future__ import annotations

import numpy as np

from recon.geometry.views import Array
from recon.scene import furniture
from recon.scene.description import Builder, Material, Motion, Rig, Scene, Shape, Texture
from recon.scene.palette import Palette, draw_palette, painted, patterned, plaster, shade

SLAB = 0.1
"""Thickness of walls, metres: they are boxes outside the room."""


def generate(seed: int, moving: int = 3) -> Scene:
    """A furnished room of about 5 x 4.5 x 2.6 m around the origin, z up, with `moving` moving objects.

    The same seed gives the same arrays on every platform (numpy's PCG64), and the static part does not depend on
    `moving`.
    """
    rng = np.random.default_rng([seed, 1])
    palette = draw_palette(rng)
    size = np.array([rng.uniform(4.6, 5.6), rng.uniform(4.2, 5.0), rng.uniform(2.45, 2.8)])
    b = Builder(rng)
    _room(b, palette, size)
    _middle(b, palette, size)
    _walls(b, palette, size)
    lights, colors, ambient = _lights(b, size)
    _movers(Builder(np.random.default_rng([seed, 2]), items=b.items), palette, size, moving)
    room = np.array([[-size[0] / 2, -size[1] / 2, 0.0], [size[0] / 2, size[1] / 2, size[2]]])
    return b.scene(room, lights, colors, ambient)


def rig(
    scene: Scene, seed: int, cameras: int, width: int, height: int, fov_deg: float = 66.0, spread_deg: float = 0.0
) -> Rig:
    """Fixed cameras on an arc on the -y side of the room, at eye height, looking at its middle.

    fov_deg: horizontal field of view. spread_deg: angle between neighbours; 0 = 28 degrees, less for many cameras.
    Position, aim and roll are jittered by the seed.
    """
    rng = np.random.default_rng([seed, 3])
    spread = np.deg2rad(spread_deg or min(28.0, 130.0 / max(cameras, 1)))
    focal = width / 2 / np.tan(np.deg2rad(fov_deg) / 2)
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    lower, upper = scene.room
    reach = (upper - lower)[:2] / 2 - 0.35
    middle = np.array([0.0, 0.12 * (upper - lower)[1], 0.7])
    poses = []
    for number in range(cameras):
        angle = (number - (cameras - 1) / 2) * spread + rng.uniform(-0.04, 0.04)
        ground = reach * np.array([np.sin(angle), -np.cos(angle)]) * rng.uniform(0.93, 1.0)
        eye = np.array([*ground, rng.uniform(1.5, 2.0)])
        aim = middle + rng.uniform(-1, 1, 3) * np.array([0.18, 0.15, 0.12])
        poses.append(look_at(eye, aim, rng.uniform(-0.03, 0.03)))
    return Rig(np.broadcast_to(K, (cameras, 3, 3)).copy(), np.array(poses), width, height)


def look_at(eye: Array, aim: Array, roll: float = 0.0) -> Array:
    """[4,4] T_world_cam (x right, y down, z forward) of an upright camera at `eye` looking at `aim`, then rolled."""
    z = (aim - eye) / np.linalg.norm(aim - eye)
    x = np.cross(z, (0.0, 0.0, 1.0))
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    c, s = np.cos(roll), np.sin(roll)
    T = np.eye(4)
    T[:3, 0], T[:3, 1], T[:3, 2], T[:3, 3] = c * x + s * y, c * y - s * x, z, eye
    return T


def _room(b: Builder, palette: Palette, size: Array) -> None:
    """Floor, ceiling, four walls, skirting boards."""
    w, d, h = (float(value) for value in size)
    boards = Material(shade(palette.floor, 0.45), shade(palette.floor, 1.15), Texture.PLANKS, 0.15, 0.25)
    b.box((0, 0, -SLAB / 2), (w + 2 * SLAB, d + 2 * SLAB, SLAB), boards)
    b.box((0, 0, h + SLAB / 2), (w + 2 * SLAB, d + 2 * SLAB, SLAB), plaster((0.8, 0.79, 0.76)))
    wall = plaster(palette.wall)
    accent = plaster(palette.accent_wall)
    if b.rng.random() < 0.4:
        accent = Material(shade(palette.accent_wall, 0.6), shade(palette.accent_wall, 1.2), Texture.BRICKS, 0.26, 0.4)
    elif b.rng.random() < 0.4:
        accent = Material(shade(palette.accent_wall, 0.85), palette.accent_wall, Texture.STRIPES, 0.12, 0.25)
    b.box((0, d / 2 + SLAB / 2, h / 2), (w, SLAB, h), accent)
    b.box((0, -d / 2 - SLAB / 2, h / 2), (w, SLAB, h), wall)
    for side in (-1, 1):
        b.box((side * (w / 2 + SLAB / 2), 0, h / 2), (SLAB, d, h), wall)
        b.box((side * (w / 2 - 0.008), 0, 0.05), (0.016, d, 0.1), painted((0.75, 0.74, 0.7)))
    b.box((0, d / 2 - 0.008, 0.05), (w, 0.016, 0.1), painted((0.75, 0.74, 0.7)))


def _middle(b: Builder, palette: Palette, size: Array) -> None:
    """Rug, table and chairs, or a low table; clutter around."""
    x, y = b.rng.uniform(-0.2, 0.2), b.rng.uniform(0.0, 0.25)
    yaw = b.rng.uniform(-0.35, 0.35)
    middle = b.group(x, y, yaw)
    furniture.rug(middle, palette, float(b.rng.uniform(2.0, 2.5)), float(b.rng.uniform(1.5, 1.8)))
    high = b.rng.random() < 0.6
    width, depth = float(b.rng.uniform(1.05, 1.35)), float(b.rng.uniform(0.65, 0.8))
    furniture.table(middle, palette, width, depth, 0.73 if high else 0.42)
    if high:
        furniture.chair(middle.group(-0.28, depth / 2 + 0.2, b.rng.uniform(-0.3, 0.3)), palette)
        furniture.chair(middle.group(width / 2 + 0.3, 0.0, -np.pi / 2 + b.rng.uniform(-0.3, 0.3)), palette)
    for side in (-1, 1):
        spot = b.group(
            side * size[0] * b.rng.uniform(0.28, 0.34), -size[1] * b.rng.uniform(0.08, 0.2), b.rng.uniform(0, 3)
        )
        furniture.clutter(spot, palette, float(b.rng.uniform(0.25, 0.4)))


def _walls(b: Builder, palette: Palette, size: Array) -> None:
    """A sofa at the back; shelf and cabinet at the sides, which side by chance; lamp and plant in the corners."""
    w, d = float(size[0]), float(size[1])
    back = b.group(0, d / 2)
    length = float(b.rng.uniform(1.8, 2.2))
    offset = float(b.rng.uniform(-0.3, 0.3))
    furniture.sofa(back.group(offset, -0.48), palette, length)
    count = int(b.rng.integers(2, 4))
    for number in range(count):
        place = offset + (number - (count - 1) / 2) * 0.85
        furniture.picture(
            back,
            palette,
            place,
            float(b.rng.uniform(1.5, 1.7)),
            float(b.rng.uniform(0.4, 0.65)),
            float(b.rng.uniform(0.4, 0.65)),
        )
    side = 1 if b.rng.random() < 0.5 else -1
    furniture.floor_lamp(b.group(side * (w / 2 - 0.32), d / 2 - 0.4), palette)
    furniture.plant(b.group(-side * (w / 2 - 0.36), d / 2 - 0.42), palette)
    left = b.group(-side * w / 2, 0.15, side * np.pi / 2)
    furniture.shelf(
        left.group(b.rng.uniform(-0.3, 0.3), -0.17),
        palette,
        float(b.rng.uniform(0.9, 1.3)),
        float(b.rng.uniform(1.6, 2.0)),
        4,
    )
    right = b.group(side * w / 2, 0.1, -side * np.pi / 2)
    furniture.cabinet(right.group(b.rng.uniform(-0.3, 0.1), -0.24), palette, float(b.rng.uniform(1.0, 1.5)))
    furniture.window(right, float(b.rng.uniform(-0.3, 0.3)), 1.7, 1.2, 0.9)


def _lights(b: Builder, size: Array) -> tuple[Array, Array, Array]:
    """Ceiling lamp with shadows, a fill light from behind the cameras, warm or cool."""
    x, y = float(b.rng.uniform(-0.6, 0.6)), float(b.rng.uniform(-0.6, 0.2))
    b.cylinder((x, y, float(size[2]) - 0.03), 0.22, 0.06, Material((0.9, 0.88, 0.8), (1, 1, 1), glow=1.5))
    warmth = b.rng.uniform(-0.08, 0.12)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    lights = np.array([[x, y, size[2] - 0.12], [b.rng.uniform(-1, 1), -size[1] * 0.42, 2.0]])
    colors = np.array([tint * b.rng.uniform(1.0, 1.3), [0.42, 0.42, 0.45]])
    return lights, colors, np.array([0.30, 0.30, 0.32]) * b.rng.uniform(0.85, 1.15)


def _movers(b: Builder, palette: Palette, size: Array, count: int) -> None:
    """A rolling ball, a vacuum robot, a turning box in the air over the table, and so on."""
    for number in range(count):
        side = 1 if (number + b.rng.integers(2)) % 2 else -1
        x, y = (float(value) for value in size[:2] * (side * b.rng.uniform(0.29, 0.34), b.rng.uniform(0.08, 0.16)))
        along, across, up = (float(value) for value in b.rng.uniform((0.4, 0.03, 0.1), (0.65, 0.1, 0.2)))
        phase = (float(b.rng.uniform()), float(b.rng.uniform()), float(b.rng.uniform()))
        period, material = float(b.rng.uniform(2.0, 3.5)), patterned(b.rng, palette)
        radius = float(b.rng.uniform(0.12, 0.17))
        floor = Motion((across, along, 0.0), period, phase, 2.0)
        if number % 3 == 0:
            b.add(Shape.SPHERE, (x, y, radius), (radius,) * 3, material, motion=floor)
        elif number % 3 == 1:
            b.add(Shape.CYLINDER, (-x, y, 0.07), (0.19, 0.19, 0.06), material, motion=floor)
        else:
            half = (radius * 0.9, radius * 0.6, radius * 0.5)
            air = Motion((along, across, up), period, phase, 1.5)
            b.add(Shape.BOX, (0.3 * x, y, float(b.rng.uniform(1.1, 1.3))), half, material, motion=air)
