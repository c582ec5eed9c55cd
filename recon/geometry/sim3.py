"""Similarity transforms: what relates a reconstruction of unknown scale to known camera poses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import Array


@dataclass(frozen=True)
class Sim3:
    """x -> scale * R @ x + t."""

    scale: float
    R: Array
    t: Array

    def apply(self, points: Array) -> Array:
        """Points [...,3] mapped."""
        moved: Array = self.scale * points @ self.R.T + self.t
        return moved


def umeyama(source: Array, target: Array) -> Sim3:
    """The similarity that takes `source` [N,3] to `target` [N,3] with the least sum of squared distances.

    Closed form by Umeyama, "Least-squares estimation of transformation parameters between two point patterns"
    (PAMI 1991). With points on one line the rotation about it is not determined; scale and residual still are.

    Raises:
        ReconError: fewer than two points, or all source points coincide: then there is no scale.
    """
    count = len(source)
    mean_source, mean_target = source.mean(0), target.mean(0)
    a, b = source - mean_source, target - mean_target
    variance = float((a**2).sum()) / count
    if count < 2 or variance <= 1e-12 * max(1.0, float((mean_source**2).sum())):
        raise ReconError(
            f"no scale can be found from {count} camera centre(s) with a variance of {variance:.3g}",
            "give at least two cameras that stand at different places",
        )
    U, singular, Vt = np.linalg.svd(b.T @ a / count)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(U) * np.linalg.det(Vt))])
    R = (U * sign) @ Vt
    scale = float((singular * sign).sum() / variance)
    return Sim3(scale, R, mean_target - scale * R @ mean_source)


def rms_distance(found: Array, target: Array) -> float:
    """Root mean square distance of points [N,3]."""
    return float(np.sqrt(((found - target) ** 2).sum(-1).mean()))


def spread(points: Array) -> float:
    """Root mean square distance of points [N,3] from their mean."""
    return rms_distance(points, points.mean(0))


def extent(points: Array) -> float:
    """Largest distance between two of the points [N,3]."""
    return float(np.linalg.norm(points[:, None] - points[None], axis=-1).max())


def rotation_residual_deg(source: Array, target: Array) -> float:
    """RMS angle, degrees, between rotations [N,3,3] after the best common rotation: target_i ~ R @ source_i.

    The common rotation is the chordal mean (Hartley et al., "Rotation averaging", IJCV 2013). Unlike the residual of
    centres this one also judges rigs of two cameras, or of cameras on one line.
    """
    U, _, Vt = np.linalg.svd((target @ np.swapaxes(source, 1, 2)).sum(0))
    common = (U * np.array([1.0, 1.0, np.linalg.det(U @ Vt)])) @ Vt
    cosine = (np.einsum("nij,nij->n", target, common @ source) - 1) / 2
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return float(np.sqrt((angles**2).mean()))
