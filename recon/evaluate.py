"""Judging a reconstruction by what the source knows to be true: depth, poses, the map, its planes.

Every group of figures says how it was aligned with the truth (`*_alignment`) and in what unit it is (`unit`): nothing
is compared with lengths of another unit, and no scale is fitted without being named.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recon.config import Config
from recon.errors import ReconError
from recon.fusion import Map
from recon.geometry.metrics import ate, depth_metrics, pair_errors_deg, pose_auc, rpe, surface_metrics
from recon.geometry.planes import find_planes, flatness
from recon.geometry.rig_files import read_npz
from recon.geometry.views import Array, Bootstrap, PosedDepth, View
from recon.geometry.world import ToSource, to_source
from recon.sources import Surface

if TYPE_CHECKING:
    from recon.reconstruct import Reconstruction

AUC_DEG = (5, 10, 30)
LENGTH = "length"
LENGTHS = re.compile(
    r"_rmse$|_median_abs$|_bias_median$|_ate_|_trans_|_accuracy_|_completeness_|_threshold$|^plane_(rms|offset)$"
    r"|_distance_|_spacing_"
)
NAMED = ((re.compile(r"_deg$"), "deg"), (re.compile(r"_px_"), "px"),
         (re.compile(r"_(pixels|corners|pairs|judged|points)$|^planes$"), "count"))  # fmt: skip


def evaluate_map(config: Config, result: Reconstruction) -> dict[str, Any]:
    """All figures that the truth at hand allows, flat, with strings for alignment, unit and reasons.

    depth_*: aligned depth of fused frames (means over frames). bootstrap_depth_*: the network's own depth. pose_*: its
    cameras. board_*: corners of a calibration board, lifted by depth; board_rig_*: triangulated. map_*, plane_*: the
    map against the reference surface. rendered_*: depth rendered from the final map against the bootstrap depth it was
    built from, which needs no truth.
    """
    aligned = to_source(result.bootstrap)
    found: dict[str, Any] = _streamed(result) | bootstrap_poses(result.bootstrap)
    if aligned is not None and not config.source.live:
        found |= _bootstrap_depth(config, result.bootstrap, aligned)
    if aligned is not None and result.board is not None and (board := result.board.scores(aligned)):
        found |= board | {"board_alignment": aligned.how}
    found |= _surface(config, result, aligned)
    found |= _rendered(config, result)
    return {"unit": _unit(config, result), **found} if found else {}


def units(found: dict[str, Any]) -> dict[str, str]:
    """Unit of every figure that `evaluate_map` gives, by name; 1: a share or a ratio.

    Lengths are in `unit`, but those of `rendered_*` in the map's.
    """
    length = found.get("unit", "")
    named = {name: LENGTH if LENGTHS.search(name) else next((u for r, u in NAMED if r.search(name)), "1")
             for name, value in found.items() if isinstance(value, (int, float))}  # fmt: skip
    own = length if length == "m" else "the map's own"
    return {
        name: unit if unit != LENGTH else own if name.startswith("rendered_") else length
        for name, unit in named.items()
    }


def bootstrap_poses(bootstrap: Bootstrap) -> dict[str, Any]:
    """Cameras that the network predicted against those that the source gave, where it gave all but one or more.

    AUC@5, 10, 30 and the pair errors need no alignment; ATE and RPE are given after Sim3 (the network's own unit is
    unknown), or SE3 where the map got its metres from something else than these poses; RPE goes from camera to camera
    in the order of the bootstrap. Lengths are in the source's unit.
    """
    metric = bootstrap.scale.unit == "m" and not bootstrap.in_source_frame
    ours = bootstrap.T_world_cam if metric else bootstrap.T_predicted
    names = [name for name in bootstrap.T_given if name in ours]
    if not bootstrap.T_predicted or len(names) < 2:
        return {}
    found, given = (np.stack([poses[name] for name in names]) for poses in (ours, bootstrap.T_given))
    rotation, direction = pair_errors_deg(found, given)
    scores: dict[str, Any] = {f"pose_auc{limit}": pose_auc(found, given, limit) for limit in AUC_DEG}
    scores |= {
        "pose_rotation_median_deg": float(np.median(rotation)),
        "pose_direction_median_deg": float(np.median(direction)),
        "pose_pairs": float(len(rotation)),
    }
    if len(names) < 3:
        return {**scores, "pose_alignment": "none: AUC and pair errors need none; two cameras always fit each other"}
    kind = "se3" if metric else "sim3"
    absolute = ate(found, given, kind)  # type: ignore[arg-type]
    scaled = found.copy()
    scaled[:, :3, 3] *= absolute["scale"]
    scores |= {f"pose_{name}": value for name, value in absolute.items() if name != "scale"}
    scores |= {f"pose_{name}": value for name, value in rpe(scaled, given).items()}
    how = f"{kind.capitalize()} of {len(names)} camera centres for ATE, its scale for RPE; none for AUC and pair errors"
    return {**scores, "pose_scale_applied": absolute["scale"], "pose_alignment": how}


def load_reference(path: str) -> Surface:
    """A reference surface from NPZ: points_mm or points [N,3], optional normals (or normals_i8) [N,3] and seen [N].

    Raises:
        ReconError: no NPZ file, or an array is missing, empty or of another shape.
    """
    data = read_npz(Path(path))
    if "points_mm" in data:
        points = data["points_mm"].astype(np.float64) / 1000
    elif "points" in data:
        points = data["points"].astype(np.float64)
    else:
        raise ReconError(
            f"{path}: has {sorted(data)}, needs points_mm or points",
            "points [N,3] in map units, or points_mm",
        )
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise ReconError(
            f"{path}: points are {points.shape}, needed are finite [N,3]", "write one row per surface sample"
        )
    normals = (
        data["normals"]
        if "normals" in data
        else data["normals_i8"] / 127.0
        if "normals_i8" in data
        else np.zeros_like(points)
    )
    seen = data["seen"] > 0 if "seen" in data else np.ones(len(points), bool)
    if normals.shape != points.shape or seen.shape != points.shape[:1]:
        raise ReconError(
            f"{path}: normals are {normals.shape} and seen is {seen.shape} for {len(points)} points",
            "normals [N,3] and seen [N] go with points [N,3]; both may be left out",
        )
    return Surface(points, np.asarray(normals, np.float64), seen)


def _streamed(result: Reconstruction) -> dict[str, Any]:
    scores = result.depth_scores
    if not scores.count:
        return {}
    return {**scores.mean(), "depth_frames_judged": scores.count, "depth_alignment": scores.how}


def _bootstrap_depth(config: Config, bootstrap: Bootstrap, aligned: ToSource) -> dict[str, Any]:
    """The network's depth against the recorded depth of the same images, pixel by pixel at the network's resolution."""
    if not config.model.has_network:
        return {}  # recorded depth is the truth itself
    truth = {view.camera: view for view in config.source.bootstrap()}
    frames = []
    for posed in bootstrap.views:
        view = truth.get(posed.camera)
        if view is None or view.depth is None:
            continue
        known = _recorded_at(posed, view, bootstrap.K_source[posed.camera])
        mask = (known > 0) & (posed.depth > 0)
        if mask.any():
            frames.append(depth_metrics(aligned.similarity.scale * posed.depth, known, mask))
    return {**_mean("bootstrap_depth", frames), "bootstrap_depth_alignment": aligned.how} if frames else {}


def _recorded_at(posed: PosedDepth, view: View, K_source: Array) -> Array:
    """Recorded depth at every pixel of the network's image: nearest pixel of the source's, 0 outside."""
    assert view.depth is not None
    height, width = posed.depth.shape
    to_image = K_source @ np.linalg.inv(posed.K)
    u = np.rint(to_image[0, 0] * np.arange(width) + to_image[0, 2]).astype(int)
    v = np.rint(to_image[1, 1] * np.arange(height) + to_image[1, 2]).astype(int)
    inside = ((v >= 0) & (v < view.depth.shape[0]))[:, None] & (u >= 0) & (u < view.depth.shape[1])
    sampled = view.depth[np.clip(v, 0, view.depth.shape[0] - 1)][:, np.clip(u, 0, view.depth.shape[1] - 1)]
    return np.where(inside, sampled, 0)


def _surface(config: Config, result: Reconstruction, aligned: ToSource | None) -> dict[str, Any]:
    """The map, moved into the source's world, against the reference surface."""
    own = config.source.surface() if config.evaluate.reference is None else None
    surface = load_reference(config.evaluate.reference) if config.evaluate.reference else own
    if surface is None:
        return {}
    if own is None and result.scale.unit != "m":
        return {"map_not_judged": "the map's unit is arbitrary, and the reference surface is in metres"}
    if aligned is None:
        return {"map_not_judged": "the source gives no poses, so it is unknown how the map lies in its world"}
    options, fused = config.evaluate, result.fused
    points, mesh = _moved(fused, aligned)
    if len(points) > options.max_points:
        points = points[np.random.default_rng(0).choice(len(points), options.max_points, replace=False)]
    scores = surface_metrics(points, surface.points, options.threshold, surface.seen, mesh=mesh)
    planes = find_planes(surface.points, surface.normals, options.threshold / 5)
    flat = flatness(points, surface.points, planes, options.threshold)
    return {
        **{f"map_{name}": value for name, value in scores.items()},
        **flat,
        "map_alignment": aligned.how,
        "plane_alignment": aligned.how,
    }


def _moved(fused: Map, aligned: ToSource) -> tuple[Array, tuple[Array, NDArray[np.int32]] | None]:
    mesh, move = fused.mesh(), aligned.similarity.apply
    points = move(fused.points().points.astype(np.float64))
    return points, None if mesh is None else (move(mesh.vertices.astype(np.float64)), mesh.triangles)


def _rendered(config: Config, result: Reconstruction) -> dict[str, float]:
    """Depth rendered from the final map into the bootstrap views, against the depth they were built from."""
    frames = []
    for view in result.bootstrap.views:
        height, width = view.depth.shape
        rendered = result.fused.render_depth(view.K, view.T_world_cam, width, height)
        mask = (rendered > 0) & (view.depth > 0) & (view.depth < config.fusion.max_depth)
        if mask.any():
            frames.append(depth_metrics(rendered, view.depth, mask))
    return _mean("rendered", frames)


def _mean(prefix: str, frames: list[dict[str, float]]) -> dict[str, float]:
    return {f"{prefix}_{name}": float(np.mean([frame[name] for frame in frames])) for name in (frames or [{}])[0]}


def _unit(config: Config, result: Reconstruction) -> str:
    """Unit of every length in the evaluation but `rendered_*`, which is in the map's."""
    if result.scale.unit == "m" or config.source.scale().unit == "m":
        return "m" if result.scale.unit == "m" else "m (the source's; rendered_* in the map's arbitrary unit)"
    return "the source's own, of unknown length (rendered_*: the map's)"
