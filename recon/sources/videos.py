"""Video files, one per camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from recon.sources import Planned


@dataclass
class Videos(Planned):
    """DIR/<camera>.{mp4,mkv,avi,mov}: one file per camera, played in step."""

    not_built: ClassVar[str] = "decoding video files is not part of this version"

    path: str = MISSING
    """Folder with one video per camera; the stem is the camera's name."""
    intrinsics: str | None = None
    """NPZ with K [cameras,3,3] or [3,3] in pixels, optional camera_names, width, height."""
    poses: str | None = None
    """NPZ with T_world_cam (or T_cam_world) [cameras,4,4]; OpenCV axes."""
    poses_unit: str = "m"
    """Unit of the poses' translations: m or arbitrary."""
