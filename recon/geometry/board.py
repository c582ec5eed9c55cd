"""A calibration board in a reconstruction: corners from several cameras or from depth, judged in pixels and in metres.

Corners are rows of a table: at a moment (time step), a camera sees a corner of the board at an undistorted pixel.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.geometry.cameras import invert, project, transform
from recon.geometry.views import Array, DepthImage

Key = tuple[int, int]
"""(moment, corner)."""
FORESHORTENED = 0.5
"""Depths of a corner's four neighbouring pixels that differ by more than this share of it lie on an edge: no value."""


@dataclass(frozen=True)
class Camera:
    """K [3,3] in pixels without distortion, T_world_cam [4,4]."""

    K: Array
    T_world_cam: Array

    def project(self, points: Array) -> Array:
        """Pixels [...,2] of points [...,3] of the world; NaN behind the camera."""
        return project(transform(invert(self.T_world_cam), points), self.K)[0]


@dataclass(frozen=True)
class Corners:
    """moment [N], corner [N] (its number), camera [N] (name), pixel [N,2], board [N,3] (place on the board, metres)."""

    moment: NDArray[np.int64]
    corner: NDArray[np.int64]
    camera: NDArray[np.str_]
    pixel: Array
    board: Array


def read_corners(path: Path, camera: str = "cam_{}") -> Corners:
    """Corners as caliscope's `xy_CHARUCO.csv` lists them; `camera` makes a name of its camera number.

    Pixels are as detected: undistort them before use.

    Raises:
        ReconError: the file is missing, or a column is.
    """
    rows = _rows(path, ("sync_index", "cam_id", "keypoint_id", "img_loc_x", "img_loc_y", "obj_loc_x"))
    return Corners(
        np.array([int(row["sync_index"]) for row in rows]),
        np.array([int(row["keypoint_id"]) for row in rows]),
        np.array([camera.format(row["cam_id"]) for row in rows]),
        np.array([[float(row[f"img_loc_{axis}"]) for axis in "xy"] for row in rows]),
        np.array([[float(row[f"obj_loc_{axis}"]) for axis in "xyz"] for row in rows]),
    )


def read_points(path: Path) -> dict[Key, Array]:
    """Triangulated corners by (moment, corner), as caliscope's `xyz_CHARUCO.csv` lists them, metres.

    Raises:
        ReconError: the file is missing, or a column is.
    """
    rows = _rows(path, ("sync_index", "keypoint_id", "x_coord", "y_coord", "z_coord"))
    return {
        (int(row["sync_index"]), int(row["keypoint_id"])): np.array([float(row[f"{axis}_coord"]) for axis in "xyz"])
        for row in rows
    }


def triangulate(corners: Corners, cameras: Mapping[str, Camera]) -> dict[Key, Array]:
    """Every corner that two cameras or more see at one moment, by (moment, corner).

    Linear least squares on the rows of x (P3 X) - P1 X = 0 (Hartley and Zisserman, section 12.2), with each camera's
    rows scaled by focal length, so that they weigh alike.
    """
    views: dict[Key, list[Array]] = {}
    for index, name in enumerate(corners.camera):
        if name in cameras:
            P = invert(cameras[name].T_world_cam)
            x, y, w = np.linalg.solve(cameras[name].K, [*corners.pixel[index], 1.0])
            rows = np.stack([x / w * P[2] - P[0], y / w * P[2] - P[1]]) * cameras[name].K[0, 0]
            views.setdefault((int(corners.moment[index]), int(corners.corner[index])), []).append(rows)
    found: dict[Key, Array] = {}
    for key, parts in views.items():
        if len(parts) > 1:
            A = np.concatenate(parts)
            found[key] = np.asarray(np.linalg.lstsq(A[:, :3], -A[:, 3], rcond=None)[0], np.float64)
    return found


def lift(
    corners: Corners, cameras: Mapping[str, Camera], depth: Mapping[tuple[int, str], DepthImage]
) -> dict[Key, Array]:
    """Corners put into space by depth images (by moment and camera): the mean over the cameras that see one.

    depth: [H,W] float32, 0 = none, in the unit of the poses, without distortion like the pixels. Between pixels depth
    is interpolated linearly; corners at depth edges are left out.
    """
    found: dict[Key, list[Array]] = {}
    for index, name in enumerate(corners.camera):
        image = depth.get((int(corners.moment[index]), str(name)))
        z = None if image is None else _between(image, corners.pixel[index])
        if z is not None:
            camera = cameras[str(name)]
            ray = np.linalg.solve(camera.K, [*corners.pixel[index], 1.0])
            key = int(corners.moment[index]), int(corners.corner[index])
            found.setdefault(key, []).append(transform(camera.T_world_cam, z * ray))
    return {key: np.stack(points).mean(axis=0) for key, points in found.items()}


def board_errors(
    found: Mapping[Key, Array],
    corners: Corners,
    cameras: Mapping[str, Camera],
    truth: Mapping[Key, Array] | None = None,
) -> dict[str, float]:
    """How well a reconstructed board fits what the cameras saw, its own size, and known positions.

    Returns:
        board_reprojection_px_{median,p95}: distance of reconstructed corners from detected ones over all cameras;
        board_spacing_error_{median,mean}: distance between neighbouring corners minus the board's own (signed mean,
        absolute median); board_distance_{median,p95}: from the true corners, with `truth`; board_corners: count.
        Lengths are in the unit of the poses. Empty where nothing was found.
    """
    if not found:
        return {}
    scores = _percentiles("board_reprojection_px", _reprojection(found, corners, cameras))
    spacing = _spacing(found, corners)
    if len(spacing):
        scores |= {
            "board_spacing_error_median": float(np.median(np.abs(spacing))),
            "board_spacing_error_mean": float(spacing.mean()),
        }
    if truth is not None:
        scores |= _percentiles(
            "board_distance", np.array([np.linalg.norm(found[key] - truth[key]) for key in found if key in truth])
        )
    return {**scores, "board_corners": float(len(found))}


def _reprojection(found: Mapping[Key, Array], corners: Corners, cameras: Mapping[str, Camera]) -> Array:
    errors = []
    for index, name in enumerate(corners.camera):
        key = int(corners.moment[index]), int(corners.corner[index])
        if key in found and str(name) in cameras:
            errors.append(float(np.linalg.norm(cameras[str(name)].project(found[key]) - corners.pixel[index])))
    return np.array(errors)


def _spacing(found: Mapping[Key, Array], corners: Corners) -> Array:
    """Distance of neighbouring corners of one moment minus the distance on the board."""
    board = {int(number): corners.board[i] for i, number in enumerate(corners.corner)}
    numbers = sorted(board)
    between = np.linalg.norm(np.array([board[a] for a in numbers])[:, None] - [board[b] for b in numbers], axis=-1)
    step = float(between[between > 0].min())
    pairs = [
        (a, b) for i, a in enumerate(numbers) for j, b in enumerate(numbers) if i < j and between[i, j] < 1.01 * step
    ]
    moments = {moment for moment, _ in found}
    return np.array(
        [
            np.linalg.norm(found[m, a] - found[m, b]) - np.linalg.norm(board[a] - board[b])
            for m in sorted(moments)
            for a, b in pairs
            if (m, a) in found and (m, b) in found
        ]
    )


def _between(depth: DepthImage, pixel: Array) -> float | None:
    u, v = int(np.floor(pixel[0])), int(np.floor(pixel[1]))
    if not (0 <= u < depth.shape[1] - 1 and 0 <= v < depth.shape[0] - 1):
        return None
    four = depth[v : v + 2, u : u + 2].astype(np.float64)
    if not (four > 0).all() or np.ptp(four) > FORESHORTENED * four.min():
        return None
    a, b = pixel - [u, v]
    return float(np.array([1 - b, b]) @ four @ [1 - a, a])


def _percentiles(name: str, values: Array) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{name}_median": float(np.median(values)), f"{name}_p95": float(np.quantile(values, 0.95))}


def _rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ReconError(f"{path}: cannot be read: {error.strerror}", "give the board's CSV file") from error
    if not rows or (missing := [name for name in needed if name not in rows[0]]):
        raise ReconError(
            f"{path}: has no rows with {', '.join(missing if rows else needed)}", "as caliscope exports it"
        )
    return rows
