"""Judging a reconstruction: depth against recorded depth frame by frame, the map against a known surface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.config import Config
from recon.errors import ReconError
from recon.geometry.metrics import depth_metrics, surface_metrics
from recon.sources import Surface

if TYPE_CHECKING:
    from recon.reconstruct import Reconstruction


def evaluate_map(config: Config, result: Reconstruction) -> dict[str, Any]:
    """Depth metrics (mean over fused frames), depth rendered from the map, and the map against the reference surface.

    Metrics that need a known scale are left out, with the reason, when the map's unit is arbitrary.
    """
    found: dict[str, Any] = dict(result.depth_scores.mean())
    found["depth_frames_judged"] = result.depth_scores.count
    surface = load_reference(config.evaluate.reference) if config.evaluate.reference else config.source.surface()
    if result.scale.unit != "m":
        found["not_judged"] = "the map's unit is arbitrary, so it cannot be compared with lengths in metres"
        return found
    found |= _rendered(config, result)
    if surface is not None:
        found |= _against(surface, config, result)
    return found if len(found) > 1 else {}


def load_reference(path: str) -> Surface:
    """A reference surface from NPZ: points_mm or points [N,3], optional normals (or normals_i8) [N,3] and seen [N].

    Raises:
        ReconError: an array is missing or has another shape.
    """
    with np.load(Path(path), allow_pickle=False) as data:
        if "points_mm" in data:
            points = data["points_mm"].astype(np.float64) / 1000
        elif "points" in data:
            points = data["points"].astype(np.float64)
        else:
            raise ReconError(
                f"{path}: has {sorted(data.files)}, needs points_mm or points",
                "points [N,3] in map units, or points_mm",
            )
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
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
    return Surface(points, np.asarray(normals, np.float64), seen)


def _rendered(config: Config, result: Reconstruction) -> dict[str, float]:
    """Depth rendered from the final map into the bootstrap views, against the depth they were built from."""
    frames = []
    for view in result.bootstrap.views:
        height, width = view.depth.shape
        rendered = result.fused.render_depth(view.K, view.T_world_cam, width, height)
        mask = (rendered > 0) & (view.depth > 0) & (view.depth < config.fusion.max_depth)
        if mask.any():
            frames.append(depth_metrics(rendered, view.depth, mask))
    return (
        {f"rendered_{name}": float(np.mean([frame[name] for frame in frames])) for name in frames[0]} if frames else {}
    )


def _against(surface: Surface, config: Config, result: Reconstruction) -> dict[str, float]:
    mesh = result.fused.mesh()
    options = config.evaluate
    points = result.fused.points().points
    if len(points) > options.max_points:
        points = points[np.random.default_rng(0).choice(len(points), options.max_points, replace=False)]
    triangles = (mesh.vertices, mesh.triangles) if mesh is not None else None
    scores = surface_metrics(points, surface.points, options.threshold, surface.seen, mesh=triangles)
    return {f"map_{name}": value for name, value in scores.items()}
