"""Where the map's world lies in the source's: what has to be known before anything is compared with ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recon.geometry.sim3 import Sim3
from recon.geometry.views import Array, Bootstrap


@dataclass(frozen=True)
class ToSource:
    """source ~ similarity(map). how: one sentence for metrics.json."""

    similarity: Sim3
    how: str

    def pose(self, T_world_cam: Array) -> Array:
        """A pose [4,4] of the map's world in the source's."""
        out = np.eye(4)
        out[:3, :3] = self.similarity.R @ T_world_cam[:3, :3]
        out[:3, 3] = self.similarity.apply(T_world_cam[:3, 3])
        return out

    def inverse_pose(self, T_world_cam: Array) -> Array:
        """A pose [4,4] of the source's world in the map's."""
        s = self.similarity
        out = np.eye(4)
        out[:3, :3] = s.R.T @ T_world_cam[:3, :3]
        out[:3, 3] = s.R.T @ (T_world_cam[:3, 3] - s.t) / s.scale
        return out


def to_source(bootstrap: Bootstrap) -> ToSource | None:
    """How the map's world maps to that of the source's poses; None where the source gave fewer than two.

    Where the bootstrap took the given poses over there is nothing to align. Else the cameras found are aligned with the
    given ones: the mean rotation and the centres, with a scale (Sim3) unless the map is in metres (SE3).
    """
    if bootstrap.in_source_frame:
        return ToSource(Sim3(1.0, np.eye(3), np.zeros(3)), "none: the map is in the frame of the source's poses")
    names = [name for name in bootstrap.T_given if name in bootstrap.T_world_cam]
    if len(names) < 2:
        return None
    found, given = (np.stack([poses[name] for name in names]) for poses in (bootstrap.T_world_cam, bootstrap.T_given))
    with_scale = bootstrap.scale.unit != "m"
    similarity = align_cameras(found, given, with_scale)
    kind = "Sim3" if with_scale else "SE3"
    return ToSource(similarity, f"{kind} of {len(names)} bootstrap cameras to the source's poses")


def align_cameras(found: Array, given: Array, with_scale: bool) -> Sim3:
    """The similarity that takes poses [N,4,4] to given ones: the chordal mean of their rotations, then scale and
    translation by least squares over the centres.

    Unlike a fit to the centres alone it is unique for two cameras, and for cameras on a line.
    """
    U, _, Vt = np.linalg.svd((given[:, :3, :3] @ np.swapaxes(found[:, :3, :3], 1, 2)).sum(axis=0))
    R = U * np.array([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
    x, y = found[:, :3, 3] @ R.T, given[:, :3, 3]
    x0, y0 = x - x.mean(axis=0), y - y.mean(axis=0)
    variance = float((x0**2).sum())
    scale = float((x0 * y0).sum()) / variance if with_scale and variance > 0 else 1.0
    return Sim3(scale, R, y.mean(axis=0) - scale * x.mean(axis=0))
