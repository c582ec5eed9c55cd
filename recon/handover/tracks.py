"""Which image sees which point of the map: projection into the images, with occlusion tested against the map itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.geometry.cameras import invert, project, transform
from recon.geometry.views import Array
from recon.handover.scene import Frame, Scene

TOLERANCE = 0.02
"""A point this share of its depth behind the nearest one in its cell still counts as seen."""
STEEPEST = 5.0
"""Tangent of the angle of sight to the normal beyond which a surface is treated as no steeper."""


@dataclass(frozen=True)
class Tracks:
    """Per frame: indices of the points it sees, ascending, and where: pixels [n,2] with pixel centres at integers."""

    points: list[NDArray[np.int64]]
    pixels: list[Array]
    count: int

    def lengths(self) -> NDArray[np.int64]:
        """[N] number of images that see each point."""
        return np.bincount(np.concatenate(self.points), minlength=self.count)

    def facts(self) -> dict[str, Any]:
        lengths = self.lengths()
        seen = lengths[lengths > 0]
        return {
            "tracks": "projections of the map's points, occlusion tested against the map",
            "observations": int(lengths.sum()),
            "points_seen": len(seen),
            "track_length_mean": float(seen.mean()) if len(seen) else 0.0,
        }


def find_tracks(scene: Scene) -> Tracks:
    """Observations of every point in every frame. A point is seen where it is in front of the camera, inside the image,
    faces the camera (where it has a normal), and no part of the map lies clearly nearer in its cell of the image."""
    spacing = _spacing(scene.occluders)
    found = [_seen(scene, frame, spacing) for frame in scene.frames]
    return Tracks([index for index, _ in found], [pixels for _, pixels in found], len(scene.points))


def _seen(scene: Scene, frame: Frame, spacing: float) -> tuple[NDArray[np.int64], Array]:
    T_cam_world = invert(frame.T_world_cam)
    pixels, z = project(transform(T_cam_world, scene.points.astype(np.float64)), frame.K)
    inside = _inside(pixels, z, frame)
    sight = frame.T_world_cam[:3, 3] - scene.points
    cosine = np.einsum("ij,ij->i", scene.normals, sight) / np.maximum(np.linalg.norm(sight, axis=1), 1e-12)
    oriented = scene.normals.any(axis=1)
    inside &= (cosine > 0) | ~oriented
    slope = np.where(oriented, np.sqrt(np.maximum(1 - cosine**2, 0)) / np.maximum(cosine, 1 / STEEPEST), 1.0)
    cell, nearest = _depth_cells(scene, frame, T_cam_world, spacing)
    index = np.flatnonzero(inside)
    row, column = _cells(pixels[index], cell)
    within_cell = slope[index] * z[index] * cell / frame.K[0, 0]  # depth that the point's own surface spans there
    visible = z[index] <= nearest[row, column] * (1 + TOLERANCE) + 2 * spacing + within_cell
    index = index[visible]
    return index, pixels[index]


def _depth_cells(scene: Scene, frame: Frame, T_cam_world: Array, spacing: float) -> tuple[int, Array]:
    """Nearest depth of the map in square cells of the image, as wide as points of the map lie apart in it."""
    pixels, z = project(transform(T_cam_world, scene.occluders.astype(np.float64)), frame.K)
    inside = _inside(pixels, z, frame)
    middle = float(np.median(z[inside])) if inside.any() else 1.0
    cell = int(np.clip(np.ceil(1.5 * spacing * frame.K[0, 0] / middle), 1, 64))
    nearest = np.full((frame.height // cell + 1, frame.width // cell + 1), np.inf)
    np.minimum.at(nearest, _cells(pixels[inside], cell), z[inside])
    return cell, nearest


def _inside(pixels: Array, z: Array, frame: Frame) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        u, v = pixels[:, 0], pixels[:, 1]
        return (z > 0) & (u >= -0.5) & (u < frame.width - 0.5) & (v >= -0.5) & (v < frame.height - 0.5)


def _cells(pixels: Array, cell: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    grid = np.floor((pixels + 0.5) / cell).astype(np.int64)
    return grid[:, 1], grid[:, 0]


def _spacing(points: NDArray[np.float32]) -> float:
    """Median distance of a point to its nearest neighbour, from a sample."""
    from scipy.spatial import cKDTree

    tree = cKDTree(points)
    sample = points[:: max(1, len(points) // 2000)]
    return float(np.median(tree.query(sample, k=2, workers=-1)[0][:, 1]))
