"""Pinhole cameras and rigid transforms: checks with a remedy in the message, and the few maps that everything uses.

Pixel centres lie at integer coordinates: pixel (u, v) covers [u - 0.5, u + 0.5]. Depth is z along the optical axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recon.errors import ReconError
from recon.geometry.views import Array

ROTATION_TOLERANCE = 1e-3
"""Largest entry of |R R^T - I| that still counts as a rotation: single precision stays far below."""


def check_intrinsics(K: ArrayLike, where: str) -> Array:
    """The intrinsic matrix as [3,3] float64.

    Args:
        K: pixels; [[fx, skew, cx], [0, fy, cy], [0, 0, 1]].
        where: what the message calls it, e.g. `K.npz, camera cam_0`.

    Raises:
        ReconError: wrong shape, not finite, a last row other than 0 0 1, entry (1,0) not 0, or a focal length <= 0
            (which covers every singular matrix of this form).
    """
    matrix = _matrix(K, 3, f"{where}: intrinsics", "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels")
    if not np.array_equal(matrix[2], (0, 0, 1)) or matrix[1, 0] != 0:
        raise ReconError(
            f"{where}: intrinsics have the rows {matrix[1].tolist()} and {matrix[2].tolist()}: "
            "the second must start with 0 and the third must be 0 0 1",
            "give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; a transposed matrix has cx and cy in its last row",
        )
    if not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        raise ReconError(
            f"{where}: focal lengths fx={matrix[0, 0]:g}, fy={matrix[1, 1]:g} make the intrinsics unusable: "
            "both must be positive",
            "give focal lengths in pixels; flip the image instead of using a negative one",
        )
    return matrix


def check_transform(T: ArrayLike, where: str) -> Array:
    """The rigid transform as [4,4] float64, unchanged: nothing is re-orthonormalised behind the user's back.

    Raises:
        ReconError: wrong shape, not finite, a last row other than 0 0 0 1, or an upper left block that is no rotation.
    """
    matrix = _matrix(T, 4, f"{where}: pose", "[[R, t], [0, 0, 0, 1]]")
    if not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise ReconError(
            f"{where}: the last row of the pose is {matrix[3].tolist()}: it must be 0 0 0 1",
            "give [[R, t], [0, 0, 0, 1]]; a transposed matrix has the translation in its last row",
        )
    R = matrix[:3, :3]
    deviation, determinant = float(np.abs(R @ R.T - np.eye(3)).max()), float(np.linalg.det(R))
    if deviation > ROTATION_TOLERANCE or determinant < 0:
        raise ReconError(
            f"{where}: the upper left 3x3 block of the pose is no rotation: "
            f"determinant {determinant:.6g} (must be +1), "
            f"largest entry of |R R^T - I| {deviation:.3g} (must be at most {ROTATION_TOLERANCE:g})",
            _rotation_remedy(R, determinant),
        )
    return matrix


def invert(T: Array) -> Array:
    """Inverse of rigid transforms [...,4,4]: (R, t) -> (R^T, -R^T t)."""
    R_inverse = np.swapaxes(T[..., :3, :3], -1, -2)
    out = np.zeros_like(T, dtype=np.float64)
    out[..., :3, :3] = R_inverse
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", R_inverse, T[..., :3, 3])
    out[..., 3, 3] = 1
    return out


def transform(T: Array, points: Array) -> Array:
    """Points [...,3] mapped by one transform [4,4]."""
    moved: Array = points @ T[:3, :3].T + T[:3, 3]
    return moved


def scale_intrinsics(K: Array, from_size: tuple[int, int], to_size: tuple[int, int]) -> Array:
    """K for the same view resized from `from_size` to `to_size`, both (width, height).

    With integer pixel centres a resize maps u to (u + 0.5) * sx - 0.5, so cx' = (cx + 0.5) * sx - 0.5.
    """
    sx, sy = to_size[0] / from_size[0], to_size[1] / from_size[1]
    out = np.array(K, np.float64)
    out[0] *= sx
    out[1] *= sy
    out[0, 2] += 0.5 * sx - 0.5
    out[1, 2] += 0.5 * sy - 0.5
    return out


def pixel_rays(K: Array, width: int, height: int) -> Array:
    """[height,width,3] float64 directions in the camera frame with z = 1: `rays * depth[..., None]` are points."""
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height), indexing="xy"), axis=-1).astype(np.float64)
    homogeneous = np.concatenate([grid, np.ones((height, width, 1))], axis=-1)
    rays: Array = homogeneous @ np.linalg.inv(K).T
    return rays


def unproject(depth: ArrayLike, K: Array) -> Array:
    """[H,W] z-depth -> [H,W,3] float64 points in the camera frame. Depth 0 gives the origin."""
    z = np.asarray(depth, np.float64)
    points: Array = pixel_rays(K, z.shape[1], z.shape[0]) * z[..., None]
    return points


def project(points: Array, K: Array) -> tuple[Array, Array]:
    """Points [...,3] in the camera frame -> pixel coordinates [...,2] (u, v) and z-depth [...].

    Points with z <= 0 are behind the camera: their pixel coordinates are NaN.
    """
    z = points[..., 2]
    image = points @ K.T
    safe = np.where(z > 0, z, np.nan)
    return image[..., :2] / safe[..., None], z


def _matrix(value: ArrayLike, size: int, what: str, form: str) -> NDArray[np.float64]:
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ReconError(f"{what} are no matrix of numbers: {error}", f"give {form}") from error
    if matrix.shape != (size, size):
        raise ReconError(f"{what}: shape {list(matrix.shape)} where [{size}, {size}] is needed", f"give {form}")
    if not np.isfinite(matrix).all():
        raise ReconError(f"{what}: not all values are finite: {matrix.tolist()}", f"give {form}")
    return matrix


def _rotation_remedy(R: Array, determinant: float) -> str:
    if determinant < 0:
        return "the block mirrors: negate the axis whose sign convention differs (OpenCV: x right, y down, z forward)"
    scale = float(np.cbrt(determinant)) if determinant > 0 else 0.0
    if scale > 0 and np.abs(R @ R.T / scale**2 - np.eye(3)).max() <= ROTATION_TOLERANCE:
        return f"the block is a rotation times {scale:.6g}: divide the block by it and give the scale separately"
    return "correct the source of the matrix, or re-orthonormalise it there (U V^T of its singular value decomposition)"
