"""What is handed over: images with cameras, and the points of the map, read from a run folder."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.geometry.ply import read_ply
from recon.geometry.views import Array, Scale
from recon.keyframes import Keyframe, encode_png, read_keyframes
from recon.options import HandoverOptions

log = logging.getLogger(__name__)
MAP = "map_updated.ply"
OFF_CENTRE_PX = 2.0
"""From here on the distance of the principal point from the image centre is worth a warning."""


@dataclass(frozen=True)
class Frame:
    """One image to hand over, with zero skew. crop: (left, top) in the source image; K belongs to the cropped one."""

    name: str
    source: Keyframe
    width: int
    height: int
    K: Array
    crop: tuple[int, int] = (0, 0)

    @property
    def T_world_cam(self) -> Array:  # noqa: N802 - the name it has everywhere
        return self.source.T_world_cam

    @property
    def pinhole(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels with pixel centres at +0.5: what COLMAP, nerfstudio and the trainers expect."""
        return float(self.K[0, 0]), float(self.K[1, 1]), float(self.K[0, 2] + 0.5), float(self.K[1, 2] + 0.5)

    def write_image(self, path: Path) -> None:
        """The source image as it is, or cropped.

        Raises:
            ReconError: it is missing, unreadable or of another size.
        """
        import cv2

        pixels = cv2.imread(str(self.source.file))
        if pixels is None or pixels.shape[:2] != (self.source.height, self.source.width):
            found = "cannot be read" if pixels is None else f"is {pixels.shape[1]}x{pixels.shape[0]}"
            raise ReconError(
                f"{self.source.file}: {found}; the run wrote {self.source.width}x{self.source.height}",
                "run reconstruct again",
            )
        if (self.width, self.height) == (self.source.width, self.source.height):
            shutil.copyfile(self.source.file, path)
            return
        left, top = self.crop
        path.write_bytes(encode_png(pixels[top : top + self.height, left : left + self.width, ::-1]))


@dataclass(frozen=True)
class Scene:
    """frames with points [N,3], unit normals [N,3] (zero where unknown) and colors [N,3] uint8, in map units.

    occluders: [M,3], all points of the map, of which `points` are a part.
    """

    frames: list[Frame]
    points: NDArray[np.float32]
    normals: NDArray[np.float32]
    colors: NDArray[np.uint8]
    occluders: NDArray[np.float32]
    scale: Scale

    def facts(self) -> dict[str, Any]:
        """What a reader has to know about the folder."""
        return {
            "unit": self.scale.unit,
            "scale_source": self.scale.source,
            "images": len(self.frames),
            "cameras": len({frame.source.camera for frame in self.frames}),
            "points": len(self.points),
            "points_in_map": len(self.occluders),
            "principal_point_off_centre_px_max": max(_off_centre(frame) for frame in self.frames),
            "pixel_centres": "+0.5",
            "world": "the map's; COLMAP: OpenCV camera axes, world to camera; nerfstudio: OpenGL camera axes",
        }


def load_scene(run: Path, options: HandoverOptions) -> Scene:
    """Keyframes and map of a run folder, thinned to `options.max_points` with a fixed seed.

    Raises:
        ReconError: keyframes or map are missing, or a camera has skew.
    """
    keyframes, scale = read_keyframes(run)
    frames = [_frame(keyframe, options.center) for keyframe in keyframes[: options.max_images]]
    off = max(_off_centre(frame) for frame in frames)
    if off > OFF_CENTRE_PX:
        log.warning(
            "the principal point lies up to %.1f px from the image centre, which INRIA's trainer ignores: "
            "handover.center=true crops the images about it",
            off,
        )
    cloud = read_ply(run / MAP)
    count = len(cloud.points)
    if count < 4:
        raise ReconError(f"{run / MAP}: {count} points are too few to start Gaussians from", "run reconstruct again")
    keep = np.arange(count)
    if count > options.max_points:
        keep = np.sort(np.random.default_rng(0).choice(count, options.max_points, replace=False))
    normals = np.zeros_like(cloud.points) if cloud.normals is None else cloud.normals
    colors = np.full(cloud.points.shape, 128, np.uint8) if cloud.colors is None else cloud.colors
    return Scene(frames, cloud.points[keep], normals[keep], colors[keep], cloud.points, scale)


def _frame(keyframe: Keyframe, center: bool) -> Frame:
    if abs(keyframe.K[0, 1]) > 1e-6:
        raise ReconError(
            f"{keyframe.file.name}: skew of {keyframe.K[0, 1]:g} pixels, which COLMAP's pinhole camera cannot hold",
            "calibrate without skew",
        )
    whole = Frame(keyframe.file.name, keyframe, keyframe.width, keyframe.height, keyframe.K)
    return _centred(whole) if center else whole


def _centred(frame: Frame) -> Frame:
    """The largest crop with the principal point at its centre, to within half a pixel."""
    size, start = [], []
    for length, c in ((frame.width, frame.K[0, 2] + 0.5), (frame.height, frame.K[1, 2] + 0.5)):
        side = 2 * int(min(c, length - c))
        if side < 16:
            raise ReconError(
                f"{frame.name}: the principal point {frame.K[:2, 2].tolist()} leaves no image about it",
                "handover.center=false",
            )
        size.append(side)
        start.append(int(np.clip(round(c - side / 2), 0, length - side)))
    K = frame.K.copy()
    K[:2, 2] -= start
    return Frame(frame.name, frame.source, size[0], size[1], K, (start[0], start[1]))


def _off_centre(frame: Frame) -> float:
    _, _, cx, cy = frame.pinhole
    return float(max(abs(cx - frame.width / 2), abs(cy - frame.height / 2)))
