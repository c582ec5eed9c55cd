"""What a scene is: flat arrays of primitives with textures, lights and motions, and a builder to compose them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from recon.geometry.views import Array

Vector = tuple[float, float, float]


class Shape(IntEnum):
    """Kinds of primitives, each in its own frame: centre at the origin, `half` = half extents.

    A box spans +-half. A sphere has the radius half[0]. A cylinder stands along z with the radius half[0] and the
    caps at +-half[2].
    """

    BOX = 0
    SPHERE = 1
    CYLINDER = 2


class Texture(IntEnum):
    """Solid textures in the primitive's own frame; `period` is their main length in world units."""

    NOISE = 0
    CHECKS = 1
    STRIPES = 2
    WOOD = 3
    PLANKS = 4
    BRICKS = 5
    PAINTING = 6
    CARPET = 7


@dataclass(frozen=True)
class Material:
    """Two linear colours mixed by a texture. `detail`: amplitude of the fine grain; `glow`: light that it gives off."""

    first: Vector
    second: Vector
    texture: Texture = Texture.NOISE
    period: float = 0.2
    detail: float = 0.25
    glow: float = 0.0


@dataclass(frozen=True)
class Motion:
    """Offset `swing * sin(2 pi (time / period + phase))` per axis, and a turn about z at `spin` rad/s."""

    swing: Vector = (0.0, 0.0, 0.0)
    period: float = 1.0
    phase: Vector = (0.0, 0.0, 0.0)
    spin: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One scene at one time: P primitives sorted by shape, L lights. World: metres, z up, floor at z = 0.

    counts: primitives per shape, in the order of `Shape`. centre [P,3], rotation [P,3,3] (world from local), half [P,3]
    (negative: disabled), colors [P,2,3] linear, texture [P], period [P], detail [P], glow [P], salt [P] (texture seed),
    moving [P] bool, motions {primitive: Motion}. room [2,3]: lower and upper corner. lights [L,3], light_colors [L,3];
    light 0 casts shadows. ambient [3].
    """

    counts: tuple[int, int, int]
    centre: Array
    rotation: Array
    half: Array
    colors: Array
    texture: NDArray[np.int64]
    period: Array
    detail: Array
    glow: Array
    salt: NDArray[np.int64]
    moving: NDArray[np.bool_]
    motions: dict[int, Motion]
    room: Array
    lights: Array
    light_colors: Array
    ambient: Array

    def at(self, time_s: float) -> Scene:
        """The scene with its moving objects where they are at `time_s`."""
        centre, rotation = self.centre.copy(), self.rotation.copy()
        for index, motion in self.motions.items():
            phase = 2 * np.pi * (time_s / motion.period + np.array(motion.phase))
            centre[index] += np.array(motion.swing) * np.sin(phase)
            rotation[index] = turn(motion.spin * time_s) @ rotation[index]
        return replace(self, centre=centre, rotation=rotation)

    def static(self) -> Scene:
        """The scene without its moving objects: they stay in the arrays, disabled."""
        return replace(self, half=np.where(self.moving[:, None], -1.0, self.half))


@dataclass(frozen=True)
class Rig:
    """C fixed cameras of one size. K [C,3,3] pixels (centres at integers), T_world_cam [C,4,4]."""

    K: Array
    T_world_cam: Array
    width: int
    height: int


@dataclass
class _Item:
    shape: Shape
    centre: Array
    rotation: Array
    half: Vector
    material: Material
    motion: Motion | None


@dataclass
class Builder:
    """Collects primitives. `group(at, yaw)` sets the frame that the following ones are placed in."""

    rng: np.random.Generator
    origin: Array = field(default_factory=lambda: np.zeros(3))
    yaw: float = 0.0
    items: list[_Item] = field(default_factory=list)

    def group(self, x: float, y: float, yaw: float = 0.0, z: float = 0.0) -> Builder:
        """A builder of the same scene whose primitives are placed relative to (x, y, z), turned by `yaw`."""
        origin = self.origin + turn(self.yaw) @ np.array([x, y, z])
        return Builder(self.rng, origin, self.yaw + yaw, self.items)

    def add(
        self,
        shape: Shape,
        centre: Vector,
        half: Vector,
        material: Material,
        rotation: Array | None = None,
        motion: Motion | None = None,
    ) -> None:
        """One primitive in the group's frame; `rotation` turns it about its own centre."""
        frame = turn(self.yaw)
        local = np.eye(3) if rotation is None else rotation
        self.items.append(_Item(shape, self.origin + frame @ np.array(centre), frame @ local, half, material, motion))

    def box(self, centre: Vector, size: Vector, material: Material, rotation: Array | None = None) -> None:
        """A box of full `size`."""
        self.add(Shape.BOX, centre, (size[0] / 2, size[1] / 2, size[2] / 2), material, rotation)

    def sphere(self, centre: Vector, radius: float, material: Material) -> None:
        self.add(Shape.SPHERE, centre, (radius, radius, radius), material)

    def cylinder(
        self, centre: Vector, radius: float, height: float, material: Material, rotation: Array | None = None
    ) -> None:
        """A capped cylinder of full `height`."""
        self.add(Shape.CYLINDER, centre, (radius, radius, height / 2), material, rotation)

    def scene(self, room: Array, lights: Array, light_colors: Array, ambient: Array) -> Scene:
        """Everything collected, as flat arrays sorted by shape."""
        salts = self.rng.integers(1, 1 << 20, len(self.items))  # before sorting: later items change no earlier one's
        order = sorted(range(len(self.items)), key=lambda number: self.items[number].shape)
        items = [self.items[number] for number in order]
        kinds = [item.shape for item in items]
        materials = [item.material for item in items]
        return Scene(
            counts=(kinds.count(Shape.BOX), kinds.count(Shape.SPHERE), kinds.count(Shape.CYLINDER)),
            centre=np.array([item.centre for item in items]),
            rotation=np.array([item.rotation for item in items]),
            half=np.array([item.half for item in items]),
            colors=np.array([(material.first, material.second) for material in materials]),
            texture=np.array([material.texture for material in materials], np.int64),
            period=np.array([material.period for material in materials]),
            detail=np.array([material.detail for material in materials]),
            glow=np.array([material.glow for material in materials]),
            salt=salts[order],
            moving=np.array([item.motion is not None for item in items]),
            motions={index: item.motion for index, item in enumerate(items) if item.motion is not None},
            room=room,
            lights=lights,
            light_colors=light_colors,
            ambient=ambient,
        )


def turn(angle: float) -> Array:
    """[3,3] rotation about z by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def tilt(angle: float) -> Array:
    """[3,3] rotation about x by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
