"""Camera maps against independent arithmetic, and the checks that guard them."""

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from recon.errors import ReconError
from recon.geometry.cameras import (
    check_intrinsics,
    check_transform,
    invert,
    pixel_rays,
    project,
    scale_intrinsics,
    transform,
    unproject,
)

K = np.array([[500.0, 0, 310], [0, 520, 255], [0, 0, 1]])


def pose(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    T = np.eye(4)
    T[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    T[:3, 3] = rng.normal(size=3)
    return T


def test_unproject_then_project_returns_the_pixels():
    depth = np.random.default_rng(0).uniform(0.5, 4, (6, 9))
    points = unproject(depth, K)
    pixels, z = project(points, K)
    v, u = np.mgrid[:6, :9]
    np.testing.assert_allclose(pixels, np.stack([u, v], -1), atol=1e-10)
    np.testing.assert_allclose(z, depth)
    assert points[2, 5] == pytest.approx([(5 - 310) / 500 * depth[2, 5], (2 - 255) / 520 * depth[2, 5], depth[2, 5]])


def test_project_agrees_with_opencv():
    points = np.random.default_rng(1).uniform([-1, -1, 1], [1, 1, 4], (20, 3))
    T = pose(3)
    in_camera = transform(T, points)
    in_camera[:, 2] = np.abs(in_camera[:, 2]) + 0.1
    expected = cv2.projectPoints(in_camera, np.zeros(3), np.zeros(3), K, None)[0][:, 0]
    np.testing.assert_allclose(project(in_camera, K)[0], expected, atol=1e-9)


def test_points_behind_the_camera_have_no_pixel():
    assert np.isnan(project(np.array([[0.1, 0.1, -1.0], [0, 0, 0]]), K)[0]).all()


def test_invert_of_a_batch():
    T = np.stack([pose(1), pose(2)])
    np.testing.assert_allclose(invert(T) @ T, np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-12)


def test_scaled_intrinsics_see_the_same_ray_at_the_same_place_of_the_image():
    small = scale_intrinsics(K, (640, 480), (160, 96))
    corners = np.array([[-0.5, -0.5, 1], [639.5, 479.5, 1]])  # outer corners, integer centres
    corners_small = np.array([[-0.5, -0.5, 1], [159.5, 95.5, 1]])
    np.testing.assert_allclose(corners @ np.linalg.inv(K).T, corners_small @ np.linalg.inv(small).T, atol=1e-12)


def test_scaled_intrinsics_match_an_area_resize():
    """A linear ramp of ray slopes, averaged 4 to 1, is the ramp of the scaled camera."""
    slopes = pixel_rays(K, 640, 480)[..., 0]
    averaged = cv2.resize(slopes, (160, 120), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(
        averaged, pixel_rays(scale_intrinsics(K, (640, 480), (160, 120)), 160, 120)[..., 0], atol=1e-12
    )


def test_good_values_pass_unchanged():
    np.testing.assert_array_equal(check_intrinsics(K.tolist(), "K"), K)
    T = pose(4).astype(np.float32)
    np.testing.assert_array_equal(check_transform(T, "T"), T)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.eye(4), r"shape \[4, 4\] where \[3, 3\]"),
        ([[np.nan, 0, 1], [0, 1, 1], [0, 0, 1]], "not all values are finite"),
        (K.T, "transposed"),
        (np.diag([0.0, 500, 1]), "fx=0"),
        (np.diag([500.0, -500, 1]), "fy=-500"),
        (np.zeros((3, 3)), "0 0 1"),
        ([["a", 0, 0]], "no matrix of numbers"),
        ([[1, 2], [3]], "no matrix of numbers"),
    ],
)
def test_bad_intrinsics_are_refused(bad, says):
    with pytest.raises(ReconError, match=says) as caught:
        check_intrinsics(bad, "K.npz, camera left")
    assert "K.npz, camera left" in caught.value.problem
    assert caught.value.remedy


def broken(change) -> np.ndarray:
    T = pose(5)
    change(T)
    return T


@pytest.mark.parametrize(
    ("bad", "problem", "remedy"),
    [
        (np.eye(3), r"shape \[3, 3\]", "give"),
        (broken(lambda T: T.__setitem__((0, 3), np.inf)), "finite", "give"),
        (pose(5).T, "last row", "transposed"),
        (broken(lambda T: T.__setitem__((slice(3), 0), -T[:3, 0])), "determinant -1", "mirrors"),
        (broken(lambda T: T.__setitem__((slice(3), slice(3)), 2 * T[:3, :3])), "determinant 8", "rotation times 2"),
        (broken(lambda T: T.__setitem__((0, 0), T[0, 0] + 0.01)), r"R R\^T - I", "re-orthonormalise"),
        (broken(lambda T: T.__setitem__((slice(3), slice(3)), 0)), "determinant 0", "re-orthonormalise"),
    ],
)
def test_bad_poses_are_refused(bad, problem, remedy):
    with pytest.raises(ReconError, match=problem) as caught:
        check_transform(bad, "P.npz, camera left, frame 3")
    assert "P.npz, camera left, frame 3" in caught.value.problem
    assert remedy in caught.value.remedy
