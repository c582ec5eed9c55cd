"""Where metres come from when the cameras' poses do not bring them: a distance, a board, or depth that was recorded.

A network's cameras and depth are right up to one factor. Each function here measures something of known size in that
reconstruction; `metric` multiplies all lengths by the ratio and names its source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.board import Camera, Corners, lift, triangulate
from recon.geometry.sim3 import spread, umeyama
from recon.geometry.views import Array, Bootstrap, DepthImage, Scale, View

if TYPE_CHECKING:
    from recon.geometry.rig import Baseline

log = logging.getLogger(__name__)
SOURCES = ("auto", "none", "baseline", "board", "depth", "model")
LEAST_PIXELS = 500
"""Pixels with recorded and predicted depth below which their ratio is no measurement."""
LEAST_CORNERS = 6
MOST_BOARD_RMS = 0.15
"""Misfit of a board's corners beyond which they are no picture of it: RMS, as a share of their own spread."""
MOST_SPREAD = 0.25
"""Median deviation of depth ratios from their median beyond which one factor does not describe them."""
Notes = dict[str, float | str]


@dataclass
class ScaleOptions:
    """Where the unit of the map comes from, beside poses in metres, which always win."""

    source: str = "auto"
    """auto: a known baseline, a board of known size, recorded depth or a metric depth model, the first that is there;
    none: the unit stays arbitrary; baseline, board, depth, model: this one, or the run is refused."""
    baseline: list[str] = field(default_factory=list)
    """Two cameras whose distance is known, by name."""
    baseline_m: float = 0.0
    """Distance between their optical centres, metres."""
    square_m: float = 0.0
    """Side of a square of the board, metres; 0 = no board."""
    columns: int = 0
    """Squares of the board across (ChArUco), or inner corners across (checkerboard)."""
    rows: int = 0
    """Squares down, or inner corners down."""
    dictionary: str = ""
    """ArUco dictionary such as DICT_4X4_50 for a ChArUco board; empty = a plain checkerboard."""
    marker_m: float = 0.0
    """Side of a ChArUco marker, metres."""

    def check(self) -> None:
        """Raises ReconError for impossible or half-given values."""
        if self.source not in SOURCES:
            raise ReconError(f"scale.source={self.source}: no such source", f"choose from {', '.join(SOURCES)}")
        if bool(self.baseline) != bool(self.baseline_m) or (self.baseline and len(set(self.baseline)) != 2):
            raise ReconError(
                f"scale.baseline={self.baseline} scale.baseline_m={self.baseline_m}: two cameras and their distance",
                "scale.baseline=[left,right] scale.baseline_m=0.12",
            )
        if min(self.baseline_m, self.square_m, self.marker_m) < 0:
            raise ReconError(
                f"scale.baseline_m={self.baseline_m} scale.square_m={self.square_m} scale.marker_m={self.marker_m}: "
                "a length must not be negative",
                "give them in metres",
            )
        if not self.square_m and (self.columns or self.rows or self.dictionary or self.marker_m):
            raise ReconError(
                f"scale.columns={self.columns} scale.rows={self.rows} without scale.square_m: the board has no size",
                "scale.square_m is the side of one of its squares in metres",
            )
        if self.square_m and (self.columns < 2 or self.rows < 2):
            raise ReconError(
                f"scale.square_m={self.square_m} with {self.columns}x{self.rows}: a board has columns and rows",
                "scale.columns=5 scale.rows=4 scale.square_m=0.03",
            )
        if self.square_m and self.dictionary and not 0 < self.marker_m < self.square_m:
            raise ReconError(
                f"scale.marker_m={self.marker_m}: a marker is smaller than its square of {self.square_m} m",
                "measure one marker's black side",
            )
        if self.square_m and self.dictionary:
            _dictionary(self.dictionary)


def metric(
    found: Bootstrap,
    views: list[View],
    known: Baseline | None,
    options: ScaleOptions,
    learned: Callable[[], list[View]] | None = None,
) -> Bootstrap:
    """The bootstrap in metres, where something of known size was seen; unchanged where nothing was.

    A bootstrap that is metric already stays as it is; what `options` ask for is then measured as a check.

    Args:
        found: depth and cameras in any unit. views: the frames that it was found on. known: the source's own baseline.
        learned: gives the same frames with the depth of a metric model in place of a recorded one.

    Raises:
        ReconError: the source that `options` name gives no measurement.
    """
    if options.source == "none":
        return found
    measured = _measure(found, views, known, options, learned)
    if measured is None:
        return found
    factor, name, notes = measured
    if found.scale.unit == "m":
        return replace(found, notes={**found.notes, **notes, f"scale_check_{name.split()[-1]}": factor})
    log.info("metres from %s: 1 unit = %.4f m", name, factor)
    return replace(
        found,
        views=[
            replace(view, depth=(view.depth * factor).astype(np.float32), T_world_cam=_scaled(view.T_world_cam, factor))
            for view in found.views
        ],
        T_world_cam={camera: _scaled(pose, factor) for camera, pose in found.T_world_cam.items()},
        scale=Scale("m", name),
        depth_type="metric",
        notes={**found.notes, **notes, "scale_metres_per_unit": factor},
    )


def _measure(
    found: Bootstrap,
    views: list[View],
    known: Baseline | None,
    options: ScaleOptions,
    learned: Callable[[], list[View]] | None,
) -> tuple[float, str, Notes] | None:
    """The first source that gives a ratio. A check of a metric bootstrap uses only what was given by hand."""
    checking = found.scale.unit == "m"
    if options.source in ("auto", "baseline") and (options.baseline or (known is not None and not checking)):
        first, second = options.baseline or (known.first, known.second)  # type: ignore[union-attr]
        metres = options.baseline_m or known.metres  # type: ignore[union-attr]
        return _by_baseline(found, first, second, metres)
    reasons = [f"no baseline is known ({', '.join(found.T_world_cam)})"]
    if options.source in ("auto", "board") and options.square_m:
        board = _by_board(found, views, options)
        if isinstance(board, tuple):
            return board
        reasons.append(board)
        log.warning("no metres from the board: %s", board)
    if options.source in ("auto", "depth") and not checking:
        depth = _by_depth(found, views, "recorded depth")
        if isinstance(depth, tuple):
            return depth
        reasons.append(depth)
    if options.source in ("auto", "model") and not checking:
        depth = _by_depth(found, learned() if learned is not None else [], "metric model")
        if isinstance(depth, tuple):
            return depth
        reasons.append("the streaming depth is no metric model" if learned is None else depth)
    if options.source != "auto" and not checking:
        raise ReconError(
            f"scale.source={options.source} gives no metres: {reasons[-1]}",
            "scale.source=none keeps the unit arbitrary",
        )
    return None


def _by_baseline(found: Bootstrap, first: str, second: str, metres: float) -> tuple[float, str, Notes]:
    for camera in (first, second):
        if camera not in found.T_world_cam:
            raise ReconError(
                f"scale.baseline: no camera {camera!r} in the bootstrap", f"cameras: {', '.join(found.T_world_cam)}"
            )
    distance = float(np.linalg.norm(found.T_world_cam[first][:3, 3] - found.T_world_cam[second][:3, 3]))
    if not distance > 1e-6:
        raise ReconError(
            f"scale.baseline: the network puts {first!r} and {second!r} in one place", "choose cameras further apart"
        )
    notes: Notes = {"scale_confidence": "one distance: its error is the scale's, and nothing else tells of it"}
    return metres / distance, "known baseline", notes


def _by_board(found: Bootstrap, views: list[View], options: ScaleOptions) -> tuple[float, str, Notes] | str:
    """From corners that two cameras see, else from corners put into space by the network's depth."""
    seen = detect(views, options)
    if not len(seen.corner):
        return "no camera of the bootstrap sees it"
    cameras = {
        view.camera: Camera(found.K_source[view.camera], found.T_world_cam[view.camera])
        for view in views
        if view.camera in found.T_world_cam
    }
    points, by = triangulate(seen, cameras), "triangulated"
    if len(points) < LEAST_CORNERS:
        points, by = lift(seen, cameras, _depth_at_source(found, views)), "lifted by the network's depth"
    if len(points) < LEAST_CORNERS:
        return f"{len(points)} corners found in space, {LEAST_CORNERS} are needed"
    place = {int(corner): board for corner, board in zip(seen.corner, seen.board, strict=True)}
    ours, board = np.stack(list(points.values())), np.stack([place[corner] for _, corner in points])
    similarity = umeyama(ours, board)
    rms = float(np.sqrt(np.mean(np.sum((similarity.apply(ours) - board) ** 2, axis=1))))
    if rms > MOST_BOARD_RMS * (size := spread(board)):
        return (
            f"its {len(points)} corners, {by}, miss its grid by {1000 * rms:.0f} mm RMS, over {MOST_BOARD_RMS:.0%} of "
            f"their spread of {1000 * size:.0f} mm: the bootstrap does not show the board as it is"
        )
    notes: Notes = {
        "scale_board_corners": float(len(points)),
        "scale_board_rms_m": rms,
        "scale_board_corners_are": by,
        "scale_confidence": f"board: corners miss its plane grid by {1000 * rms:.1f} mm RMS",
    }
    return similarity.scale, "calibration board", notes


def detect(views: list[View], options: ScaleOptions) -> Corners:
    """Corners of the board in every view, by OpenCV; views are without distortion. One moment: 0."""
    import cv2

    rows: list[tuple[int, str, Array, Array]] = []
    for view in views:
        grey = cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY)
        for number, pixel in _corners(grey, options).items():
            across = options.columns - 1 if options.dictionary else options.columns
            place = np.array([number % across, number // across, 0.0]) * options.square_m
            rows.append((number, view.camera, pixel, place))
    return Corners(
        np.zeros(len(rows), np.int64),
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.str_),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 2),
        np.array([row[3] for row in rows], np.float64).reshape(-1, 3),
    )


def _corners(grey: Any, options: ScaleOptions) -> dict[int, Array]:
    """Inner corners by number, row by row."""
    import cv2

    if not options.dictionary:
        kind = cv2.CALIB_CB_EXHAUSTIVE | cv2.CALIB_CB_ACCURACY
        ok, corners = cv2.findChessboardCornersSB(grey, (options.columns, options.rows), flags=kind)
        return dict(enumerate(corners.reshape(-1, 2).astype(np.float64))) if ok else {}
    words = cv2.aruco.getPredefinedDictionary(_dictionary(options.dictionary))
    board = cv2.aruco.CharucoBoard((options.columns, options.rows), options.square_m, options.marker_m, words)
    parameters = cv2.aruco.DetectorParameters()
    parameters.detectInvertedMarker = True  # printed white on black, as some boards are
    corners, numbers, _, _ = cv2.aruco.CharucoDetector(board, detectorParams=parameters).detectBoard(grey)
    if corners is None:
        return {}
    pairs = zip(numbers.ravel(), corners.reshape(-1, 2).astype(np.float64), strict=True)
    return {int(number): pixel for number, pixel in pairs}


def _dictionary(name: str) -> int:
    """OpenCV's number of an ArUco dictionary."""
    import cv2

    number = getattr(cv2.aruco, name, None)
    if not name.startswith("DICT_") or number is None:
        raise ReconError(f"scale.dictionary={name}: OpenCV has none of this name", "e.g. DICT_4X4_50")
    return int(number)


def _by_depth(found: Bootstrap, views: list[View], name: str) -> tuple[float, str, Notes] | str:
    """Median ratio of the views' depth to the bootstrap's over all pixels that have both."""
    recorded = {view.camera: view.depth for view in views if view.depth is not None}
    if not recorded:
        return f"no frame has depth ({name})"
    ratios = []
    for posed in found.views:
        if posed.camera in recorded:
            truth = _resampled(recorded[posed.camera], posed.K, posed.depth.shape, found.K_source[posed.camera])
            both = (truth > 0) & (posed.depth > 0)
            ratios.append(truth[both] / posed.depth[both])
    pooled = np.concatenate(ratios) if ratios else np.empty(0)
    if pooled.size < LEAST_PIXELS:
        return f"{pooled.size} pixels have recorded and predicted depth, {LEAST_PIXELS} are needed"
    factor = float(np.median(pooled))
    deviation = float(np.median(np.abs(pooled / factor - 1)))
    if deviation > MOST_SPREAD:
        reason = f"{name} and the bootstrap's differ by {deviation:.0%} after scaling (median), over {MOST_SPREAD:.0%}"
        log.warning("no metres from %s", reason)
        return reason
    notes: Notes = {
        "scale_depth_pixels": float(pooled.size),
        "scale_depth_spread": deviation,
        "scale_confidence": f"{name}: ratios differ by {deviation:.1%} (median)",
    }
    return factor, name, notes


def _depth_at_source(found: Bootstrap, views: list[View]) -> dict[tuple[int, str], DepthImage]:
    """The network's depth at the resolution of the source's images; moment 0."""
    sizes = {view.camera: view.image.shape[:2] for view in views}
    return {
        (0, posed.camera): _resampled(posed.depth, found.K_source[posed.camera], sizes[posed.camera], posed.K)
        for posed in found.views
        if posed.camera in sizes
    }


def _resampled(depth: DepthImage, K_to: Array, shape: tuple[int, ...], K_from: Array) -> DepthImage:
    """`depth` seen by other intrinsics of the same camera: the nearest pixel along each ray, 0 outside."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    u = np.rint((columns - K_to[0, 2]) / K_to[0, 0] * K_from[0, 0] + K_from[0, 2]).astype(np.int64)
    v = np.rint((rows - K_to[1, 2]) / K_to[1, 1] * K_from[1, 1] + K_from[1, 2]).astype(np.int64)
    inside = (u >= 0) & (v >= 0) & (u < depth.shape[1]) & (v < depth.shape[0])
    found = np.zeros(shape[:2], np.float32)
    found[inside] = depth[v[inside], u[inside]]
    return found


def _scaled(T_world_cam: Array, factor: float) -> Array:
    moved = T_world_cam.copy()
    moved[:3, 3] *= factor
    return moved
