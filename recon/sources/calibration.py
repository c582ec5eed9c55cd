"""What is known of the cameras of a source, and how a camera image becomes a view with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.distortion import Lens, Undistortion, straighten
from recon.geometry.rig import Rig
from recon.geometry.views import Array, DepthImage, Image, View
from recon.sources import Calibrated
from recon.sources.rig import read_intrinsics, read_poses

FIRST_POSE_NAMED = "give one pose per camera ([cameras,4,4]); a rig that moves needs source=images"


@dataclass(frozen=True)
class Optics:
    """A camera's lens for images of one size, and the undistortion that its images need, if any."""

    lens: Lens
    size: tuple[int, int]

    @cached_property
    def undistortion(self) -> Undistortion | None:
        """Made once per camera; so are its tables."""
        return straighten(self.lens, self.size) if self.lens.bends else None

    @property
    def K(self) -> Array:  # noqa: N802 - the field's own name
        """Intrinsics [3,3] of the views."""
        return self.lens.K if self.undistortion is None else self.undistortion.K


@dataclass
class Calibration:
    """Optics and poses by camera, empty where unknown.

    poses: [1,4,4] for a fixed camera, else [frames,4,4]. by_image: [4,4] by camera and stem of the image's file.
    """

    optics: dict[str, Optics]
    poses: dict[str, Array] = field(default_factory=dict)
    by_image: dict[tuple[str, str], Array] = field(default_factory=dict)
    trusted: bool = False

    def pose(self, camera: str, frame: int, stem: str = "") -> Array | None:
        """T_world_cam of one frame; None where nothing is known of it."""
        if camera in self.poses:
            own = self.poses[camera]
            return np.asarray(own[frame if len(own) > 1 else 0])
        return self.by_image.get((camera, stem))

    def moves(self, camera: str) -> bool:
        """Whether poses are known image by image: a frame without one is then of no use."""
        return any(name == camera for name, _ in self.by_image)

    def view(
        self,
        camera: str,
        frame: int,
        image: Image,
        *,
        stem: str = "",
        depth: DepthImage | None = None,
        time_s: float | None = None,
    ) -> View:
        """The view of a camera image: undistorted, where its lens bends, with the K of the result."""
        pose = self.pose(camera, frame, stem)
        known = self.optics.get(camera)
        if known is None:
            return View(camera, frame, image, None, pose, depth, time_s, pose_trusted=self.trusted)
        bent = known.undistortion
        if bent is not None:
            image, depth = bent.image(image), None if depth is None else bent.depth(depth)
        return View(camera, frame, image, known.K, pose, depth, time_s, bent, self.trusted)

    def plain(self) -> list[Any]:
        """Everything that changes views, as plain data for keys."""
        optics = {
            camera: [o.lens.K.tolist(), o.lens.coefficients, o.lens.fisheye]
            for camera, o in sorted(self.optics.items())
        }
        poses = {camera: value.tolist() for camera, value in sorted(self.poses.items())}
        return [self.trusted, optics, poses, [[*key, value.tolist()] for key, value in sorted(self.by_image.items())]]


def calibrate(
    source: Calibrated,
    available: Sequence[str],
    sizes: dict[str, tuple[int, int]],
    counts: dict[str, int] | None = None,
    named: bool = False,
) -> Calibration:
    """Read what a source's options name, for the cameras in `sizes` (camera -> width, height of its images).

    counts: frames per camera where poses may be given per frame; None where only a fixed rig makes sense. named: frames
    are image files, whose poses a rig may list.

    Raises:
        ReconError: unreadable files, a camera that they lack, intrinsics of another image size, two files that both
            give the same thing.
    """
    rig = source._rig()
    lenses: dict[str, Lens] = {}
    found = Calibration({}, trusted=rig is not None if source.trust_poses is None else source.trust_poses)
    if source.intrinsics:
        lenses = read_intrinsics(Path(source.intrinsics), available, list(sizes)).lens
    if source.poses:
        found.poses = read_poses(Path(source.poses), available, counts or dict.fromkeys(sizes, 1))
    if rig is not None:
        _one_of(rig, source)
        if not source.intrinsics:
            lenses = {camera: lens for camera in sizes if (lens := rig.lens(camera)) is not None}
        if not source.poses:
            _rig_poses(rig, list(sizes), found, named)
    where = source.intrinsics or source.rig
    for camera, lens in lenses.items():
        if lens.size is not None and lens.size != sizes[camera]:
            raise ReconError(
                f"{where}: K of camera {camera} is for {_by(lens.size)}, its images are {_by(sizes[camera])}",
                "scale K to the images and store their width and height",
            )
    found.optics = {camera: Optics(lens, sizes[camera]) for camera, lens in lenses.items()}
    return found


def _rig_poses(rig: Rig, cameras: list[str], found: Calibration, may_move: bool) -> None:
    for camera in cameras:
        entry = rig.fixed(camera)
        if entry is None and not may_move:
            raise ReconError(f"{rig.where}: camera {camera} moves, by its poses", FIRST_POSE_NAMED)
        if entry is None:
            found.by_image |= {(camera, stem): pose for stem, pose in rig.images(camera).items()}
        elif entry.T_world_cam is not None:
            found.poses[camera] = entry.T_world_cam[None]


def _one_of(rig: Rig, source: Calibrated) -> None:
    """A rig and a file of its own may not both give optics, or both poses."""
    entries = list(rig.entries.values())
    if source.intrinsics and any(entry.lens is not None for entry in entries):
        raise ReconError(
            f"source.intrinsics={source.intrinsics} and source.rig={source.rig} both give intrinsics", "leave one out"
        )
    if source.poses and any(entry.T_world_cam is not None for entry in entries):
        raise ReconError(f"source.poses={source.poses} and source.rig={source.rig} both give poses", "leave one out")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
