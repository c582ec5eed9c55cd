"""How far depth, surfaces and poses are from the truth. Names say the unit, docstrings the alignment.

Lengths are in the unit of the arguments (map units; metres where the scale is known), shares lie in 0..1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recon import optional
from recon.geometry.cameras import invert
from recon.geometry.views import Array


def depth_metrics(pred: ArrayLike, truth: ArrayLike, mask: ArrayLike) -> dict[str, float]:
    """Depth errors over the masked pixels, without any alignment: both arguments in the same unit.

    Args:
        pred, truth: [H,W] (or any equal shape); positive wherever `mask` is true.
        mask: bool, at least one pixel.

    Returns:
        absrel (mean |dz|/z), rmse and median_abs (in the unit of the arguments), bias_median (median of dz), delta1 to
        delta3 (share with max ratio below 1.25^k; Eigen et al. 2014), within_1pct, within_5pct (share with |dz|/z
        below), within_0.02 and front_0.05 (share with |dz| < 0.02, with dz < -0.05 units: 2 cm and 5 cm in metres),
        pixels (count).

    Raises:
        ValueError: shapes differ, the mask is empty, or a masked value is not positive and finite.
    """
    chosen = np.asarray(mask, bool)
    p, z = np.asarray(pred), np.asarray(truth)
    if not p.shape == z.shape == chosen.shape:
        raise ValueError(f"shapes of prediction {p.shape}, truth {z.shape} and mask {chosen.shape} differ")
    p, z = p[chosen].astype(np.float64), z[chosen].astype(np.float64)
    if not len(p) or not (np.isfinite(p) & np.isfinite(z) & (p > 0) & (z > 0)).all():
        raise ValueError(f"{len(p)} masked pixels, {int((~(p > 0)).sum())} predictions and {int((~(z > 0)).sum())} "
                         "truths not positive: mask out what is not measured")  # fmt: skip
    dz = p - z
    size, ratio = np.abs(dz), np.maximum(p / z, z / p)
    relative = size / z
    return {
        "absrel": float(relative.mean()),
        "rmse": float(np.sqrt(np.mean(dz**2))),
        "median_abs": float(np.median(size)),
        "bias_median": float(np.median(dz)),
        **{f"delta{k}": float(np.mean(ratio < 1.25**k)) for k in (1, 2, 3)},
        "within_1pct": float(np.mean(relative < 0.01)),
        "within_5pct": float(np.mean(relative < 0.05)),
        "within_0.02": float(np.mean(size < 0.02)),
        "front_0.05": float(np.mean(dz < -0.05)),
        "pixels": float(len(p)),
    }


def surface_metrics(
    points: ArrayLike,
    reference_points: ArrayLike,
    threshold: float,
    seen: ArrayLike | None = None,
    mesh: tuple[ArrayLike, ArrayLike] | None = None,
    reference_mesh: tuple[ArrayLike, ArrayLike] | None = None,
) -> dict[str, float]:
    """A reconstructed surface against a reference, in the same frame and unit: no registration is done.

    Args:
        points: [N,3] of the reconstruction (points, or vertices of its mesh).
        reference_points: [M,3].
        threshold: distance for precision and recall (Knapitsch et al. 2017, *Tanks and Temples*).
        seen: [M] bool; only these reference points are asked for. Points of the reconstruction are judged against all.
        mesh: (vertices, triangles) of the reconstruction: completeness is measured to its triangles, not to `points`.
        reference_mesh: the same for accuracy.

    Returns:
        accuracy_{median,mean} (reconstruction to reference), completeness_{median,mean} (reference to reconstruction),
        precision, recall, f_score at the threshold, and the threshold. Distances to points instead of triangles carry
        a floor of about half the spacing of those points.

    Raises:
        ValueError: nothing to compare, or not [N,3].
    """
    ours, reference = _cloud(points, "points"), _cloud(reference_points, "reference points")
    asked = reference if seen is None else reference[np.asarray(seen, bool)]
    if not len(asked):
        raise ValueError("no reference point is marked as seen")
    accuracy = point_to_mesh(ours, *reference_mesh) if reference_mesh else nearest(ours, reference)
    completeness = point_to_mesh(asked, *mesh) if mesh else nearest(asked, ours)
    precision, recall = float(np.mean(accuracy < threshold)), float(np.mean(completeness < threshold))
    return {
        "accuracy_median": float(np.median(accuracy)),
        "accuracy_mean": float(accuracy.mean()),
        "completeness_median": float(np.median(completeness)),
        "completeness_mean": float(completeness.mean()),
        "precision": precision,
        "recall": recall,
        "f_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "threshold": threshold,
    }


def nearest(points: Array, others: Array) -> Array:
    """[N] distance from each point to the nearest of the others [M,3]."""
    from scipy.spatial import cKDTree

    distances: Array = cKDTree(others).query(points, workers=-1)[0]
    return distances


def point_to_mesh(points: ArrayLike, vertices: ArrayLike, triangles: ArrayLike) -> Array:
    """[N] distance from each point to the nearest triangle (Open3D's RaycastingScene; single precision)."""
    o3d = optional.open3d()
    scene = o3d.t.geometry.RaycastingScene()
    corners = np.ascontiguousarray(triangles, np.uint32)
    if not len(corners):
        raise ValueError("a mesh without triangles has no surface to measure to")
    scene.add_triangles(o3d.core.Tensor(np.ascontiguousarray(vertices, np.float32)), o3d.core.Tensor(corners))
    queries = o3d.core.Tensor(np.ascontiguousarray(points, np.float32))
    distances: Array = scene.compute_distance(queries).numpy().astype(np.float64)
    return distances


def align_positions(
    estimated: ArrayLike, truth: ArrayLike, with_scale: bool
) -> tuple[float, Array, NDArray[np.float64]]:
    """Scale, rotation [3,3] and translation [3] with `truth ~ scale * R @ estimated + t`, least squares (Umeyama 1991).

    Positions on a line or in one place leave rotations free: then the one nearest to no rotation is not guaranteed.
    """
    x, y = _cloud(estimated, "estimated positions"), _cloud(truth, "true positions")
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} estimated positions against {len(y)} true ones")
    x0, y0 = x - x.mean(0), y - y.mean(0)
    U, S, Vt = np.linalg.svd(y0.T @ x0 / len(x))
    sign = np.array([1, 1, np.sign(np.linalg.det(U @ Vt))])
    R: Array = U * sign @ Vt
    variance = float(np.mean(np.sum(x0**2, axis=1)))
    scale = float(S @ sign) / variance if with_scale and variance > 0 else 1.0
    return scale, R, y.mean(0) - scale * R @ x.mean(0)


def ate(estimated: Array, truth: Array, alignment: Literal["none", "se3", "sim3"]) -> dict[str, float]:
    """Absolute trajectory error of camera positions after the named alignment (Sturm et al. 2012).

    Args:
        estimated, truth: [N,4,4] T_world_cam. At least three positions that are not on a line, if aligned.

    Returns:
        ate_rmse, ate_median, ate_max in units of `truth`, and the scale applied (1 without `sim3`).
    """
    x, y = np.asarray(estimated)[:, :3, 3], np.asarray(truth)[:, :3, 3]
    scale, R, t = (1.0, np.eye(3), np.zeros(3)) if alignment == "none" else align_positions(x, y, alignment == "sim3")
    errors = np.linalg.norm(scale * x @ R.T + t - y, axis=1)
    return {
        "ate_rmse": float(np.sqrt(np.mean(errors**2))),
        "ate_median": float(np.median(errors)),
        "ate_max": float(errors.max()),
        "scale": scale,
    }


def rpe(estimated: Array, truth: Array, step: int = 1) -> dict[str, float]:
    """Relative pose error over `step` frames (Sturm et al. 2012): rpe_trans_rmse in units of length, rpe_rot_rmse_deg.

    No alignment of the world frames is needed; an unknown scale is not removed.
    """
    if len(estimated) != len(truth) or not 0 < step < len(truth):
        raise ValueError(f"{len(estimated)} estimated and {len(truth)} true poses with step {step}")
    ours = invert(estimated[:-step]) @ estimated[step:]
    theirs = invert(truth[:-step]) @ truth[step:]
    error = invert(theirs) @ ours
    shift = np.linalg.norm(error[:, :3, 3], axis=1)
    return {
        "rpe_trans_rmse": float(np.sqrt(np.mean(shift**2))),
        "rpe_rot_rmse_deg": float(np.sqrt(np.mean(rotation_angle_deg(error[:, :3, :3]) ** 2))),
    }


def pair_errors_deg(estimated: Array, truth: Array) -> tuple[Array, Array]:
    """Rotation and translation-direction errors in degrees of every pair of cameras, [N(N-1)/2] each.

    Relative poses are compared, so neither the world frame nor the scale matters. The direction of a relative
    translation of length zero is undefined: its error is 0 where both are zero, 180 where one is.
    """
    i, j = np.triu_indices(len(truth), 1)
    ours, theirs = invert(estimated[i]) @ estimated[j], invert(truth[i]) @ truth[j]
    rotation = rotation_angle_deg(np.swapaxes(theirs[:, :3, :3], 1, 2) @ ours[:, :3, :3])
    a, b = ours[:, :3, 3], theirs[:, :3, 3]
    angle = np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=1), np.sum(a * b, axis=1)))
    still_a, still_b = (np.linalg.norm(v, axis=1) < 1e-12 for v in (a, b))
    return rotation, np.where(still_a & still_b, 0.0, np.where(still_a | still_b, 180.0, angle))


def pose_auc(estimated: Array, truth: Array, max_deg: int = 30) -> float:
    """AUC@max_deg over camera pairs: mean over thresholds 1..max_deg degrees of the share of pairs whose rotation and
    translation-direction error are both below. Directions are told from their opposites (errors reach 180), which
    evaluations that take a translation's sign as unknown do not do."""
    worst = np.maximum(*pair_errors_deg(estimated, truth))
    return float(np.mean([np.mean(worst < threshold) for threshold in range(1, max_deg + 1)]))


def rotation_angle_deg(R: Array) -> Array:
    """Angles [N] in degrees of rotations [N,3,3], accurate near 0 and 180."""
    axis = np.stack([R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], axis=1)
    angles: Array = np.degrees(np.arctan2(np.linalg.norm(axis, axis=1), np.trace(R, axis1=1, axis2=2) - 1))
    return angles


def _cloud(points: ArrayLike, what: str) -> Array:
    cloud = np.asarray(points, np.float64)
    if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud) or not np.isfinite(cloud).all():
        raise ValueError(f"{what}: shape {cloud.shape}, needed is finite [N,3] with N > 0")
    return cloud
