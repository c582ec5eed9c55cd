"""Planes in a known surface, and how flat a reconstruction is where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recon.geometry.views import Array

HYPOTHESES, SAMPLE = 200, 5_000
COSINE = 0.97
"""Normals of a plane's points agree with its own to within 14 degrees."""
FEWEST = 50
"""Points of the reconstruction below which a plane is not judged."""


@dataclass(frozen=True)
class Plane:
    """normal @ x = offset, and the indices of the points that lie on it."""

    normal: Array
    offset: float
    points: NDArray[np.int64]


def find_planes(
    points: Array, normals: Array, tolerance: float, least_share: float = 0.03, most: int = 8
) -> list[Plane]:
    """The largest planes of an oriented surface [N,3], each with at least `least_share` of its points.

    Greedy: hypotheses are points of a sample with their normals (fixed seed), the one with most points within
    `tolerance` is refined twice by least squares, its points are taken out.
    """
    rng, planes = np.random.default_rng(0), list[Plane]()
    free = np.flatnonzero(np.linalg.norm(normals, axis=1) > 0.5)
    while len(planes) < most and len(free) >= max(3, least_share * len(points)):
        sample = free if len(free) <= SAMPLE else rng.choice(free, SAMPLE, replace=False)
        seeds = rng.choice(sample, min(HYPOTHESES, len(sample)), replace=False)
        offsets = np.einsum("ij,ij->i", points[seeds], normals[seeds])
        best = int(
            np.argmax(_inliers(points[sample], normals[sample], normals[seeds].T, offsets, tolerance).sum(axis=0))
        )
        normal, offset = normals[seeds[best]], float(offsets[best])
        for _ in range(2):
            near = free[_inliers(points[free], normals[free], normal, offset, tolerance)]
            normal, offset = fit_plane(points[near], normal)
        inside = _inliers(points[free], normals[free], normal, offset, tolerance)
        if inside.sum() < least_share * len(points):
            break
        planes.append(Plane(normal, offset, free[inside]))
        free = free[~inside]
    return planes


def flatness(points: Array, reference: Array, planes: list[Plane], reach: float) -> dict[str, float]:
    """How flat the reconstruction [N,3] is on planes of the reference [M,3].

    A point belongs to the plane of its nearest reference point, if that is nearer than `reach`.

    Returns:
        plane_rms: root mean square distance to the plane that fits the reconstruction best; plane_offset: mean absolute
        distance, weighted by points, of that plane's points (their median) from the true plane; both in the unit of the
        points. planes: number judged; plane_points: points judged. Empty where no plane has enough points.
    """
    from scipy.spatial import cKDTree

    label = np.full(len(reference), -1)
    for number, plane in enumerate(planes):
        label[plane.points] = number
    distance, nearest = cKDTree(reference).query(points, workers=-1)
    owner = np.where(distance < reach, label[nearest], -1)
    squares, offsets, counts = [], [], []
    for number, plane in enumerate(planes):
        own = points[owner == number]
        if len(own) < FEWEST:
            continue
        normal, offset = fit_plane(own, plane.normal)
        squares.append(float(((own @ normal - offset) ** 2).sum()))
        offsets.append(abs(float(np.median(own @ plane.normal - plane.offset))))
        counts.append(len(own))
    if not counts:
        return {}
    return {
        "plane_rms": float(np.sqrt(sum(squares) / sum(counts))),
        "plane_offset": float(np.average(offsets, weights=counts)),
        "planes": float(len(counts)),
        "plane_points": float(sum(counts)),
    }


def fit_plane(points: Array, toward: Array) -> tuple[Array, float]:
    """Unit normal and offset of the least-squares plane of points [N,3], its normal on the side of `toward`."""
    centre = points.mean(axis=0)
    normal = np.linalg.eigh((points - centre).T @ (points - centre))[1][:, 0]
    normal = normal if normal @ toward >= 0 else -normal
    return normal, float(normal @ centre)


def _inliers(
    points: Array, normals: Array, normal: Array, offset: float | Array, tolerance: float
) -> NDArray[np.bool_]:
    """[N] points on a plane; [N,P] for normals [3,P] and offsets [P]."""
    return (np.abs(points @ normal - offset) < tolerance) & (normals @ normal > COSINE)
