"""A rendered room with calibrated cameras, moving objects and exact depth: input for which every answer is known."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import Array, Image, Scale, View
from recon.sources import Source, Surface

if TYPE_CHECKING:
    from recon.scene.description import Rig, Scene

SURFACE_DETAIL, SURFACE_SPACING_M = 3, 0.01
"""The ground-truth surface is seen at this multiple of the resolution and thinned to this spacing."""

KEPT_BYTES = 256 * 2**20
"""Of rendered time steps, in the process: calibration, accuracy of both networks and stream look at the same ones, and
a step takes a second to render on two cores."""
_KEPT: OrderedDict[tuple[str, int], list[View]] = OrderedDict()
_KEEPING = Lock()


@dataclass
class Synthetic(Source):
    """A procedural room and a fixed rig of cameras cam0, cam1, ... around it, in metres.

    Frame 0 bootstraps the map, frames 1 to `steps` are the stream. The moving objects are there from the start, as they
    would be before a live rig; they are no part of the ground-truth surface. `seed` sets the room and the rig.
    """

    count: int = 4
    """Cameras in the rig."""
    steps: int = 20
    """Time steps after the bootstrap."""
    width: int = 320
    """Image width, pixels."""
    height: int = 240
    """Image height, pixels."""
    fov_deg: float = 66.0
    """Horizontal field of view, degrees."""
    moving: int = 3
    """Moving objects."""
    fps: float = 15.0
    """Time steps per second."""
    noise: float = 1.5
    """Standard deviation of the sensor noise, grey levels of 255."""

    def check(self) -> None:
        super().check()
        rules = {
            "count": (1 <= self.count <= 64, "1 to 64 cameras"),
            "steps": (self.steps >= 0, "must not be negative"),
            "width": (self.width >= 16, "at least 16 pixels"),
            "height": (self.height >= 16, "at least 16 pixels"),
            "fov_deg": (10 <= self.fov_deg <= 150, "10 to 150 degrees"),
            "moving": (0 <= self.moving <= 32, "0 to 32 objects"),
            "fps": (self.fps > 0, "must be positive"),
            "noise": (self.noise >= 0, "must not be negative"),
            "seed": (self.seed >= 0, "must not be negative"),
        }
        for key, (good, rule) in rules.items():
            if not good:
                raise ReconError(
                    f"source.{key}={getattr(self, key)}: {rule}", "see conf/source/synthetic.yaml for the defaults"
                )

    def validate(self) -> None:
        self.cameras()

    def has_depth(self) -> bool:
        return True

    def cameras(self) -> list[str]:
        from recon.sources.rig import choose

        return choose(self, [f"cam{number}" for number in range(self.count)])

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(self.cameras(), (self.width, self.height))

    def bootstrap(self) -> list[View]:
        return self._views(*self._world(), 0)

    def batches(self) -> Iterator[list[View]]:
        scene, rig = self._world()
        for step in self._steps():
            yield self._views(scene, rig, step)

    def __len__(self) -> int:
        return len(self._steps())

    def content_key(self) -> str:
        from recon.scene import VERSION

        without = {"name", "steps", "frame_step", "max_batches", "views", "random_views"}
        settings = {key: value for key, value in self.settings().items() if key not in without}
        return hashlib.sha256(json.dumps([VERSION, settings, self.cameras()], sort_keys=True).encode()).hexdigest()

    def scale(self) -> Scale:
        return Scale("m", "synthetic scene")

    def surface(self) -> Surface:
        """Samples of the static scene at 1 cm, all of them seen by a camera: nothing else is in the list."""
        from recon.geometry.cameras import scale_intrinsics
        from recon.scene.description import Rig

        scene, rig = self._world()
        size, large = (rig.width, rig.height), (rig.width * SURFACE_DETAIL, rig.height * SURFACE_DETAIL)
        points, normals = [], []
        for number in self._numbers():
            K = scale_intrinsics(rig.K[number], size, large)
            found, facing = _seen(scene.static(), Rig(K[None], rig.T_world_cam[number, None], *large))
            keep = _thin(found)
            points.append(found[keep])
            normals.append(facing[keep])
        all_points, all_normals = np.concatenate(points), np.concatenate(normals)
        keep = _thin(all_points)
        return Surface(all_points[keep], all_normals[keep], np.ones(len(keep), np.bool_))

    def picture(self, K: Array, T_world_cam: Array, width: int, height: int) -> Image:
        import torch

        from recon.scene.render import render, stack

        scene = stack([self._world()[0].static()])
        pose = torch.from_numpy(T_world_cam[None, None])
        found: Image = render(scene, torch.from_numpy(K[None, None]), pose, width, height, noise=0.0).rgb[0, 0].numpy()
        return found

    def _world(self) -> tuple[Scene, Rig]:
        from recon.scene.generate import generate, rig

        scene = generate(self.seed, self.moving)
        return scene, rig(scene, self.seed, self.count, self.width, self.height, self.fov_deg)

    def _numbers(self) -> list[int]:
        return [int(name.removeprefix("cam")) for name in self.cameras()]

    def _steps(self) -> list[int]:
        steps = list(range(self.frame_step, self.steps + 1, self.frame_step))
        return steps[: self.max_batches] if self.max_batches else steps

    def _views(self, scene: Scene, rig: Rig, step: int) -> list[View]:
        """All cameras at one time step: the caller's own, rendered now or lately."""
        key = (self.content_key(), step)
        with _KEEPING:
            found = _KEPT.get(key)
        if found is None:
            found = self._rendered(scene, rig, step)
        with _KEEPING:
            _KEPT[key] = found
            _KEPT.move_to_end(key)
            while len(_KEPT) > 1 and sum(map(_size, _KEPT.values())) > KEPT_BYTES:
                _KEPT.popitem(last=False)
        return [_copy(view) for view in found]

    def _rendered(self, scene: Scene, rig: Rig, step: int) -> list[View]:
        import torch

        from recon.scene.render import render, stack

        numbers, time_s = self._numbers(), step / self.fps
        frames = render(
            stack([scene.at(time_s)]),
            torch.from_numpy(rig.K[None, numbers]),
            torch.from_numpy(rig.T_world_cam[None, numbers]),
            rig.width,
            rig.height,
            noise=self.noise,
            salts=[step * 64 + number for number in numbers],
        )
        images, depths = frames.rgb[0].numpy(), frames.depth[0].numpy()
        return [
            View(f"cam{number}", step, images[i], rig.K[number], rig.T_world_cam[number], depths[i], time_s)
            for i, number in enumerate(numbers)
        ]


def _size(views: list[View]) -> int:
    return sum(view.image.nbytes + (view.depth.nbytes if view.depth is not None else 0) for view in views)


def _copy(view: View) -> View:
    return replace(view, image=view.image.copy(), depth=view.depth.copy() if view.depth is not None else None)


def _seen(scene: Scene, rig: Rig) -> tuple[Array, Array]:
    """Points [N,3] in the world and normals [N,3] of every pixel of a one-camera rig."""
    import torch

    from recon.geometry.cameras import transform, unproject
    from recon.scene.render import render, stack

    K, pose = torch.from_numpy(rig.K[None]), torch.from_numpy(rig.T_world_cam[None])
    frames = render(stack([scene]), K, pose, rig.width, rig.height, color=False)
    depth = frames.depth[0, 0].numpy()
    points = transform(rig.T_world_cam[0], unproject(depth, rig.K[0]))
    return points[depth > 0], frames.normals[0, 0].numpy().astype(np.float64)[depth > 0]


def _thin(points: Array) -> np.ndarray:
    """Index of the first point of every voxel, in ascending order."""
    cells = np.floor(points / SURFACE_SPACING_M).astype(np.int64)
    cells -= cells.min(axis=0)
    spans = cells.max(axis=0) + 1
    _, first = np.unique((cells[:, 0] * spans[1] + cells[:, 1]) * spans[2] + cells[:, 2], return_index=True)
    return np.sort(first)
