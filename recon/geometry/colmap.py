"""COLMAP's sparse models, text and binary (colmap.github.io, "Output Format"): cameras and poses of the images.

COLMAP stores world to camera as quaternion (w x y z) and translation, OpenCV axes, with the centre of the first pixel
at (0.5, 0.5). The points are not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from recon.errors import ReconError
from recon.geometry.distortion import Lens
from recon.geometry.rig import RigEntry, make_lens, pose_from

# name, number of focal lengths, names of the rest after cx, cy; the index is COLMAP's model number
_MODELS: tuple[tuple[str, int, str], ...] = (
    ("SIMPLE_PINHOLE", 1, ""),
    ("PINHOLE", 2, ""),
    ("SIMPLE_RADIAL", 1, "k1"),
    ("RADIAL", 1, "k1 k2"),
    ("OPENCV", 2, "k1 k2 p1 p2"),
    ("OPENCV_FISHEYE", 2, "k1 k2 k3 k4"),
    ("FULL_OPENCV", 2, "k1 k2 p1 p2 k3 k4 k5 k6"),
    ("FOV", 2, "omega"),
    ("SIMPLE_RADIAL_FISHEYE", 1, "k1"),
    ("RADIAL_FISHEYE", 1, "k1 k2"),
    ("THIN_PRISM_FISHEYE", 2, "k1 k2 p1 p2 k3 k4 sx1 sy1"),
)
_REFUSED = ("FOV", "THIN_PRISM_FISHEYE")
_REMEDY = "export the model again: COLMAP's model_converter writes TXT and BIN"

Cameras = dict[int, Lens]


def colmap_folder(path: Path) -> Path | None:
    """The folder of a sparse model at, in or around `path`, or None."""
    if path.is_file() and path.stem in ("cameras", "images", "points3D") and path.suffix in (".txt", ".bin"):
        return path.parent
    for folder in (path, path / "sparse" / "0", path / "sparse"):
        if any((folder / f"cameras{suffix}").is_file() for suffix in (".txt", ".bin")):
            return folder
    return None


def read_colmap(folder: Path) -> dict[str, RigEntry]:
    """Optics and T_world_cam of every registered image, by image path without suffix. Binary files win over text.

    Raises:
        ReconError: a file is missing, cut off or malformed, or a camera model has no OpenCV equal.
    """
    binary = (folder / "cameras.bin").is_file()
    suffix = ".bin" if binary else ".txt"
    paths = [folder / f"{name}{suffix}" for name in ("cameras", "images")]
    if missing := [path for path in paths if not path.is_file()]:
        raise ReconError(f"{missing[0]}: no such file", _REMEDY)
    try:
        cameras = dict((_binary_cameras if binary else _text_cameras)(paths[0]))
        images = (_binary_images if binary else _text_images)(paths[1])
        entries = {}
        for name, camera, q, t in images:
            where = f"{paths[1]}, {name}"
            if camera not in cameras:
                raise ReconError(f"{where}: camera {camera} is not in {paths[0].name}", _REMEDY)
            key = str(PurePosixPath(name).with_suffix(""))
            entries[key] = RigEntry(cameras[camera], pose_from(_rotation(q, where), t, where, to_world=False))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ReconError(f"{folder}: damaged or no COLMAP model: {error}", _REMEDY) from error
    if not entries:
        raise ReconError(f"{paths[1]}: no image has a pose", "COLMAP registered none: add overlap or texture")
    return entries


def _lens(model: str, size: tuple[int, int], params: list[float], where: str) -> Lens:
    known = {name: (focals, rest.split()) for name, focals, rest in _MODELS}
    if model not in known or model in _REFUSED:
        raise ReconError(
            f"{where}: camera model {model} has no equal in OpenCV's lens models",
            "undistort the images with COLMAP's image_undistorter, or calibrate as OPENCV or OPENCV_FISHEYE",
        )
    focals, rest = known[model]
    if len(params) != focals + 2 + len(rest):
        raise ReconError(f"{where}: {len(params)} parameters for {model}, it has {focals + 2 + len(rest)}", _REMEDY)
    fx, fy, (cx, cy) = params[0], params[focals - 1], params[focals : focals + 2]
    bend, fisheye = params[focals + 2 :], "FISHEYE" in model
    padded = [*bend, *[0.0] * (4 - len(bend))] if 0 < len(bend) < 4 else bend
    return make_lens([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], padded, fisheye, size, where, centre=0.5)


def _rotation(q: tuple[float, ...], where: str) -> np.ndarray:
    length = float(np.linalg.norm(q))
    if not 0.5 < length < 2:
        raise ReconError(f"{where}: quaternion {list(q)} of length {length:g}", "it should have length 1")
    w, x, y, z = np.asarray(q) / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _text_lines(path: Path) -> list[str]:
    return [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]


def _text_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    for line in _text_lines(path):
        if words := line.split():
            size = (int(words[2]), int(words[3]))
            yield int(words[0]), _lens(words[1], size, [float(w) for w in words[4:]], f"{path}, camera {words[0]}")


def _text_images(path: Path) -> Iterator[tuple[str, int, tuple[float, ...], tuple[float, ...]]]:
    """Two lines an image; the second, its points, may be empty."""
    lines = _text_lines(path)
    while lines and not lines[0].strip():
        lines.pop(0)
    for line in lines[::2]:
        words = line.split(maxsplit=9)
        if not words:
            continue
        values = tuple(float(word) for word in words[1:8])
        yield words[9], int(words[8]), values[:4], values[4:]


def _binary_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    data, at = path.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, model, width, height = struct.unpack_from("<iiQQ", data, at)
        name, focals, rest = _MODELS[model] if 0 <= model < len(_MODELS) else (str(model), 0, "")
        count = focals + 2 + len(rest.split())
        params = list(struct.unpack_from(f"<{count}d", data, at + 24))
        at += 24 + 8 * count
        yield number, _lens(name, (width, height), params, f"{path}, camera {number}")


def _binary_images(path: Path) -> Iterator[tuple[str, int, tuple[float, ...], tuple[float, ...]]]:
    data, at = path.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        _, *pose, camera = struct.unpack_from("<i7di", data, at)
        end = data.index(b"\0", at + 64)
        name = data[at + 64 : end].decode()
        points = struct.unpack_from("<Q", data, end + 1)[0]
        at = end + 9 + 24 * points
        if at > len(data):
            raise ValueError(f"{path.name} ends inside image {name}")
        yield name, camera, tuple(pose[:4]), tuple(pose[4:])
