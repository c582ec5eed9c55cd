"""Where frames come from. One file and one YAML per kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recon.component import Component
from recon.errors import ReconError
from recon.geometry.views import Array, Image, Scale, View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recon.geometry.rig import Baseline, Rig


FILES = ("path", "live_path", "depth", "intrinsics", "poses", "rig", "timestamps")
"""Knobs of sources that name a file or folder."""


@dataclass(frozen=True)
class Surface:
    """Ground-truth surface samples. points: [N,3] in world units; `seen`: [N] bool, observed by some frame."""

    points: NDArray[np.float64]
    normals: NDArray[np.float64]
    seen: NDArray[np.bool_]


@dataclass
class Source(Component):
    """Several cameras over time: `bootstrap()` gives one view per camera, `batches()` a list of views per time step."""

    live: ClassVar[bool] = False  # frames come whether or not anyone takes them: the newest one wins

    views: list[str] = field(default_factory=list)
    """Cameras to use, by name; empty = all."""
    random_views: int = 0
    """Use this many cameras, drawn with `seed`; 0 = off."""
    frame_step: int = 1
    """Take every n-th frame."""
    max_batches: int = 0
    """Stop after this many time steps; 0 = all."""
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.frame_step < 1:
            raise ReconError(f"source.frame_step={self.frame_step}: must be at least 1", "1 takes every frame")
        for key in ("random_views", "max_batches"):
            if getattr(self, key) < 0:
                raise ReconError(f"source.{key}={getattr(self, key)}: must not be negative", "0 switches it off")
        if doubles := sorted({name for name in self.views if self.views.count(name) > 1}):
            raise ReconError(f"source.views={self.views}: {doubles} are named twice", "name each camera once")

    def validate(self) -> None:
        """Look at everything that the run will read, as far as that is cheap, before any work starts.

        Raises:
            ReconError: the first fault found, with its place.
        """

    @abstractmethod
    def cameras(self) -> list[str]:
        """Names of the cameras in use, in order, after `views` / `random_views`. Cheap: no frame is decoded."""

    @abstractmethod
    def bootstrap(self) -> list[View]:
        """One view per camera: the frames that the map is bootstrapped from."""

    @abstractmethod
    def batches(self) -> Iterator[list[View]]:
        """The stream, one list of views per time step, in time order. The bootstrap frames are not repeated.

        A list lacks the cameras that have no good frame at that time; of a live source it is empty while none has.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches, for progress bars; 0 when unknown (live)."""

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height of the stream's views by camera, from headers or settings; empty where that is unknown."""
        return {}

    @abstractmethod
    def content_key(self) -> str:
        """Hash of what `bootstrap()` reads, content included: same key, same pixels, poses and depth."""

    @abstractmethod
    def scale(self) -> Scale:
        """Meaning of the unit of the source's own poses and depth; `arbitrary` where it gives neither."""

    def has_depth(self) -> bool:
        """Whether the frames of the stream come with recorded depth."""
        return False

    def surface(self) -> Surface | None:
        """Ground-truth surface, where the source has one."""
        return None

    def picture(self, K: Array, T_world_cam: Array, width: int, height: int) -> Image | None:
        """[height,width,3] uint8 RGB: the true scene without what moves, seen from anywhere; None if unknown."""
        return None

    def baseline(self) -> Baseline | None:
        """A measured distance between two cameras, where the source knows one."""
        return None

    def report(self) -> dict[str, Any]:
        """What happened while frames were read, as plain data: lost and dropped frames, skew, stalls, per camera."""
        return {}


@dataclass
class Calibrated(Source):
    """A source of real cameras: what is known of their optics and poses, and how far their clocks may differ."""

    intrinsics: str | None = None
    """NPZ with K [cameras,3,3] or [3,3] in pixels; optional camera_names, width, height, distortion, fisheye."""
    poses: str | None = None
    """NPZ with T_world_cam (or T_cam_world), [cameras,4,4] (fixed), or [cameras,frames,4,4] for files; OpenCV axes."""
    poses_unit: str = "m"
    """Unit of the poses' translations: m or arbitrary. Poses in metres make the map metric."""
    rig: str | None = None
    """Optics, distortion and poses in one file: .npz, TOML (caliscope), transforms.json (nerfstudio), COLMAP folder."""
    rig_unit: str | None = None
    """m or arbitrary: overrides what the rig file says of its unit; null believes the file."""
    trust_poses: bool | None = None
    """Keep the poses even where the network's cameras disagree with them; null: those of a rig file, not of `poses`."""
    max_skew_ms: float = 50.0
    """Frames of one batch are at most this far apart in time, ms; frames without partner go on alone."""

    def check(self) -> None:
        super().check()
        for key in FILES:
            if getattr(self, key, None) == "":
                raise ReconError(
                    f"source.{key}= is empty", "give a path (was a shell variable not set?), or leave it out"
                )
        if self.poses_unit not in ("m", "arbitrary"):
            raise ReconError(
                f"source.poses_unit={self.poses_unit}: m or arbitrary", "m if the translations are in metres"
            )
        if self.rig_unit not in (None, "m", "arbitrary"):
            raise ReconError(f"source.rig_unit={self.rig_unit}: m, arbitrary or null", "m if the file is in metres")
        if self.rig_unit and not self.rig:
            raise ReconError(
                f"source.rig_unit={self.rig_unit} without source.rig", "give the rig file, or leave it out"
            )
        if not self.max_skew_ms >= 0:
            raise ReconError(f"source.max_skew_ms={self.max_skew_ms}: must not be negative", "50 is 50 milliseconds")

    def scale(self) -> Scale:
        if self.poses:
            return Scale("m", "known poses") if self.poses_unit == "m" else Scale()
        rig = self._rig()
        return rig.scale if rig is not None and rig.posed else Scale()

    def baseline(self) -> Baseline | None:
        rig = self._rig()
        return rig.baseline if rig is not None else None

    def _rig(self) -> Rig | None:
        from recon.geometry.rig_files import read_rig

        return read_rig(Path(self.rig), self.rig_unit) if self.rig else None


@dataclass
class Recording(Calibrated):
    """Cameras that were recorded to files."""

    timestamps: str | None = None
    """CSV with camera, time_s and optional frame or sync_index: capture times of the frames, on one clock."""
    start_s: float = 0.0
    """Leave out what was taken earlier, in seconds after the first frame of the cameras in use."""
    end_s: float | None = None
    """Leave out what was taken later, in seconds after the first frame; null = to the end."""
    ahead: int = 4
    """Frames that each camera's decoder may be ahead of the map; none is dropped."""

    def check(self) -> None:
        super().check()
        if self.ahead < 1:
            raise ReconError(f"source.ahead={self.ahead}: must be at least 1", "4 is enough to hide decoding")
        if not self.start_s >= 0:
            raise ReconError(f"source.start_s={self.start_s}: must not be negative", "0 is the first frame")
        if self.end_s is not None and not self.end_s > self.start_s:
            raise ReconError(
                f"source.end_s={self.end_s}: must be later than source.start_s={self.start_s}", "null plays to the end"
            )
