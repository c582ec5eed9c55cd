"""A calibration board that somebody moves through the stream: its corners, lifted by the depth of the frames."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recon.geometry.board import Camera, Corners, Key, board_errors, lift, read_corners, read_points, triangulate
from recon.geometry.views import Array, DepthImage, View
from recon.geometry.world import ToSource

DETECTED, KNOWN, TIMES = "xy_CHARUCO.csv", "xyz_CHARUCO.csv", "timestamps.csv"
SAME_TIME_S = 1e-3


@dataclass
class BoardScores:
    """Gathers corners frame by frame, because frames are not kept. times: [N,2] (time_s, moment) per camera name."""

    corners: Corners
    truth: dict[Key, Array] | None
    times: dict[str, Array]
    _cameras: dict[str, Camera] = field(default_factory=dict, init=False)
    _rows: list[Corners] = field(default_factory=list, init=False)
    _lifted: dict[Key, list[Array]] = field(default_factory=dict, init=False)

    def add(self, view: View, depth: DepthImage | None, K: Array, T_world_cam: Array) -> None:
        """One frame of a fixed camera: what it sees of the board, and where its aligned depth puts that."""
        moment = self._moment(view)
        mine = (self.corners.camera == view.camera) & (self.corners.moment == moment)
        if moment is None or not mine.any():
            return
        pixels = self.corners.pixel[mine]
        pixels = pixels if view.origin is None else view.origin.to_view(pixels)
        c = self.corners
        seen = Corners(c.moment[mine], c.corner[mine], c.camera[mine], pixels, c.board[mine])
        self._rows.append(seen)
        self._cameras[view.camera] = Camera(K, T_world_cam)
        if depth is not None:
            for key, point in lift(seen, self._cameras, {(moment, view.camera): depth}).items():
                self._lifted.setdefault(key, []).append(point)

    def scores(self, aligned: ToSource) -> dict[str, Any]:
        """Errors of the board as depth put it there (`board_*`), and as the cameras alone triangulate it
        (`board_rig_*`), in the source's unit; empty where no frame showed it."""
        if not self._rows:
            return {}
        names = ("moment", "corner", "camera", "pixel", "board")
        seen = Corners(*(np.concatenate([getattr(rows, name) for rows in self._rows]) for name in names))
        cameras = {name: Camera(c.K, aligned.pose(c.T_world_cam)) for name, c in self._cameras.items()}
        by_depth = {key: aligned.similarity.apply(np.mean(points, axis=0)) for key, points in self._lifted.items()}
        by_rig = board_errors(triangulate(seen, cameras), seen, cameras, self.truth)
        found = board_errors(by_depth, seen, cameras, self.truth)
        return {**found, **{name.replace("board_", "board_rig_", 1): value for name, value in by_rig.items()}}

    def _moment(self, view: View) -> int | None:
        known = self.times.get(view.camera)
        if known is None or view.time_s is None:
            return None
        nearest = int(np.argmin(np.abs(known[:, 0] - view.time_s)))
        return int(known[nearest, 1]) if abs(known[nearest, 0] - view.time_s) < SAME_TIME_S else None


def read_board(folder: Path, cameras: list[str]) -> BoardScores:
    """The board files of a folder as caliscope exports them: detected corners, capture times, and known corners if any.

    Cameras are matched by number: `cam_2` is number 2.

    Raises:
        ReconError: a file is missing, or has other columns.
    """
    names = {"".join(filter(str.isdigit, name)): name for name in cameras}
    found = read_corners(folder / DETECTED, "{}")
    camera = np.array([names.get(number, "") for number in found.camera])
    times: dict[str, list[tuple[float, int]]] = {}
    with (folder / TIMES).open(newline="") as file:
        for row in csv.DictReader(file):
            if (name := names.get(row["cam_id"])) is not None:
                times.setdefault(name, []).append((float(row["frame_time"]), int(row["sync_index"])))
    known = folder / KNOWN
    corners = Corners(found.moment, found.corner, camera, found.pixel, found.board)
    return BoardScores(
        corners,
        read_points(known) if known.is_file() else None,
        {name: np.array(rows) for name, rows in times.items()},
    )
