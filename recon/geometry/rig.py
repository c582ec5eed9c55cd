"""Several cameras as one body: optics, poses, the unit of their translations, and a known distance between two."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from recon.errors import ReconError
from recon.geometry.cameras import check_intrinsics, check_transform, invert
from recon.geometry.distortion import Lens
from recon.geometry.views import Array, Scale

SAME_POSE = 1e-6
"""Largest difference between entries of two poses that still count as one fixed pose."""


@dataclass(frozen=True)
class Baseline:
    """A distance that somebody measured: between the centres of two named cameras, in metres."""

    first: str
    second: str
    metres: float


@dataclass(frozen=True, eq=False)
class RigEntry:
    """What a rig file says of a camera, or of one image of it. T_world_cam: [4,4] or None."""

    lens: Lens | None
    T_world_cam: Array | None


@dataclass(frozen=True, eq=False)
class Rig:
    """The content of a rig file.

    entries: by camera name, or by path of an image without suffix (`cam_0/000001`, `images/0001`), as COLMAP and
    nerfstudio list them. kind: the form of the file, for messages. scale: what one unit of the translations means.
    """

    kind: str
    where: str
    entries: dict[str, RigEntry]
    scale: Scale = field(default_factory=Scale)
    baseline: Baseline | None = None

    @property
    def posed(self) -> bool:
        """Whether the file gives poses, and with them a unit."""
        return any(entry.T_world_cam is not None for entry in self.entries.values())

    def fixed(self, camera: str) -> RigEntry | None:
        """The one entry of a camera that does not move: by its name, else by its images if they share one pose.

        Returns None for a camera whose images have different poses.

        Raises:
            ReconError: the file does not know the camera.
        """
        if (key := same_name(camera, self.entries)) is not None:
            return self.entries[key]
        stems = {PurePosixPath(key).name: key for key in self.entries}
        if len(stems) == len(self.entries) and camera in stems:
            return self.entries[stems[camera]]
        own = [entry for key, entry in self.entries.items() if PurePosixPath(key).parent.name == camera]
        if not own:
            known = sorted(
                {PurePosixPath(key).parent.name or key for key in self.entries} | set(list(self.entries)[:8])
            )
            raise ReconError(
                f"{self.where}: has nothing for camera {camera!r}",
                f"it has {', '.join(known[:12])}; name the cameras alike, or leave it out with source.views",
            )
        poses = [entry.T_world_cam for entry in own]
        first = poses[0]
        still = first is not None and all(
            pose is not None and np.abs(pose - first).max() <= SAME_POSE for pose in poses
        )
        return own[0] if still else None

    def images(self, camera: str) -> dict[str, Array]:
        """T_world_cam of the images of a camera that moves, by the stem of their files."""
        paths = ((PurePosixPath(key), entry) for key, entry in self.entries.items())
        return {
            path.name: entry.T_world_cam
            for path, entry in paths
            if path.parent.name == camera and entry.T_world_cam is not None
        }

    def lens(self, camera: str) -> Lens | None:
        """The optics of a camera: those of its own entry, or of any of its images."""
        entry = self.fixed(camera)
        if entry is not None:
            return entry.lens
        return next(e.lens for key, e in self.entries.items() if PurePosixPath(key).parent.name == camera)

    def in_metres(self) -> Rig:
        """The rig scaled by its baseline, where it has one and both cameras have a pose; else itself.

        Raises:
            ReconError: the two cameras coincide, or the file's unit is metres and contradicts the baseline.
        """
        if self.baseline is None:
            return self
        first, second = (self.fixed(name) for name in (self.baseline.first, self.baseline.second))
        if first is None or second is None or first.T_world_cam is None or second.T_world_cam is None:
            return self
        found = float(np.linalg.norm(first.T_world_cam[:3, 3] - second.T_world_cam[:3, 3]))
        between = f"{self.where}: {self.baseline.first} and {self.baseline.second}"
        if found < 1e-9:
            raise ReconError(f"{between} have the same centre: a baseline cannot scale that", "correct the poses")
        factor = self.baseline.metres / found
        if self.scale.unit == "m":
            if abs(factor - 1) > 0.01:
                raise ReconError(
                    f"{between} are {found:.4g} m apart by their poses and {self.baseline.metres:.4g} m by baseline",
                    "correct one of the two, or say source.rig_unit=arbitrary to let the baseline scale the poses",
                )
            return self
        entries = {key: RigEntry(entry.lens, _scaled(entry.T_world_cam, factor)) for key, entry in self.entries.items()}
        return Rig(self.kind, self.where, entries, Scale("m", "known baseline"), self.baseline)


def same_name(camera: str, known: Iterable[str]) -> str | None:
    """The one of `known` that means this camera: the same name, or the only one that ends in the same number.

    Calibrations and time stamps often number what files name: `cam_0.mp4`, `[cameras.0]`, `cam_id 0`.
    """
    names = list(known)
    if camera in names:
        return camera
    number = _number(camera)
    if number is None:
        return None
    alike = [name for name in names if _number(name) == number and (name.isdigit() or camera.isdigit())]
    return alike[0] if len(alike) == 1 else None


def make_lens(
    K: object, coefficients: object, fisheye: bool, size: tuple[int, int] | None, where: str, centre: float = 0.0
) -> Lens:
    """A checked lens. `centre`: where the file puts the centre of the first pixel (0.5 in COLMAP and nerfstudio)."""
    matrix = check_intrinsics(K, where)  # type: ignore[arg-type]
    matrix[:2, 2] -= centre
    values = np.asarray(coefficients, np.float64).ravel()
    try:
        return Lens(matrix, tuple(float(value) for value in values), fisheye, size)
    except ReconError as error:
        raise ReconError(f"{where}: {error.problem}", error.remedy) from error


def pose_from(rotation: object, translation: object, where: str, to_world: bool) -> Array:
    """T_world_cam from a rotation ([3,3], or a Rodrigues vector of 3) and a translation.

    to_world: they map camera to world; else world to camera, as calibrations and COLMAP write them.
    """
    R, t = (np.asarray(value, np.float64) for value in (rotation, translation))
    if R.shape == (3,):
        import cv2

        R = np.asarray(cv2.Rodrigues(R)[0], np.float64)
    if R.shape != (3, 3) or t.size != 3:
        raise ReconError(
            f"{where}: rotation of shape {list(R.shape)} and translation of {t.size} values",
            "a 3x3 matrix or a Rodrigues vector, and three values",
        )
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, t.ravel()
    checked = check_transform(T, where)
    return checked if to_world else invert(checked)


def _scaled(pose: Array | None, factor: float) -> Array | None:
    if pose is None:
        return None
    out = pose.copy()
    out[:3, 3] *= factor
    return out


def _number(name: str) -> int | None:
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else None
