"""calibration.json: the scale and shift of every camera, with what they were found for.

A pair (s, t) turns the output of one depth network on images of one camera into depth in one unit. It says nothing
about another network, another lens, another image size, or a map whose arbitrary unit is a different one; so the file
carries all of that, and reading it back for anything else is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from recon.artifact import content_key, write_atomic
from recon.errors import ReconError
from recon.geometry.views import Array

FORMAT = 1
REDO = "leave align.per_camera_calib out: the run finds the pairs itself and writes a new file"


@dataclass(frozen=True)
class Provenance:
    """What pairs are found for. map_key: identity of the bootstrap, which fixes an arbitrary unit."""

    depth: dict[str, Any]
    depth_type: str
    unit: str
    map_key: str


def write_calibration(
    path: Path, provenance: Provenance, states: dict[str, dict[str, Any]], sizes: dict[str, tuple[int, int]],
    K: dict[str, Array],
) -> None:  # fmt: skip
    """Write the states of all aligners (`CameraAligner.state()`) with their provenance."""
    cameras = {
        name: {**state, "size": sizes.get(name), "intrinsics_sha256": intrinsics_key(K.get(name))}
        for name, state in states.items()
    }
    found = {
        "format": FORMAT,
        "model": "1/z = s*d + t" if provenance.depth_type == "disparity" else "1/z = s/prediction",
        "depth_type": provenance.depth_type,
        "unit": provenance.unit,
        "map_key": provenance.map_key,
        "depth": provenance.depth,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cameras": cameras,
    }
    write_atomic(path, json.dumps(found, indent=1) + "\n")


def read_calibration(
    path: Path, provenance: Provenance, cameras: list[str], K: dict[str, Array]
) -> dict[str, dict[str, Any]]:
    """The entries of `cameras` from a file that another run wrote, once everything that they depend on agrees.

    Raises:
        ReconError: the file is no calibration, or was found for another network, lens or map; nothing is taken over.
    """
    data = load_calibration(path, cameras)
    for key, wanted in (
        ("depth_type", provenance.depth_type),
        ("unit", provenance.unit),
        ("depth", provenance.depth),
    ):
        if data.get(key) != wanted:
            raise _mismatch(path, key, data.get(key), wanted)
    if provenance.unit != "m" and data.get("map_key") != provenance.map_key:
        raise ReconError(
            f"{path}: its map is another one, and both units are arbitrary, so its scales mean nothing here", REDO
        )
    found = {}
    for camera in cameras:
        entry = data["cameras"][camera]
        if entry.get("intrinsics_sha256") != intrinsics_key(K.get(camera)):
            raise ReconError(f"{path}: camera {camera!r} has other intrinsics now", REDO)
        found[camera] = _checked(path, camera, entry)
    return found


def require_size(path: str, camera: str, entry: dict[str, Any], size: tuple[int, int]) -> None:
    """Raise ReconError where a camera's images have another size than those that its pair was found on."""
    if entry.get("size") is not None and tuple(entry["size"]) != size:
        was = "x".join(map(str, entry["size"]))
        raise ReconError(f"{path}: camera {camera!r} had images of {was}, now {size[0]}x{size[1]}", REDO)


def intrinsics_key(K: Array | None) -> str | None:
    """Hash of intrinsics to a millionth of a pixel; None where they are not known."""
    return None if K is None else content_key(np.round(K, 6))


def load_calibration(path: Path, cameras: list[str]) -> dict[str, Any]:
    """The whole file. Raises ReconError where it is no calibration that a run wrote, or lacks one of the cameras."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ReconError(f"align.per_camera_calib={path}: {error.strerror}", REDO) from error
    except ValueError as error:
        raise ReconError(f"{path}: is no JSON: {error}", REDO) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("cameras"), dict):
        raise ReconError(f"{path}: is no calibration of format {FORMAT}", "give a calibration.json that a run wrote")
    if missing := [camera for camera in cameras if not isinstance(data["cameras"].get(camera), dict)]:
        known = ", ".join(sorted(data["cameras"])) or "none"
        raise ReconError(f"{path}: has no camera {missing[0]!r}; it has {known}", REDO)
    return data


def _checked(path: Path, camera: str, entry: dict[str, Any]) -> dict[str, Any]:
    pair = entry.get("s"), entry.get("t")
    if pair == (None, None):
        raise ReconError(f"{path}: camera {camera!r} has no pair, none of its frames was accepted", REDO)
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair):
        raise ReconError(f"{path}: camera {camera!r} has s, t = {pair}, which are no numbers", REDO)
    return entry


def _mismatch(path: Path, key: str, was: object, now: object) -> ReconError:
    if isinstance(was, dict) and isinstance(now, dict):
        differing = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        return ReconError(
            f"{path}: was found with other depth settings ({', '.join(f'depth.{name}' for name in differing)})", REDO
        )
    return ReconError(f"{path}: was found for {key} {was!r}, and this run has {now!r}", REDO)
