"""Keyframes of a run: a few source images with intrinsics and poses in the map's frame, kept for those who come after.

`keyframes/cameras.json` beside the images holds, per image: camera, frame, time_s, file, width, height, K (pixels,
pixel centres at integers) and T_world_cam (OpenCV axes, map units), and for all of them the unit and its source.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recon.artifact import Manifest, read_manifest, verify, write_atomic
from recon.errors import Damaged, ReconError
from recon.geometry.cameras import check_intrinsics, check_transform
from recon.geometry.metrics import rotation_angle_deg
from recon.geometry.views import Array, Bootstrap, Image, Scale, View
from recon.options import HandoverOptions

FOLDER, INDEX = "keyframes", "cameras.json"


@dataclass(frozen=True)
class Keyframe:
    """One image of a run. file: path of the image. K: [3,3], pixels. T_world_cam: [4,4], map units."""

    camera: str
    frame: int
    file: Path
    width: int
    height: int
    K: Array
    T_world_cam: Array


@dataclass
class KeyframeWriter:
    """Writes keyframes while the stream runs: a camera's first frame, then one for every move. Memory does not grow."""

    folder: Path
    options: HandoverOptions
    bootstrap: Bootstrap
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    files: list[Path] = field(default_factory=list, init=False)
    _last: dict[str, Array] = field(default_factory=dict, init=False)

    def offer(self, view: View) -> None:
        """Keep the frame if its camera has no keyframe yet or has moved far enough since its last one."""
        camera = camera_of(self.bootstrap, view)
        if camera is None or len(self.rows) >= self.options.max_images:
            return
        K, T_world_cam = camera
        if view.camera not in self._last or self._moved(self._last[view.camera], T_world_cam):
            self._keep(view.camera, view.frame, view.time_s, view.image, K, T_world_cam, "stream")

    def close(self) -> list[Path]:
        """Write the index, last; cameras without a frame in the stream come in with their bootstrap image."""
        for posed in self.bootstrap.views:
            if posed.camera not in self._last and len(self.rows) < self.options.max_images:
                self._keep(posed.camera, 0, None, posed.image, posed.K, posed.T_world_cam, "bootstrap")
        index = {
            "format": 1,
            "scale": asdict(self.bootstrap.scale),
            "conventions": "OpenCV axes; T_world_cam: camera to world; pixel centres at integer coordinates",
            "frames": self.rows,
        }
        path = self.folder / FOLDER / INDEX
        write_atomic(path, json.dumps(index, indent=1) + "\n")
        return [*self.files, path]

    def _moved(self, before: Array, now: Array) -> bool:
        shift = float(np.linalg.norm(now[:3, 3] - before[:3, 3]))
        turn = float(rotation_angle_deg((before[:3, :3].T @ now[:3, :3])[None])[0])
        return shift > self.options.keyframe_shift or turn > self.options.keyframe_deg

    def _keep(
        self, camera: str, frame: int, time_s: float | None, image: Image, K: Array, T_world_cam: Array, origin: str
    ) -> None:
        name = f"{_plain(camera)}_{frame:06d}.png"
        if any(row["file"] == name for row in self.rows):
            name = f"{len(self.rows):04d}_{name}"
        path = self.folder / FOLDER / name
        write_atomic(path, encode_png(image))
        self.files.append(path)
        self._last[camera] = T_world_cam
        size = {"width": image.shape[1], "height": image.shape[0]}
        self.rows.append(
            {"camera": camera, "frame": frame, "time_s": time_s, "file": name, "origin": origin, **size,
             "K": np.asarray(K).tolist(), "T_world_cam": np.asarray(T_world_cam).tolist()}
        )  # fmt: skip


def camera_of(bootstrap: Bootstrap, view: View) -> tuple[Array, Array] | None:
    """K and T_world_cam of a streamed frame in the map's frame, or None where one of them is unknown."""
    K = view.K if view.K is not None else bootstrap.K_source.get(view.camera)
    own = view.T_world_cam if bootstrap.in_source_frame else None
    T_world_cam = own if own is not None else bootstrap.T_world_cam.get(view.camera)
    return None if K is None or T_world_cam is None else (K, T_world_cam)


def read_keyframes(run: Path) -> tuple[list[Keyframe], Scale]:
    """Keyframes of a run folder.

    Raises:
        ReconError: there are none, or the index is not what a run writes.
    """
    index = run / FOLDER / INDEX
    try:
        data = json.loads(index.read_text())
        frames = [_keyframe(row, run / FOLDER) for row in data["frames"]]
        scale = Scale(**data["scale"])
    except FileNotFoundError as error:
        raise ReconError(f"{run}: has no {FOLDER}/{INDEX}", "give a run whose stages included reconstruct") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ReconError(f"{index}: is not what a run writes: {error!r}", "run reconstruct again") from error
    if not frames:
        raise ReconError(f"{index}: lists no frame", "no frame of that run had both intrinsics and a pose")
    return frames, scale


def require_complete(run: Path) -> Manifest:
    """The manifest of a finished run whose files are all as they were written.

    Raises:
        ReconError: no manifest, or a file that is missing or changed.
    """
    try:
        manifest = read_manifest(run / "manifest")
        verify(run, manifest)
    except Damaged as damage:
        raise ReconError(damage.problem, "run reconstruct again; a damaged run is not handed on") from damage
    return manifest


def encode_png(image: np.ndarray) -> bytes:
    """An [H,W,3] uint8 RGB or [H,W] uint16 image as PNG, lossless, packed quickly rather than tightly."""
    import cv2

    pixels = image[..., ::-1] if image.ndim == 3 else image
    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, 2])
    assert done, "an image in memory can be encoded"
    return bytes(data)


def _keyframe(row: dict[str, Any], folder: Path) -> Keyframe:
    name = str(row["file"])
    if Path(name).name != name:
        raise ValueError(f"{name} points out of the folder")
    where = f"{FOLDER}/{INDEX}, {name}"
    K, T = check_intrinsics(row["K"], where), check_transform(row["T_world_cam"], where)
    return Keyframe(str(row["camera"]), int(row["frame"]), folder / name, int(row["width"]), int(row["height"]), K, T)


def _plain(camera: str) -> str:
    """A camera's name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in camera)
