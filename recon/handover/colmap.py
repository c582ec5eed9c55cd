"""COLMAP's sparse model, binary and text: cameras, images, points3D.

Layout of the files: COLMAP documentation, "Output format", and src/colmap/scene/reconstruction_io. Cameras are PINHOLE
with pixel centres at +0.5; poses are world to camera, quaternions w x y z; all identifiers count from 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recon.geometry.cameras import invert
from recon.geometry.views import Array
from recon.handover.scene import Frame, Scene
from recon.handover.tracks import Tracks

PINHOLE = 1  # COLMAP's number of the camera model
OBSERVATION = np.dtype([("xy", "<f8", 2), ("point", "<i8")])
POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")])
ELEMENT = np.dtype([("image", "<u4"), ("index", "<u4")])


@dataclass(frozen=True)
class _Model:
    """The scene in COLMAP's terms. elements: track elements sorted by point; starts [N+1]: where each point's begin."""

    scene: Scene
    camera_ids: list[int]
    cameras: dict[int, Frame]
    observations: list[NDArray[np.void]]
    elements: NDArray[np.void]
    starts: NDArray[np.int64]


def write_colmap(folder: Path, scene: Scene, tracks: Tracks | None) -> None:
    """Write cameras, images and points3D as .bin and .txt into `folder`; without `tracks` every track is empty."""
    folder.mkdir(parents=True)
    model = _model(scene, tracks)
    for name, binary, text in (
        ("cameras", _cameras_bin, _cameras_txt),
        ("images", _images_bin, _images_txt),
        ("points3D", _points_bin, _points_txt),
    ):
        (folder / f"{name}.bin").write_bytes(binary(model))
        (folder / f"{name}.txt").write_text("\n".join(text(model)) + "\n")


def quaternion(R: Array) -> Array:
    """Unit quaternion [4] (w, x, y, z), w >= 0, of a rotation [3,3]."""
    from scipy.spatial.transform import Rotation

    found: Array = Rotation.from_matrix(R).as_quat(canonical=True, scalar_first=True)
    return found


def _model(scene: Scene, tracks: Tracks | None) -> _Model:
    known: dict[tuple[str, int, int, bytes], int] = {}
    camera_ids, cameras = [], {}
    for frame in scene.frames:  # one COLMAP camera per camera, or several where its intrinsics changed
        key = (frame.source.camera, frame.width, frame.height, frame.K.tobytes())
        number = known.setdefault(key, len(known) + 1)
        cameras[number] = frame
        camera_ids.append(number)
    seen = tracks.points if tracks else [np.empty(0, np.int64)] * len(scene.frames)
    pixels = tracks.pixels if tracks else [np.empty((0, 2))] * len(scene.frames)
    observations = []
    for points, where in zip(seen, pixels, strict=True):
        rows = np.empty(len(points), OBSERVATION)
        rows["xy"], rows["point"] = where + 0.5, points + 1
        observations.append(rows)
    owner = np.concatenate(seen)
    elements = np.empty(len(owner), ELEMENT)
    elements["image"] = np.repeat(np.arange(1, len(seen) + 1), [len(points) for points in seen])
    elements["index"] = np.concatenate([np.arange(len(points)) for points in seen])
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(scene.points)))])
    return _Model(scene, camera_ids, cameras, observations, elements[np.argsort(owner, kind="stable")], starts)


def _cameras_bin(model: _Model) -> bytes:
    rows = [
        struct.pack("<iiQQ4d", number, PINHOLE, frame.width, frame.height, *frame.pinhole)
        for number, frame in model.cameras.items()
    ]
    return struct.pack("<Q", len(rows)) + b"".join(rows)


def _images_bin(model: _Model) -> bytes:
    parts = [struct.pack("<Q", len(model.scene.frames))]
    for number, frame in enumerate(model.scene.frames, 1):
        rows = model.observations[number - 1]
        parts.append(struct.pack("<i7di", number, *_pose(frame), model.camera_ids[number - 1]))
        parts += [frame.name.encode() + b"\0", struct.pack("<Q", len(rows)), rows.tobytes()]
    return b"".join(parts)


def _points_bin(model: _Model) -> bytes:
    """A record and its track per point, interleaved: both are scattered to their place in one buffer."""
    heads = np.zeros(len(model.scene.points), POINT)
    heads["id"] = np.arange(1, len(heads) + 1)
    heads["xyz"], heads["rgb"] = model.scene.points, model.scene.colors
    heads["length"] = np.diff(model.starts)
    offsets = np.arange(len(heads)) * POINT.itemsize + model.starts[:-1] * ELEMENT.itemsize
    buffer = np.empty(heads.nbytes + model.elements.nbytes, np.uint8)
    is_head = np.zeros(len(buffer), np.bool_)
    is_head[offsets[:, None] + np.arange(POINT.itemsize)] = True
    buffer[is_head] = np.frombuffer(heads.tobytes(), np.uint8)
    buffer[~is_head] = np.frombuffer(model.elements.tobytes(), np.uint8)
    return struct.pack("<Q", len(heads)) + buffer.tobytes()


def _cameras_txt(model: _Model) -> Iterator[str]:
    yield "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"
    for number, frame in model.cameras.items():
        yield f"{number} PINHOLE {frame.width} {frame.height} {_numbers(frame.pinhole)}"


def _images_txt(model: _Model) -> Iterator[str]:
    yield "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; then POINTS2D[] as (X, Y, POINT3D_ID)"
    for number, frame in enumerate(model.scene.frames, 1):
        yield f"{number} {_numbers(_pose(frame))} {model.camera_ids[number - 1]} {frame.name}"
        yield " ".join(
            f"{row['xy'][0]:.6f} {row['xy'][1]:.6f} {row['point']}" for row in model.observations[number - 1]
        )


def _points_txt(model: _Model) -> Iterator[str]:
    yield "# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
    tracks = np.split(model.elements, model.starts[1:-1])
    rows = zip(model.scene.points.tolist(), model.scene.colors.tolist(), tracks, strict=True)
    for number, (xyz, (red, green, blue), track) in enumerate(rows, 1):
        seen = " ".join(f"{image} {index}" for image, index in track.tolist())
        yield f"{number} {_numbers(xyz)} {red} {green} {blue} 0 {seen}".rstrip()


def _pose(frame: Frame) -> tuple[float, ...]:
    """qw qx qy qz tx ty tz of T_cam_world."""
    T = invert(frame.T_world_cam)
    return (*quaternion(T[:3, :3]).tolist(), *T[:3, 3].tolist())


def _numbers(values: tuple[float, ...] | list[float]) -> str:
    return " ".join(repr(float(value)) for value in values)
