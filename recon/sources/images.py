"""Folders of images, one folder per camera, with optional calibration, time stamps and depth."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from recon.errors import ReconError
from recon.geometry.views import Scale, View
from recon.sources import Recording

if TYPE_CHECKING:
    from recon.sources.calibration import Calibration
    from recon.sources.decode import Item
    from recon.sources.state import CameraState
    from recon.sources.timeline import Moment, Times

log = logging.getLogger(__name__)

Frames = dict[str, list[Path]]


@dataclass
class Images(Recording):
    """DIR/<camera>/<frame>.{jpg,jpeg,png}: frame k of a camera is its k-th file in natural order.

    A folder that holds images itself instead of folders is one moment: every file is a camera with one frame, named by
    its stem, and there is no stream (unless `live_path` has one). Of the frames, number `bootstrap_frame` of each
    camera bootstraps the map and the later ones are the stream; it ends with the shortest camera. With `timestamps`,
    frames are put together by time instead, and no camera ends the stream of the others. Images are upright (EXIF
    orientation applied), so intrinsics and depth belong to the upright image.
    """

    path: str = MISSING
    """Folder with one folder of images per camera, or with one image per camera."""
    live_path: str | None = None
    """Folder of the stream, if not that of the bootstrap; same cameras, no recorded depth; `timestamps` are its."""
    bootstrap_frame: int = 0
    """Frame of `path` that the map is bootstrapped from; with `timestamps` the first whole batch from it on."""
    depth: str | None = None
    """Folder laid out like `path` with 16-bit PNG of z-depth, 0 = no measurement."""
    depth_scale: float = 0.001
    """Metres per unit of the depth files: 0.001 for millimetres."""

    def __post_init__(self) -> None:
        self._states: dict[str, CameraState] = {}
        self._skew: dict[str, Any] = {}

    def check(self) -> None:
        super().check()
        if not self.depth_scale > 0:
            raise ReconError(f"source.depth_scale={self.depth_scale}: must be positive", "0.001 for millimetres")
        if self.bootstrap_frame < 0:
            raise ReconError(f"source.bootstrap_frame={self.bootstrap_frame}: must not be negative", "0 is the first")
        if self.depth and self.poses and self.poses_unit == "arbitrary":
            raise ReconError(
                "source.poses_unit=arbitrary with source.depth: recorded depth is in metres, so the two do not fit",
                "bring the poses to metres, or leave out the depth",
            )
        if (self.start_s or self.end_s is not None) and not self.timestamps:
            raise ReconError(
                "source.start_s and source.end_s need time, which images do not have", "give source.timestamps"
            )

    def validate(self) -> None:
        """Every file's presence and header, calibration in full, and the bootstrap frames decoded."""
        from recon.sources.imagefiles import image_size

        folders = [self._frames(self.path)] + ([self._frames(self.live_path)] if self.live_path else [])
        for frames in folders:
            for camera, files in frames.items():
                sizes = {file: image_size(file) for file in files}
                first = next(iter(sizes))
                if other := next((file for file, size in sizes.items() if size != sizes[first]), None):
                    raise ReconError(
                        f"camera {camera}: {other} is {_by(sizes[other])}, {first.name} is {_by(sizes[first])}",
                        "all frames of a camera must have one size",
                    )
            _tell_of_loose_images(Path(self.path if frames is folders[0] else str(self.live_path)), frames)
        self._calibration(folders[0])
        if self.depth and self.scale().unit == "arbitrary":
            raise ReconError(
                f"source.rig={self.rig}: its unit is arbitrary, with source.depth, which is in metres: they do not fit",
                "source.rig_unit=m if the poses are in metres, or leave out the depth",
            )
        start, stream = self._plan()
        if self.depth:
            for moment in [start, *([] if self.live_path else stream)]:
                for camera, number in moment.frames.items():
                    self._depth_file(camera, folders[0][camera][number])
        self.bootstrap()

    def cameras(self) -> list[str]:
        return list(self._frames(self.path))

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        from recon.sources.imagefiles import image_size

        return {camera: image_size(files[0]) for camera, files in self._frames(self.live_path or self.path).items()}

    def has_depth(self) -> bool:
        return self.depth is not None and self.live_path is None

    def bootstrap(self) -> list[View]:
        from recon.sources.state import Watch

        frames = self._frames(self.path)
        calibration, times = self._calibration(frames), {} if self.live_path else self._times()
        found = [
            self._view(calibration, camera, frames[camera], number, times.get(camera), True)
            for camera, number in self._plan()[0].frames.items()
        ]
        if black := [view for view in found if Watch().look(view.image) == "black"]:
            file = frames[black[0].camera][black[0].frame]
            raise ReconError(
                f"{file}: the frame that bootstraps camera {black[0].camera} is black",
                "choose another with source.bootstrap_frame, or leave the camera out with source.views",
            )
        return found

    def batches(self) -> Iterator[list[View]]:
        from recon.sources.decode import Decoders
        from recon.sources.state import CameraState, Watch
        from recon.sources.timeline import skew

        _, plan = self._plan()
        self._states = {camera: CameraState(camera) for camera in self.cameras()}
        watches = {camera: Watch() for camera in self._states}
        self._skew = skew(plan, len(self._states), self.max_skew_ms) | {"batches": 0}
        with Decoders(self._decoders(plan), self.ahead) as decoders:
            for moment in plan:
                views = []
                for camera, number in moment.frames.items():
                    found = decoders.take(camera, number)
                    look = watches[camera].look(found.image) if isinstance(found, View) else found
                    if isinstance(found, View) and look != "black":
                        self._states[camera].frozen += look == "frozen"
                        self._states[camera].delivered += 1
                        views.append(found)
                    else:
                        self._states[camera].lose(look, number)
                if views:
                    self._skew["batches"] += 1
                    yield views

    def __len__(self) -> int:
        return len(self._plan()[1])

    def content_key(self) -> str:
        digest = hashlib.sha256()
        frames = self._frames(self.path)
        start = self._plan()[0]
        for camera, number in start.frames.items():
            file = frames[camera][number]
            depth = [self._depth_file(camera, file)] if self.depth else []
            for path in [file, *depth]:
                digest.update(f"{camera} {path.name} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
        known = self._calibration(frames).plain()
        digest.update(json.dumps([known, self.depth_scale, self.poses_unit, list(start.frames.items())]).encode())
        return digest.hexdigest()

    def scale(self) -> Scale:
        rig = self._rig()
        if self.depth and not self.poses and not (rig is not None and rig.posed):
            return Scale("m", "recorded depth")
        return super().scale()

    def report(self) -> dict[str, Any]:
        return {"cameras": {name: state.report() for name, state in self._states.items()}, **self._skew}

    def _frames(self, folder: str) -> Frames:
        """Files of the cameras in use, in natural order."""
        from recon.sources.rig import choose

        found = scan(Path(folder))
        if folder == self.live_path:
            names = self.cameras()
            if missing := [name for name in names if name not in found]:
                raise ReconError(
                    f"source.live_path={folder}: no camera {missing[0]}",
                    f"it has {', '.join(found)}; names must be those of source.path",
                )
            return {name: found[name] for name in names}
        names = choose(self, list(found))
        for name in names:
            if self.bootstrap_frame >= len(found[name]):
                raise ReconError(
                    f"source.bootstrap_frame={self.bootstrap_frame}: camera {name} has {len(found[name])} frames",
                    "frames are counted from 0",
                )
        return {name: found[name] for name in names}

    def _plan(self) -> tuple[Moment, list[Moment]]:
        """The bootstrap's moment, counted in `path`, and those of the stream, counted in `live_path` where it is given.

        Raises:
            ReconError: with time stamps, no moment in which every camera has a frame.
        """
        from recon.sources.timeline import Moment, between, lockstep, moments

        cameras = self.cameras()
        start = Moment(dict.fromkeys(cameras, self.bootstrap_frame), math.nan, 0.0)
        first = 0 if self.live_path else self.bootstrap_frame + self.frame_step
        if self.timestamps:
            found = between(moments(self._times(), self.max_skew_ms / 1e3), self.start_s, self.end_s)
            if not self.live_path:
                whole = [i for i, m in enumerate(found) if len(m.frames) == len(cameras) and i >= self.bootstrap_frame]
                if not whole:
                    raise ReconError(
                        f"source.timestamps={self.timestamps}: at no time do all {len(cameras)} cameras have a frame "
                        f"within source.max_skew_ms={self.max_skew_ms:g}",
                        "raise source.max_skew_ms, or bring the time stamps to one clock",
                    )
                start, first = found[whole[0]], whole[0] + self.frame_step
        else:
            found = lockstep(self._counts())
        stream = found[first :: self.frame_step]
        return start, stream[: self.max_batches] if self.max_batches else stream

    def _counts(self) -> dict[str, int]:
        counts = {camera: len(files) for camera, files in self._frames(self.live_path or self.path).items()}
        shortest = min(counts.values())
        if shortest < max(counts.values()):
            short = min(counts, key=lambda camera: counts[camera])
            log.warning("cameras have %s frames: the stream ends after %d, with %s", counts, shortest, short)
        return counts

    def _times(self) -> dict[str, Times]:
        """Times of the frames of the stream's folder; empty without time stamps."""
        from recon.sources.timeline import assign, read_timestamps

        if not self.timestamps:
            return {}
        stems = {camera: [f.stem for f in files] for camera, files in self._frames(self.live_path or self.path).items()}
        return assign(read_timestamps(Path(self.timestamps)), stems, f"source.timestamps={self.timestamps}").times

    def _calibration(self, frames: Frames) -> Calibration:
        from recon.sources.calibration import calibrate
        from recon.sources.imagefiles import image_size

        sizes = {camera: image_size(files[0]) for camera, files in frames.items()}
        counts = {camera: len(files) for camera, files in frames.items()}
        found = calibrate(self, list(scan(Path(self.path))), sizes, counts, named=True)
        if self.live_path and any(len(T) > 1 for T in found.poses.values()):
            raise ReconError(
                f"source.poses={self.poses} has one pose per frame, with source.live_path: of which folder?",
                "give one pose per camera, or one folder for all frames",
            )
        return found

    def _decoders(self, plan: list[Moment]) -> dict[str, Callable[[], Iterator[Item]]]:
        frames = self._frames(self.live_path or self.path)
        calibration, times = self._calibration(self._frames(self.path)), self._times()
        return {
            camera: partial(
                self._views,
                calibration,
                camera,
                files,
                [moment.frames[camera] for moment in plan if camera in moment.frames],
                times.get(camera),
            )
            for camera, files in frames.items()
        }

    def _views(
        self, calibration: Calibration, camera: str, files: list[Path], numbers: list[int], times: Times | None
    ) -> Iterator[Item]:
        """Decodes and undistorts: the work of one camera's thread."""
        for number in numbers:
            if calibration.moves(camera) and calibration.pose(camera, number, files[number].stem) is None:
                yield number, "no pose"
                continue
            found: View | str = "damaged"
            try:
                found = self._view(calibration, camera, files, number, times, not self.live_path)
            except ReconError as error:  # one file of many: the others go on
                log.warning("camera %s: %s", camera, error.problem)
            yield number, found

    def _view(
        self, calibration: Calibration, camera: str, files: list[Path], number: int, times: Times | None, depth: bool
    ) -> View:
        from recon.sources.imagefiles import read_depth, read_image

        image = read_image(files[number])
        recorded = None
        if self.depth and depth:
            size = (image.shape[1], image.shape[0])
            recorded = read_depth(self._depth_file(camera, files[number]), self.depth_scale, size)
        time_s = None if times is None else float(times[number])
        return calibration.view(camera, number, image, stem=files[number].stem, depth=recorded, time_s=time_s)

    def _depth_file(self, camera: str, image: Path) -> Path:
        assert self.depth is not None
        flat = image.parent == Path(self.path)
        file = Path(self.depth) / f"{image.stem}.png" if flat else Path(self.depth) / camera / f"{image.stem}.png"
        if not file.is_file():
            raise ReconError(f"{file}: no depth for {image}", "every frame that is used needs one, with the same stem")
        return file


def scan(folder: Path) -> Frames:
    """Image files by camera, both in natural order. Hidden files are not looked at."""
    from recon.sources.imagefiles import SUFFIXES
    from recon.sources.rig import natural

    if not folder.is_dir():
        raise ReconError(
            f"source folder {folder}: {'is a file' if folder.exists() else 'no such folder'}",
            "give DIR with DIR/<camera>/<frame>.jpg",
        )
    entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=lambda e: natural(e.name))
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        files = [file for file in entries if file.suffix.lower() in SUFFIXES]
        frames = {file.stem: [file] for file in files}
        if len(frames) < len(files):
            raise ReconError(
                f"source folder {folder}: two images with the same stem", "stems become camera names: rename one"
            )
    else:
        frames = {camera.name: _images(camera) for camera in folders}
    if not frames:
        raise ReconError(
            f"source folder {folder}: {'no image is in it' if entries else 'is empty'}",
            f"put images ({', '.join(SUFFIXES)}) into one folder per camera; source=videos reads video files",
        )
    if bare := [name for name, files in frames.items() if not files]:
        raise ReconError(
            f"{folder / bare[0]}: camera {bare[0]!r} has no frames",
            f"images end in {', '.join(SUFFIXES)}; remove the folder if it is no camera",
        )
    return frames


def _tell_of_loose_images(folder: Path, frames: Frames) -> None:
    """Images beside the cameras' folders belong to no camera."""
    flat = next(iter(frames.values()))[0].parent == folder
    if not flat and (loose := _images(folder)):
        log.warning("%s: %d images beside the cameras' folders are not used: %s", folder, len(loose), loose[0].name)


def _images(folder: Path) -> list[Path]:
    from recon.sources.imagefiles import SUFFIXES
    from recon.sources.rig import natural

    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted(files, key=lambda file: natural(file.name))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
