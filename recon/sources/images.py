"""Folders of images, one folder per camera, with optional intrinsics, poses and depth."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from recon.errors import ReconError
from recon.geometry.views import Array, Scale, View
from recon.sources import Source

log = logging.getLogger(__name__)

Frames = dict[str, list[Path]]


@dataclass
class Images(Source):
    """DIR/<camera>/<frame>.{jpg,jpeg,png}: frame k of a camera is its k-th file in natural order.

    A folder that holds images itself instead of folders is one moment: every file is a camera with one frame, named by
    its stem, and there is no stream (unless `live_path` has one). Of the frames, number `bootstrap_frame` of each
    camera bootstraps the map and the later ones are the stream; it ends with the shortest camera. Images are upright
    (EXIF orientation applied), so intrinsics and depth belong to the upright image.
    """

    path: str = MISSING
    """Folder with one folder of images per camera, or with one image per camera."""
    live_path: str | None = None
    """Folder of the stream, if not that of the bootstrap; same cameras, without recorded depth."""
    bootstrap_frame: int = 0
    """Frame, counted in `path`, that the map is bootstrapped from."""
    intrinsics: str | None = None
    """NPZ with K [cameras,3,3] or [3,3] in pixels, optional camera_names, width, height."""
    poses: str | None = None
    """NPZ with T_world_cam (or T_cam_world), [cameras,4,4] (fixed) or [cameras,frames,4,4]; OpenCV axes."""
    poses_unit: str = "m"
    """Unit of the poses' translations: m or arbitrary. Poses in metres make the map metric."""
    depth: str | None = None
    """Folder laid out like `path` with 16-bit PNG of z-depth, 0 = no measurement."""
    depth_scale: float = 0.001
    """Metres per unit of the depth files: 0.001 for millimetres."""

    def check(self) -> None:
        super().check()
        if self.poses_unit not in ("m", "arbitrary"):
            raise ReconError(
                f"source.poses_unit={self.poses_unit}: m or arbitrary", "m if the translations are in metres"
            )
        if not self.depth_scale > 0:
            raise ReconError(f"source.depth_scale={self.depth_scale}: must be positive", "0.001 for millimetres")
        if self.bootstrap_frame < 0:
            raise ReconError(f"source.bootstrap_frame={self.bootstrap_frame}: must not be negative", "0 is the first")
        if self.depth and self.poses and self.poses_unit == "arbitrary":
            raise ReconError(
                "source.poses_unit=arbitrary with source.depth: recorded depth is in metres, so the two do not fit",
                "bring the poses to metres, or leave out the depth",
            )

    def validate(self) -> None:
        """Every file's presence and header, calibration in full, and the bootstrap frames decoded."""
        from recon.sources.imagefiles import image_size

        folders = [self._frames(self.path)] + ([self._frames(self.live_path)] if self.live_path else [])
        for number, frames in enumerate(folders):
            for camera, files in frames.items():
                sizes = {file: image_size(file) for file in files}
                first = next(iter(sizes))
                if other := next((file for file, size in sizes.items() if size != sizes[first]), None):
                    raise ReconError(
                        f"camera {camera}: {other} is {_by(sizes[other])}, {first.name} is {_by(sizes[first])}",
                        "all frames of a camera must have one size",
                    )
                self._fits(camera, sizes[first])
                if self.depth and number == 0:
                    for index in self._used(len(files)):
                        self._depth_file(camera, files[index])
        self.bootstrap()

    def cameras(self) -> list[str]:
        return list(self._frames(self.path))

    def bootstrap(self) -> list[View]:
        frames = self._frames(self.path)
        calibration = self._calibration(frames)
        return [self._view(calibration, camera, files, self.bootstrap_frame, True) for camera, files in frames.items()]

    def batches(self) -> Iterator[list[View]]:
        steps, frames = self._steps()
        calibration = self._calibration(frames)
        for index in steps:
            yield [
                self._view(calibration, camera, files, index, not self.live_path) for camera, files in frames.items()
            ]

    def __len__(self) -> int:
        return len(self._steps()[0])

    def content_key(self) -> str:
        digest = hashlib.sha256()
        for camera, files in self._frames(self.path).items():
            file = files[self.bootstrap_frame]
            depth = [self._depth_file(camera, file)] if self.depth else []
            for path in [file, *depth]:
                digest.update(f"{camera} {path.name} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
        calibration = self._calibration(self._frames(self.path))
        known = [{c: value.tolist() for c, value in sorted(values.items())} for values in calibration]
        digest.update(json.dumps([known, self.depth_scale, self.poses_unit, self.bootstrap_frame]).encode())
        return digest.hexdigest()

    def scale(self) -> Scale:
        if self.poses:
            return Scale("m", "known poses") if self.poses_unit == "m" else Scale()
        return Scale("m", "recorded depth") if self.depth else Scale()

    def _frames(self, folder: str) -> Frames:
        """Files of the cameras in use, in natural order."""
        from recon.sources.rig import choose

        found = _scan(Path(folder))
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

    def _steps(self) -> tuple[list[int], Frames]:
        """Frame numbers of the stream, and the files that they count in."""
        frames = self._frames(self.live_path or self.path)
        lengths = {camera: len(files) for camera, files in frames.items()}
        shortest = min(lengths.values())
        if shortest < max(lengths.values()):
            short = min(lengths, key=lambda camera: lengths[camera])
            log.warning("cameras have %s frames: the stream ends after %d, with %s", lengths, shortest, short)
        return self._used(shortest)[0 if self.live_path else 1 :], frames

    def _used(self, count: int) -> list[int]:
        """Numbers of the frames that are read out of `count`: of the bootstrap, then of the stream."""
        start = 0 if self.live_path else self.bootstrap_frame
        used = list(range(start, count, self.frame_step))
        return used[: self.max_batches + (0 if self.live_path else 1)] if self.max_batches else used

    def _calibration(self, frames: Frames) -> tuple[dict[str, Array], dict[str, Array]]:
        """K and poses by camera, empty where the source has none."""
        from recon.sources.rig import read_intrinsics, read_poses

        available = list(_scan(Path(self.path)))
        K = read_intrinsics(Path(self.intrinsics), available, list(frames)).K if self.intrinsics else {}
        counts = {camera: len(files) for camera, files in frames.items()}
        poses = read_poses(Path(self.poses), available, counts) if self.poses else {}
        if self.live_path and any(len(T) > 1 for T in poses.values()):
            raise ReconError(
                f"source.poses={self.poses} has one pose per frame, with source.live_path: of which folder?",
                "give one pose per camera, or one folder for all frames",
            )
        return K, poses

    def _fits(self, camera: str, size: tuple[int, int]) -> None:
        from recon.sources.rig import read_intrinsics

        if self.intrinsics:
            known = read_intrinsics(Path(self.intrinsics), list(_scan(Path(self.path))), [camera]).size
            if known and known[camera] != size:
                raise ReconError(
                    f"{self.intrinsics}: K of camera {camera} is for {_by(known[camera])}, its images are {_by(size)}",
                    "scale K to the images and store their width and height",
                )

    def _view(
        self,
        calibration: tuple[dict[str, Array], dict[str, Array]],
        camera: str,
        files: list[Path],
        index: int,
        depth: bool,
    ) -> View:
        from recon.sources.imagefiles import read_depth, read_image

        K, poses = calibration
        image = read_image(files[index])
        size = (image.shape[1], image.shape[0])
        pose = poses[camera][index if len(poses[camera]) > 1 else 0] if camera in poses else None
        recorded = None
        if self.depth and depth:
            recorded = read_depth(self._depth_file(camera, files[index]), self.depth_scale, size)
        return View(camera, index, image, K.get(camera), pose, recorded)

    def _depth_file(self, camera: str, image: Path) -> Path:
        assert self.depth is not None
        flat = image.parent == Path(self.path)
        file = Path(self.depth) / f"{image.stem}.png" if flat else Path(self.depth) / camera / f"{image.stem}.png"
        if not file.is_file():
            raise ReconError(f"{file}: no depth for {image}", "every frame that is used needs one, with the same stem")
        return file


def _scan(folder: Path) -> Frames:
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
            f"source folder {folder}: is empty", f"put images ({', '.join(SUFFIXES)}) into one folder per camera"
        )
    if bare := [name for name, files in frames.items() if not files]:
        raise ReconError(
            f"{folder / bare[0]}: camera {bare[0]!r} has no frames",
            f"images end in {', '.join(SUFFIXES)}; remove the folder if it is no camera",
        )
    return frames


def _images(folder: Path) -> list[Path]:
    from recon.sources.imagefiles import SUFFIXES
    from recon.sources.rig import natural

    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    return sorted(files, key=lambda file: natural(file.name))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
