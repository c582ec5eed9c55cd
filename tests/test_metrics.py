"""Metrics on cases with a known answer, worked out by hand or by geometry."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from recon.geometry.metrics import (
    align_positions,
    ate,
    depth_metrics,
    pair_errors_deg,
    point_to_mesh,
    pose_auc,
    rotation_angle_deg,
    rpe,
    surface_metrics,
)


def grid(n: int, z: float = 0.0) -> np.ndarray:
    a = np.linspace(0, 1, n)
    return np.stack([*np.meshgrid(a, a), np.full((n, n), z)], -1).reshape(-1, 3)


SQUARE = (np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]), np.array([[0, 1, 2], [0, 2, 3]]))


def test_depth_metrics_by_hand():
    truth = np.array([[1.0, 2.0, 4.0, 0.0]])
    pred = np.array([[1.1, 1.94, 6.0, 5.0]], np.float32)
    found = depth_metrics(pred, truth, truth > 0)
    assert found["absrel"] == pytest.approx((0.1 + 0.03 + 0.5) / 3, abs=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt((0.01 + 0.0036 + 4) / 3), abs=1e-6)
    assert found["median_abs"] == pytest.approx(0.1, abs=1e-6)
    assert found["bias_median"] == pytest.approx(0.1, abs=1e-6)
    assert found["delta1"] == pytest.approx(2 / 3)
    assert found["delta2"] == 1  # 1.5 < 1.5625
    assert found["within_5pct"] == pytest.approx(1 / 3)
    assert found["within_0.02"] == 0
    assert found["front_0.05"] == pytest.approx(1 / 3)
    assert found["pixels"] == 3


def test_depth_metrics_refuse_pixels_without_a_value():
    depth = np.array([[1.0, 0.0]])
    with pytest.raises(ValueError, match="1 truths"):
        depth_metrics(np.ones((1, 2)), depth, np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="0 masked"):
        depth_metrics(depth, depth, np.zeros((1, 2), bool))
    with pytest.raises(ValueError, match="1 predictions"):
        depth_metrics(np.array([[1, np.nan]]), np.ones((1, 2)), np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="differ"):
        depth_metrics(np.ones((1, 3)), depth, depth > 0)


def test_distance_to_a_mesh_is_to_its_triangles():
    points = np.array([[0.3, 0.4, 0.25], [-0.3, 0.5, 0.4], [0.7, 0.2, 0]])
    np.testing.assert_allclose(point_to_mesh(points, *SQUARE), [0.25, 0.5, 0], atol=1e-6)


def test_surface_one_centimetre_off():
    found = surface_metrics(grid(50, 0.01), grid(50), 0.02)
    assert found["accuracy_median"] == pytest.approx(0.01)
    assert found["completeness_median"] == pytest.approx(0.01)
    assert found["f_score"] == 1
    assert surface_metrics(grid(50, 0.03), grid(50), 0.02)["f_score"] == 0


def test_half_a_surface_with_a_phantom_plane():
    half = grid(41)[grid(41)[:, 0] <= 0.5]
    ours = np.concatenate([half, half + np.array([0, 0, 1])])
    found = surface_metrics(ours, grid(41), 0.01)
    assert found["precision"] == pytest.approx(0.5)
    assert found["recall"] == pytest.approx(21 / 41)
    assert found["f_score"] == pytest.approx(2 * 0.5 * (21 / 41) / (0.5 + 21 / 41))


def test_only_seen_reference_points_are_asked_for_but_all_count_for_accuracy():
    reference = grid(41)
    left = reference[:, 0] <= 0.5
    found = surface_metrics(reference, reference, 0.01, seen=left)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert surface_metrics(reference[left], reference, 0.01, seen=left)["recall"] == 1
    assert surface_metrics(reference[~left], reference, 0.01, seen=left)["recall"] == 0


def test_a_mesh_has_no_floor_from_the_spacing_of_its_vertices():
    reference = grid(41)
    sparse = surface_metrics(SQUARE[0], reference, 0.02)
    meshed = surface_metrics(SQUARE[0], reference, 0.02, mesh=SQUARE)
    assert sparse["recall"] < 0.01
    assert meshed["recall"] == 1
    assert surface_metrics(grid(30) + 0.001, grid(3), 0.02, reference_mesh=SQUARE)["precision"] == 1


def poses(n: int = 8, seed: int = 0) -> np.ndarray:
    T = np.tile(np.eye(4), (n, 1, 1))
    T[:, :3, :3] = Rotation.random(n, random_state=seed).as_matrix()
    T[:, :3, 3] = np.random.default_rng(seed).normal(size=(n, 3))
    return T


def moved(T: np.ndarray, scale: float) -> np.ndarray:
    """The same trajectory in another world frame and unit."""
    R = Rotation.from_rotvec([0.3, -1.2, 0.5]).as_matrix()
    out = T.copy()
    out[:, :3, :3] = R @ T[:, :3, :3]
    out[:, :3, 3] = scale * T[:, :3, 3] @ R.T + [1, 2, 3]
    return out


def test_umeyama_finds_a_known_similarity_even_of_mirrored_noise():
    x = np.random.default_rng(3).normal(size=(20, 3))
    R = Rotation.from_rotvec([1, 2, -0.5]).as_matrix()
    scale, found, t = align_positions(x, 2.5 * x @ R.T + [1, -1, 4], with_scale=True)
    assert scale == pytest.approx(2.5)
    np.testing.assert_allclose(found, R, atol=1e-12)
    np.testing.assert_allclose(t, [1, -1, 4], atol=1e-12)
    assert np.linalg.det(align_positions(x, -x, with_scale=True)[1]) == pytest.approx(1)


def test_ate_removes_exactly_what_its_alignment_may():
    T = poses()
    assert ate(moved(T, 0.5), T, "sim3")["ate_rmse"] < 1e-12
    assert ate(moved(T, 0.5), T, "sim3")["scale"] == pytest.approx(2)
    assert ate(moved(T, 1), T, "se3")["ate_rmse"] < 1e-12
    assert ate(moved(T, 0.5), T, "se3")["ate_rmse"] > 0.3
    shifted = T.copy()
    shifted[:, 0, 3] += 0.1
    assert ate(shifted, T, "none")["ate_max"] == pytest.approx(0.1)


def test_rpe_sees_drift_but_not_the_world_frame():
    T = poses()
    assert rpe(moved(T, 1), T)["rpe_trans_rmse"] < 1e-12
    straight = np.tile(np.eye(4), (5, 1, 1))
    straight[:, 0, 3] = np.arange(5)
    longer = straight.copy()
    longer[:, 0, 3] *= 1.1
    assert rpe(longer, straight, step=2)["rpe_trans_rmse"] == pytest.approx(0.2)
    turning = straight.copy()
    turning[:, :3, :3] = Rotation.from_euler("z", 2 * np.arange(5)[:, None], degrees=True).as_matrix()
    assert rpe(turning, straight, step=2)["rpe_rot_rmse_deg"] == pytest.approx(4)


def test_pair_errors_ignore_frame_and_scale_and_see_a_turned_camera():
    T = poses(5)
    rotation, direction = pair_errors_deg(moved(T, 3), T)
    assert len(rotation) == 10
    assert max(rotation.max(), direction.max()) < 1e-5
    turned = T.copy()
    turned[0, :3, :3] = T[0, :3, :3] @ Rotation.from_euler("x", 7, degrees=True).as_matrix()
    rotation, _ = pair_errors_deg(turned, T)
    np.testing.assert_allclose(np.sort(rotation), [0] * 6 + [7] * 4, atol=1e-5)


def test_auc_of_a_known_error():
    T = poses(2)
    assert pose_auc(T, T) == 1
    turned = T.copy()
    turned[1, :3, :3] = T[1, :3, :3] @ Rotation.from_euler("y", 10.5, degrees=True).as_matrix()
    assert pose_auc(turned, T) == pytest.approx(20 / 30)  # below the thresholds 11 to 30
    opposite = T.copy()
    opposite[1, :3, 3] = 2 * T[0, :3, 3] - T[1, :3, 3]
    assert pose_auc(opposite, T) == 0


def test_rotation_angles_over_the_whole_range():
    degrees = np.array([0, 1e-6, 0.01, 90, 179.999, 180])
    R = Rotation.from_rotvec(np.radians(degrees)[:, None] * np.array([0, 0.6, 0.8])).as_matrix()
    np.testing.assert_allclose(rotation_angle_deg(R), degrees, atol=1e-8)
