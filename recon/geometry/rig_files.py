"""Rig files by content: our own NPZ, TOML as caliscope and Anipose write it, nerfstudio's JSON, COLMAP's folders.

Every reader gives `T_world_cam` with OpenCV axes and K for integer pixel centres; COLMAP and nerfstudio put the centre
of the first pixel at 0.5, so theirs lose half a pixel. All files are untrusted data: what does not fit is refused.
"""

from __future__ import annotations

import json
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.cameras import check_transform, invert
from recon.geometry.colmap import colmap_folder, read_colmap
from recon.geometry.rig import Baseline, Rig, RigEntry, make_lens, pose_from
from recon.geometry.views import Scale

NPZ_REMEDY = "write it with numpy.savez, plain arrays only"
FORMS = (
    "an .npz, a TOML with [cameras.NAME], nerfstudio's transforms.json, or a folder with COLMAP's cameras and images"
)
_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # nerfstudio's cameras look along -z with y up
_SOURCE = "known poses"


def read_rig(path: Path, unit: str | None = None) -> Rig:
    """The rig in a file or folder, whose kind its content tells.

    Args:
        unit: `m` or `arbitrary` overrides what the file says of its translations. Without it, metres are believed of
            the TOML with a `cameras` table (caliscope's form) and of files that state their unit; the rest is
            arbitrary, until a baseline in the file scales it.

    Raises:
        ReconError: unreadable, unknown or inconsistent content, with the place.
    """
    if not path.exists():
        raise ReconError(f"source.rig={path}: no such file or folder", f"give {FORMS}")
    rig = _read(path)
    if unit is not None:
        rig = replace(rig, scale=Scale("m", _SOURCE) if unit == "m" else Scale())
    return rig.in_metres()


def _read(path: Path) -> Rig:
    if (folder := colmap_folder(path)) is not None:
        return Rig("COLMAP", str(path), read_colmap(folder))
    if path.is_dir():
        if (path / "transforms.json").is_file():
            return _read(path / "transforms.json")
        raise ReconError(f"source.rig={path}: a folder without cameras.txt, cameras.bin or transforms.json", FORMS)
    if path.open("rb").read(2) == b"PK":
        return _npz(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReconError(f"source.rig={path}: is no rig file that is known: {error}", f"give {FORMS}") from error
    return _nerfstudio(path, text) if text.lstrip().startswith("{") else _toml(path, text)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an NPZ file. Objects are refused: loading them would run code from the file."""
    if not path.is_file():
        raise ReconError(f"{path}: no such file", "give an existing .npz")
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise ReconError(f"{path}: a single array, not an .npz archive", NPZ_REMEDY)
        with data:
            return {key: data[key] for key in data.files}
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise ReconError(
                f"{path}: holds pickled Python objects, which are not loaded: they can run code", NPZ_REMEDY
            ) from error
        raise ReconError(f"{path}: cannot be read: {error}", NPZ_REMEDY) from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ReconError(f"{path}: cannot be read: {error}", NPZ_REMEDY) from error


def _npz(path: Path) -> Rig:
    """camera_names [N]; optional K [N,3,3], width, height, distortion [N,4|5|8], fisheye [N], T_world_cam or
    T_cam_world [N,4,4], unit, baseline_cameras [2] with baseline_m."""
    data = read_npz(path)
    if "camera_names" not in data:
        raise ReconError(f"{path}: holds {sorted(data)}, no camera_names", "a rig names its cameras: camera_names [N]")
    names = [str(name) for name in data["camera_names"].ravel()]
    if len(set(names)) != len(names):
        raise ReconError(f"{path}: camera_names {names}: a name stands twice", "name every camera once")
    size = _per_camera(path, data, ("width", "height"), names)
    key = next((key for key in ("T_world_cam", "T_cam_world") if key in data), None)
    for name, side in (("K", 3), (key, 4)):
        if name in data and data[name].shape != (len(names), side, side):
            raise ReconError(
                f"{path}: {name} has the shape {list(data[name].shape)}", f"[{len(names)},{side},{side}] is needed"
            )
    entries = {}
    for row, name in enumerate(names):
        lens = pose = None
        where = f"{path}, camera {name}"
        if "K" in data:
            bend = np.atleast_2d(data["distortion"])[row] if "distortion" in data else ()
            fisheye = bool(np.broadcast_to(data.get("fisheye", False), len(names))[row])
            lens = make_lens(data["K"][row], bend, fisheye, (size[0][row], size[1][row]) if size else None, where)
        if key is not None:
            pose = check_transform(data[key][row], where)
            pose = pose if key == "T_world_cam" else invert(pose)
        entries[name] = RigEntry(lens, pose)
    unit = str(data["unit"]) if "unit" in data else "arbitrary"
    pair = [str(name) for name in data["baseline_cameras"].ravel()] if "baseline_cameras" in data else []
    metres = data["baseline_m"].item() if "baseline_m" in data and data["baseline_m"].size == 1 else None
    return Rig("NPZ", str(path), entries, _scale(unit, path), _baseline(pair, metres, list(entries), path))


def _per_camera(path: Path, data: dict[str, np.ndarray], keys: tuple[str, ...], names: list[str]) -> list[list[int]]:
    if not all(key in data for key in keys):
        return []
    try:
        return [[int(v) for v in np.broadcast_to(data[key].ravel(), len(names))] for key in keys]
    except ValueError as error:
        raise ReconError(f"{path}: {' and '.join(keys)}: {error}", "one number, or one per camera") from error


def _toml(path: Path, text: str) -> Rig:
    """`[cameras.NAME]` or `[NAME]` with matrix, distortions, rotation and translation (world to camera), size."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ReconError(f"source.rig={path}: is no rig file that is known: {error}", f"give {FORMS}") from error
    tables = document.get("cameras")
    nested = isinstance(tables, dict)
    if not isinstance(tables, dict):
        tables = document
    found = {key: table for key, table in tables.items() if isinstance(table, dict) and "matrix" in table}
    if not found:
        raise ReconError(f"source.rig={path}: no table with a matrix in it", "[cameras.NAME] with matrix = [[fx, ..")
    entries = {}
    for key, table in found.items():
        if table.get("ignore"):
            continue
        where = f"{path}, camera {key}"
        if table.get("rotation_count"):
            raise ReconError(f"{where}: rotation_count={table['rotation_count']}", "rotate the recording upright")
        entries[str(table.get("name", key))] = _toml_entry(table, where)
    stated = document.get("unit", "m" if nested else "arbitrary")
    base = document.get("baseline", {})
    base = base if isinstance(base, dict) else {}
    pair = [str(name) for name in base.get("cameras", [])]
    return Rig(
        "TOML", str(path), entries, _scale(str(stated), path), _baseline(pair, base.get("metres"), list(entries), path)
    )


def _toml_entry(table: dict[str, Any], where: str) -> RigEntry:
    try:
        size = table.get("size")
        lens = make_lens(
            table["matrix"],
            table.get("distortions", ()),
            bool(table.get("fisheye", False)),
            (int(size[0]), int(size[1])) if size else None,
            where,
        )
        pose = None
        if "rotation" in table and "translation" in table:
            pose = pose_from(table["rotation"], table["translation"], where, to_world=False)
    except (TypeError, ValueError, IndexError) as error:
        raise ReconError(f"{where}: {error}", "numbers in the form that caliscope writes") from error
    return RigEntry(lens, pose)


def _nerfstudio(path: Path, text: str) -> Rig:
    """transforms.json (docs.nerf.studio, "Data conventions"): shared or per-frame optics, camera to world, OpenGL."""
    try:
        document = json.loads(text)
        frames = document["frames"]
        entries = {}
        for frame in frames:
            optics = {**document, **frame}
            name = PurePosixPath(str(frame["file_path"]))
            where = f"{path}, {name}"
            T = check_transform(np.asarray(frame["transform_matrix"], np.float64) @ _OPENGL, where)
            entries[str(name.with_suffix(""))] = RigEntry(_nerfstudio_lens(optics, where), T)
    except (KeyError, TypeError, ValueError) as error:
        raise ReconError(
            f"{path}: is no transforms.json: {error!r}", "nerfstudio's ns-process-data writes one"
        ) from error
    return Rig("nerfstudio", str(path), entries, _scale(str(document.get("unit", "arbitrary")), path))


def _nerfstudio_lens(optics: dict[str, Any], where: str) -> Any:
    size = (int(optics["w"]), int(optics["h"])) if "w" in optics and "h" in optics else None
    fisheye = "FISHEYE" in str(optics.get("camera_model", "OPENCV")).upper()
    k1, k2, k3, k4, p1, p2 = (float(optics.get(key, 0.0)) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if not fisheye and k4:
        raise ReconError(
            f"{where}: k4={k4:g} of a lens that is no fisheye: no such term in OpenCV's model", "calibrate with k4=0"
        )
    if "fl_x" in optics:
        fx = float(optics["fl_x"])
        fy = float(optics.get("fl_y", fx))
    elif "camera_angle_x" in optics and size:
        fx = fy = 0.5 * size[0] / float(np.tan(0.5 * float(optics["camera_angle_x"])))
    else:
        return None
    cx, cy = (float(optics[key]) if key in optics else None for key in ("cx", "cy"))
    if cx is None or cy is None:
        if size is None:
            return None
        cx, cy = size[0] / 2, size[1] / 2
    bend = (k1, k2, k3, k4) if fisheye else (k1, k2, p1, p2, k3) if any((k1, k2, p1, p2, k3)) else ()
    return make_lens([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], bend, fisheye, size, where, centre=0.5)


def _scale(unit: str, path: Path) -> Scale:
    if unit not in ("m", "arbitrary"):
        raise ReconError(f"{path}: unit {unit!r}", "m or arbitrary; convert other units to metres")
    return Scale("m", _SOURCE) if unit == "m" else Scale()


def _baseline(pair: list[str], metres: object, names: list[str], path: Path) -> Baseline | None:
    if not pair and metres is None:
        return None
    good = isinstance(metres, (int, float)) and np.isfinite(metres) and metres > 0
    if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(names) or not good:
        raise ReconError(
            f"{path}: baseline between {pair} of {metres} m",
            f"two different cameras of {', '.join(names)}, and a positive distance in metres",
        )
    assert isinstance(metres, (int, float))
    return Baseline(pair[0], pair[1], float(metres))
