"""What the calibration files of a source say: intrinsics and poses per camera, checked, from untrusted NPZ files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recon.errors import ReconError
from recon.geometry.distortion import Lens
from recon.geometry.rig import make_lens
from recon.geometry.rig_files import read_npz
from recon.geometry.views import Array
from recon.sources import Source


@dataclass(frozen=True)
class Intrinsics:
    """Per camera name: K [3,3], the lens with it, and the image size (width, height) where the file says so."""

    K: dict[str, Array]
    size: dict[str, tuple[int, int]]
    lens: dict[str, Lens]


def choose(source: Source, available: Sequence[str]) -> list[str]:
    """The cameras in use: `views` in the order given (or all), of which `random_views` are drawn with `seed`.

    Raises:
        ReconError: a name that does not exist, or more random views than cameras.
    """
    if unknown := [name for name in source.views if name not in available]:
        raise ReconError(
            f"source.views={source.views}: no camera {unknown[0]!r}", f"the cameras are {', '.join(available)}"
        )
    names = list(source.views or available)
    if source.random_views > len(names):
        raise ReconError(
            f"source.random_views={source.random_views}: there are only {len(names)} cameras",
            f"at most {len(names)}; 0 takes all",
        )
    if source.random_views:
        drawn = np.random.default_rng(source.seed).choice(len(names), source.random_views, replace=False)
        names = [names[index] for index in sorted(drawn)]
    return names


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorting key in which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts if part)


def read_intrinsics(path: Path, available: Sequence[str], cameras: Sequence[str]) -> Intrinsics:
    """K of every camera in `cameras`.

    The file: K [N,3,3] or [3,3] (all cameras alike); `camera_names` [N], without which the N are `available` in order;
    `width` and `height` (numbers or [N]), `distortion` ([N,4|5|8] or [4|5|8]) and `fisheye` (number or [N]), optional.

    Raises:
        ReconError: unreadable or pickled file, wrong shape, count or name, or a matrix that is no K.
    """
    from recon.geometry.cameras import check_intrinsics

    data = read_npz(path)
    stack = _array(data, "K", path, "K of shape [3,3] or [cameras,3,3]")
    names = list(cameras) if stack.ndim == 2 else _names(data, path, stack, available, cameras)
    if stack.ndim == 2:
        stack = np.broadcast_to(stack, (len(names), 3, 3))
    where = {name: names.index(name) for name in cameras}
    K = {name: check_intrinsics(stack[row], f"{path}, camera {name}") for name, row in where.items()}
    size = {}
    if "width" in data and "height" in data:
        widths, heights = (np.broadcast_to(np.asarray(data[key]).ravel(), len(names)) for key in ("width", "height"))
        size = {name: (int(widths[row]), int(heights[row])) for name, row in where.items()}
    return Intrinsics(K, size, _lenses(data, path, len(names), where, K, size))


def read_poses(path: Path, available: Sequence[str], frames: dict[str, int]) -> dict[str, Array]:
    """T_world_cam of every camera in `frames` (name -> number of frames): [1,4,4] for a fixed rig, else [T,4,4].

    The file: T_world_cam or T_cam_world, [N,4,4] or [N,T,4,4]; `camera_names` as for the intrinsics.

    Raises:
        ReconError: unreadable or pickled file, wrong count, or a matrix that is no rigid transform.
    """
    from recon.geometry.cameras import check_transform, invert

    data = read_npz(path)
    key = next((key for key in ("T_world_cam", "T_cam_world") if key in data), "")
    if not key:
        raise ReconError(
            f"{path}: holds {sorted(data)}: T_world_cam or T_cam_world is needed", "name the array by what it maps"
        )
    stack = _array(data, key, path, f"{key} of shape [cameras,4,4] or [cameras,frames,4,4]")
    if stack.ndim not in (3, 4):
        raise ReconError(
            f"{path}: {key} has the shape {list(stack.shape)}", "[cameras,4,4] or [cameras,frames,4,4] is needed"
        )
    names = _names(data, path, stack, available, list(frames))
    poses = {}
    for camera, count in frames.items():
        own = stack[names.index(camera)]
        if own.ndim == 3 and len(own) != count:
            raise ReconError(
                f"{path}: {key} has {len(own)} poses per camera, but camera {camera} has {count} frames",
                "give one pose per frame, or one per camera ([cameras,4,4]) for a fixed rig",
            )
        own = own[None] if own.ndim == 2 else own
        checked = np.array([check_transform(T, f"{path}, camera {camera}, pose {i}") for i, T in enumerate(own)])
        poses[camera] = checked if key == "T_world_cam" else invert(checked)
    return poses


def _lenses(
    data: dict[str, np.ndarray],
    path: Path,
    count: int,
    where: dict[str, int],
    K: dict[str, Array],
    size: dict[str, tuple[int, int]],
) -> dict[str, Lens]:
    bend = np.asarray(data.get("distortion", np.zeros((count, 0))))
    if bend.dtype.kind not in "fiu" or bend.ndim not in (1, 2) or (bend.ndim == 2 and len(bend) != count):
        raise ReconError(f"{path}: distortion is {bend.dtype}{list(bend.shape)}", "[cameras,4], 5 or 8 coefficients")
    rows = np.broadcast_to(bend, (count, bend.shape[-1])).astype(np.float64)
    fisheye = np.broadcast_to(np.asarray(data.get("fisheye", False)).ravel(), count)
    return {
        name: make_lens(K[name], rows[row], bool(fisheye[row]), size.get(name), f"{path}, camera {name}")
        for name, row in where.items()
    }


def _array(data: dict[str, np.ndarray], key: str, path: Path, needed: str) -> Array:
    if key not in data:
        raise ReconError(f"{path}: holds {sorted(data)}, no {key}", f"{needed} is needed")
    values, side = data[key], 4 if key.startswith("T") else 3
    if values.dtype.kind not in "fiu" or values.ndim < 2 or values.shape[-2:] != (side, side):
        raise ReconError(f"{path}: {key} is {values.dtype}{list(values.shape)}", f"{needed} is needed")
    return np.asarray(values, np.float64)


def _names(
    data: dict[str, np.ndarray], path: Path, stack: Array, available: Sequence[str], cameras: Sequence[str]
) -> list[str]:
    """The camera of every row of `stack`."""
    if "camera_names" not in data:
        if len(stack) != len(available):
            raise ReconError(
                f"{path}: has {len(stack)} entries for {len(available)} cameras ({', '.join(available)})",
                "give one per camera, in this order, or add camera_names",
            )
        return list(available)
    names = [str(name) for name in data["camera_names"].ravel()]
    if len(names) != len(stack) or len(set(names)) != len(names):
        raise ReconError(
            f"{path}: {len(names)} camera_names {names} for {len(stack)} entries", "give one name per entry, each once"
        )
    if missing := [camera for camera in cameras if camera not in names]:
        raise ReconError(
            f"{path}: has {', '.join(names)}, but nothing for camera {missing[0]}",
            "add it, or leave it out with source.views",
        )
    return names
