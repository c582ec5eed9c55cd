"""Video files, one per camera, put together by their time stamps."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING

from recon.errors import ReconError
from recon.geometry.views import View
from recon.sources import Recording

if TYPE_CHECKING:
    from recon.sources.calibration import Calibration
    from recon.sources.decode import Item
    from recon.sources.state import CameraState
    from recon.sources.timeline import Moment, Timeline
    from recon.sources.videofiles import VideoIndex

log = logging.getLogger(__name__)

PAUSE, PAUSE_S, PAUSES_TOLD = 4.0, 0.3, 5
"""A pause lasts longer than this many frame periods and seconds; so many of a camera are told one by one."""
FROZEN_TOLD = 5
"""Equal frames in a row after which a recording is said to be frozen."""


@dataclass
class Videos(Recording):
    """DIR/<camera>.<any container>, DIR/<camera>/<one file>, or one file: played together, whatever their frame rates.

    Times are those of the container, or of a CSV. Frames within `max_skew_ms` make a batch; the first batch in which
    every camera has a good frame bootstraps the map and the later ones are the stream. It goes on when a camera ends
    early or a part of a file is damaged; `report()` says what was lost. Frames of phones are turned upright, so
    intrinsics belong to the upright image.
    """

    path: str = MISSING
    """Folder with one video or one folder per camera; stem or folder name is the camera's name. Or one video."""
    start_together: bool = False
    """Count the time of every container from its own first frame: for recorders whose clocks are unrelated."""

    def __post_init__(self) -> None:
        self._start: tuple[int, list[View]] | None = None  # number of the bootstrap's moment, and its views
        self._states: dict[str, CameraState] = {}
        self._skew: dict[str, Any] = {}
        self._streamed = False

    def check(self) -> None:
        super().check()
        if self.start_together and self.timestamps:
            raise ReconError("source.start_together=true with source.timestamps: two sources of time", "leave one out")

    def validate(self) -> None:
        """Every file indexed and its first frame decoded, time stamps and calibration in full, the bootstrap found."""
        self._calibration()
        self.bootstrap()

    def cameras(self) -> list[str]:
        return list(self._files())

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        return {camera: index.size for camera, index in self._indices().items()}

    def bootstrap(self) -> list[View]:
        return self._bootstrap()[1]

    def batches(self) -> Iterator[list[View]]:
        from recon.sources.timeline import skew

        plan = self._stream()
        states = self._fresh_states() if self._streamed else self._states  # with what the bootstrap lost
        self._streamed = True
        self._skew = skew(plan, len(states), self.max_skew_ms) | {"batches": 0}
        for views in self._read(plan, states):
            for view in views:
                states[view.camera].delivered += 1
            if views:
                self._skew["batches"] += 1
                yield views

    def __len__(self) -> int:
        return len(self._stream())

    def content_key(self) -> str:
        digest = hashlib.sha256()
        for view in self.bootstrap():
            known = [view.camera, view.frame, view.time_s, view.image.shape, view.pose_trusted]
            matrices = [None if m is None else m.tolist() for m in (view.K, view.T_world_cam)]
            digest.update(json.dumps([known, matrices]).encode())
            digest.update(view.image.tobytes())
        return digest.hexdigest()

    def report(self) -> dict[str, Any]:
        return {"cameras": {name: state.report() for name, state in self._states.items()}, **self._skew}

    def _files(self) -> dict[str, Path]:
        """The video of every camera in use."""
        from recon.sources.rig import choose

        found = find_videos(Path(self.path))
        return {name: found[name] for name in choose(self, list(found))}

    def _indices(self) -> dict[str, VideoIndex]:
        from recon.sources.videofiles import index_video

        return {camera: index_video(path) for camera, path in self._files().items()}

    def _timeline(self) -> Timeline:
        """Times of all frames of all cameras in use, on one clock."""
        from recon.sources.timeline import Timeline, assign, read_timestamps

        indices = self._indices()
        if self.timestamps:
            rows = read_timestamps(Path(self.timestamps))
            names = {camera: [""] * len(index) for camera, index in indices.items()}
            return assign(rows, names, f"source.timestamps={self.timestamps}")
        times = {camera: index.times for camera, index in indices.items()}
        if self.start_together:
            times = {camera: values - values[0] for camera, values in times.items()}
        return Timeline(times, {camera: index.origin for camera, index in indices.items()})

    def _moments(self) -> list[Moment]:
        from recon.sources.timeline import between, moments

        return between(moments(self._timeline().times, self.max_skew_ms / 1e3), self.start_s, self.end_s)

    def _stream(self) -> list[Moment]:
        later = self._moments()[self._bootstrap()[0] + self.frame_step :: self.frame_step]
        return later[: self.max_batches] if self.max_batches else later

    def _bootstrap(self) -> tuple[int, list[View]]:
        """The first moment in which every camera has a good frame, and its views."""
        if self._start is None:
            found = self._moments()
            whole = [number for number, moment in enumerate(found) if len(moment.frames) == len(self.cameras())]
            if not whole:
                raise ReconError(
                    f"source.path={self.path}: at no time do all {len(self.cameras())} cameras have a frame within "
                    f"source.max_skew_ms={self.max_skew_ms:g}: {self._spans()}",
                    "raise source.max_skew_ms, give source.timestamps on one clock, or source.start_together=true",
                )
            states = self._fresh_states()
            for number, views in zip(whole, self._read([found[number] for number in whole], states), strict=True):
                if len(views) == len(states):
                    self._start = number, views
                    break
            else:
                lost = {name: dict(state.lost) for name, state in states.items() if state.lost}
                raise ReconError(
                    f"source.path={self.path}: in none of {len(whole)} moments are the frames of all cameras good; "
                    f"lost: {lost}",
                    "leave the camera out with source.views, or start later with source.start_s",
                )
        return self._start

    def _read(self, plan: list[Moment], states: dict[str, CameraState]) -> Iterator[list[View]]:
        """The good views of every moment; what is not good is counted."""
        from recon.sources.decode import Decoders
        from recon.sources.state import Watch

        watches = {camera: Watch() for camera in states}
        wanted = {camera: [m.frames[camera] for m in plan if camera in m.frames] for camera in states}
        with Decoders(self._decoders(wanted), self.ahead) as decoders:
            for moment in plan:
                views = []
                for camera, number in moment.frames.items():
                    found = decoders.take(camera, number)
                    look = watches[camera].look(found.image) if isinstance(found, View) else found
                    if isinstance(found, View) and look != "black":
                        states[camera].frozen += look == "frozen"
                        if watches[camera].repeats == FROZEN_TOLD:
                            states[camera].event(f"frozen: {FROZEN_TOLD} equal frames in a row", number)
                        views.append(found)
                    else:
                        states[camera].lose(look, number)
                yield views

    def _decoders(self, wanted: dict[str, list[int]]) -> dict[str, Callable[[], Iterator[Item]]]:
        indices, calibration, times = self._indices(), self._calibration(), self._timeline().times
        return {
            camera: partial(_views, camera, indices[camera], numbers, calibration, times[camera])
            for camera, numbers in wanted.items()
        }

    def _calibration(self) -> Calibration:
        from recon.sources.calibration import calibrate

        indices = self._indices()
        sizes = {camera: index.size for camera, index in indices.items()}
        counts = {camera: len(index) for camera, index in indices.items()}
        return calibrate(self, list(find_videos(Path(self.path))), sizes, counts)

    def _fresh_states(self) -> dict[str, CameraState]:
        """New counters, with what the files alone say: their times, and frames that are announced but not there."""
        from recon.sources.state import CameraState

        timeline, indices = self._timeline(), self._indices()
        last = max(float(np.nanmax(times)) for times in timeline.times.values())
        self._states = {camera: CameraState(camera) for camera in indices}
        for camera, state in self._states.items():
            _examine(state, indices[camera], timeline.times[camera], last, self.max_skew_ms)
            state.facts |= {"times_from": timeline.origin[camera], **timeline.notes.get(camera, {})}
        return self._states

    def _spans(self) -> str:
        times = self._timeline().times
        return ", ".join(f"{c} {np.nanmin(t):.3f} to {np.nanmax(t):.3f} s" for c, t in times.items())


def find_videos(path: Path) -> dict[str, Path]:
    """The video of every camera at `path`, in natural order of their names.

    Raises:
        ReconError: nothing there, a folder without or with several videos, two files with one stem.
    """
    from recon.sources.rig import natural
    from recon.sources.videofiles import SUFFIXES

    def videos(folder: Path) -> list[Path]:
        inside = (f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file())
        return sorted(inside, key=lambda file: natural(file.name))

    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise ReconError(f"source.path={path}: no such folder or file", "give DIR with one video per camera")
    files = videos(path)
    found = {file.stem: file for file in files}
    if len(found) < len(files):
        raise ReconError(f"{path}: two videos with the same stem", "stems become camera names: rename one")
    if not files:
        for folder in sorted(
            (e for e in path.iterdir() if e.is_dir() and e.name[0] != "."), key=lambda e: natural(e.name)
        ):
            own = videos(folder)
            if not own:
                raise ReconError(
                    f"{folder}: no video in it",
                    "one video per camera's folder; source=images reads folders of images",
                )
            if len(own) > 1:
                raise ReconError(f"{folder}: {len(own)} videos", "one video per camera's folder; join the parts first")
            found[folder.name] = own[0]
    if not found:
        raise ReconError(
            f"source.path={path}: no videos",
            f"one per camera, ending in {', '.join(SUFFIXES[:6])} or another of FFmpeg's",
        )
    return found


def _views(
    camera: str, index: VideoIndex, numbers: list[int], calibration: Calibration, times: np.ndarray
) -> Iterator[Item]:
    """Decodes and undistorts: the work of one camera's thread."""
    from recon.sources.videofiles import frames

    for number, image in frames(index, numbers):
        if isinstance(image, str):
            yield number, image
        else:
            yield number, calibration.view(camera, number, image, time_s=float(times[number]))


def _examine(state: CameraState, index: VideoIndex, times: np.ndarray, last: float, bound_ms: float) -> None:
    """What a file and its times say without decoding: size and rate, frames that are not there, pauses, early end.

    last: time of the last frame of any camera.
    """
    known = times[np.isfinite(times)]
    steps = np.diff(known) if len(known) > 1 else np.zeros(1)
    period = float(np.median(steps))
    state.facts = {
        "file": index.path.name, "frames": len(index), "size": list(index.size), "codec": index.codec,
        "period_ms_p50": round(1e3 * period, 3), "period_ms_max": round(1e3 * float(steps.max()), 3),
    }  # fmt: skip
    if index.repeated:
        state.lose("time stamp stands twice", None, index.repeated)
    there = len(index) + index.repeated
    if index.announced > there:
        state.lose("file is cut off", len(index), index.announced - there)
    played = float(index.times[-1] - index.times[0])
    if not index.announced and index.promised_s - played > max(PAUSE * period, PAUSE_S):
        state.event(f"the file promises {index.promised_s:.3f} s, {played:.3f} s can be read", played)
    pauses = np.flatnonzero(steps > max(PAUSE * period, PAUSE_S))
    state.facts["pauses"] = len(pauses)
    for pause in pauses[:PAUSES_TOLD]:
        state.event(f"no frame for {steps[pause]:.3f} s", round(float(known[pause]), 6))
    if last - known[-1] > max(2 * period, bound_ms / 1e3):
        state.event(f"ends {last - known[-1]:.3f} s before the last camera", float(known[-1]))
