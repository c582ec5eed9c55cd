"""VGGT's pose encoding: translation, quaternion and fields of view in nine numbers (Wang et al., CVPR 2025).

`[tx ty tz | qx qy qz qw | fov_y fov_x]`: world to camera in OpenCV axes, scalar part last, vertical field of view
first, radians. The principal point is (W/2, H/2), as the network was trained.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from recon.errors import ReconError
from recon.geometry.views import Array


def decode_pose(encoding: ArrayLike, height: int, width: int) -> tuple[Array, Array]:
    """Encodings [S,9] of images of height x width pixels -> (T_cam_world [S,4,4], K [S,3,3]).

    Raises:
        ReconError: a value is not finite, a quaternion is zero, or a field of view is not between 0 and pi. The network
            can say so: its fields of view are rectified, and 16-bit arithmetic can overflow.
    """
    from scipy.spatial.transform import Rotation

    found = np.asarray(encoding, np.float64)
    t, q, fov = found[:, :3], found[:, 3:7], found[:, 7:]
    usable = np.isfinite(found).all(1) & (np.linalg.norm(q, axis=1) > 0) & ((fov > 0) & (fov < np.pi)).all(1)
    if not usable.all():
        bad = int(np.argmin(usable))
        raise ReconError(
            f"the network's pose of view {bad} is unusable: {np.round(found[bad], 6).tolist()} "
            "(needs finite values, a quaternion that is not 0, fields of view between 0 and pi)",
            "compare with engine=torch precision=fp32; if that is right, the chosen precision overflows",
        )
    T_cam_world = np.tile(np.eye(4), (len(found), 1, 1))
    T_cam_world[:, :3, :3] = Rotation.from_quat(q).as_matrix()
    T_cam_world[:, :3, 3] = t
    focal = np.array([height, width]) / 2 / np.tan(fov / 2)
    K = np.tile(np.eye(3), (len(found), 1, 1))
    K[:, 1, 1], K[:, 0, 0] = focal.T
    K[:, 0, 2], K[:, 1, 2] = width / 2, height / 2
    return T_cam_world, K


def encode_pose(T_cam_world: Array, K: Array, height: int, width: int) -> Array:
    """(T_cam_world [S,4,4], K [S,3,3]) -> encodings [S,9] with qw >= 0. The principal point is not encoded."""
    from scipy.spatial.transform import Rotation

    q = Rotation.from_matrix(T_cam_world[:, :3, :3]).as_quat(canonical=True)
    fov_y = 2 * np.arctan(height / (2 * K[:, 1, 1]))
    fov_x = 2 * np.arctan(width / (2 * K[:, 0, 0]))
    return np.concatenate([T_cam_world[:, :3, 3], q, fov_y[:, None], fov_x[:, None]], axis=1)
