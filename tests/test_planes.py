"""Planes of a surface and flatness of a reconstruction, on a box corner with known errors."""

import numpy as np
import pytest

from recon.geometry.planes import find_planes, fit_plane, flatness


def corner(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Floor, two walls (1 x 1 each) and a ball: points and normals."""
    a, b = (grid.ravel() for grid in np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n)))
    zero, one = np.zeros_like(a), np.ones_like(a)
    points = [np.stack([a, b, zero], 1), np.stack([zero, a, b], 1), np.stack([a, zero, b], 1)]
    normals = [np.stack([zero, zero, one], 1), np.stack([one, zero, zero], 1), np.stack([zero, one, zero], 1)]
    ball = np.random.default_rng(1).normal(size=(1500, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    return np.concatenate([*points, 0.5 + 0.2 * ball]), np.concatenate([*normals, ball])


def test_the_three_planes_are_found_and_the_ball_is_not() -> None:
    planes = find_planes(*corner(), tolerance=0.01)
    assert len(planes) == 3
    axes = sorted(int(np.argmax(plane.normal)) for plane in planes)
    assert axes == [0, 1, 2]
    for plane in planes:
        assert plane.normal.max() > 0.9999
        assert abs(plane.offset) < 1e-3
        assert 3500 < len(plane.points) < 3800


def test_flatness_is_the_noise_and_offset_the_shift() -> None:
    points, normals = corner()
    planes = find_planes(points, normals, tolerance=0.01)
    rng = np.random.default_rng(2)
    moved = points + normals * (0.02 + 0.005 * rng.normal(size=(len(points), 1)))
    found = flatness(moved, points, planes, reach=0.05)
    assert found["plane_rms"] == pytest.approx(0.005, rel=0.25)  # in the corners a few points go to the other plane
    assert found["plane_offset"] == pytest.approx(0.02, rel=0.1)
    assert found["planes"] == 3


def test_a_perfect_copy_is_flat_and_a_far_one_is_not_judged() -> None:
    points, normals = corner(30)
    planes = find_planes(points, normals, tolerance=0.01)
    assert flatness(points, points, planes, reach=0.05)["plane_rms"] < 2e-3
    assert flatness(points + 10, points, planes, reach=0.05) == {}


def test_a_surface_without_planes_or_normals_has_none() -> None:
    ball = np.random.default_rng(1).normal(size=(3000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    assert find_planes(ball, ball, tolerance=0.002) == []
    assert find_planes(ball, np.zeros_like(ball), tolerance=0.01) == []


def test_the_fit_faces_the_side_asked_for() -> None:
    points = np.array([[0, 0, 2.0], [1, 0, 2], [0, 1, 2], [1, 1, 2]])
    normal, offset = fit_plane(points, np.array([0, 0, -1.0]))
    np.testing.assert_allclose([*normal, offset], [0, 0, -1, -2], atol=1e-12)
