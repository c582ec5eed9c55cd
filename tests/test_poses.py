"""Pose encoding and similarity: against the published code, and against known answers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recon.errors import ReconError
from recon.geometry.cameras import invert
from recon.geometry.pose_encoding import decode_pose, encode_pose
from recon.geometry.sim3 import rotation_residual_deg, umeyama


def test_pose_encoding_is_that_of_the_published_code(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "vggt_tiny_seed0_3x56x84.npz")
    T_cam_world, K = decode_pose(golden["pose_enc"][0], 56, 84)
    assert np.allclose(T_cam_world[:, :3], golden["extrinsic"][0], atol=1e-6)
    assert np.allclose(K, golden["intrinsic"][0], rtol=1e-5)


def test_pose_encoding_round_trip() -> None:
    stream = np.random.default_rng(0)
    encoding = np.concatenate([stream.normal(size=(50, 7)), stream.uniform(0.2, 2.5, (50, 2))], axis=1)
    encoding[:, 3:7] *= np.sign(encoding[:, 6:7]) / np.linalg.norm(encoding[:, 3:7], axis=1, keepdims=True)
    T_cam_world, K = decode_pose(encoding, 392, 518)
    assert np.allclose(T_cam_world @ invert(T_cam_world), np.eye(4), atol=1e-12)
    assert np.allclose(encode_pose(T_cam_world, K, 392, 518), encoding, atol=1e-9)


@pytest.mark.parametrize(("entry", "value"), [(7, 0.0), (8, 3.2), (0, np.nan), (slice(3, 7), 0.0)])
def test_unusable_poses_are_refused(entry, value: float) -> None:
    encoding = np.tile([0, 0, 0, 0, 0, 0, 1, 0.8, 1.0], (3, 1))
    encoding[2, entry] = value
    with pytest.raises(ReconError, match="pose of view 2 is unusable"):
        decode_pose(encoding, 56, 56)


def test_umeyama_finds_the_similarity_and_its_limits() -> None:
    stream = np.random.default_rng(1)
    source = stream.normal(size=(6, 3))
    R = decode_pose(np.array([[0, 0, 0, 0.3, -0.5, 0.1, 0.8, 1, 1]]), 14, 14)[0][0, :3, :3]
    target = 3.7 * source @ R.T + [4, 5, 6]
    found = umeyama(source, target)
    assert found.scale == pytest.approx(3.7)
    assert np.allclose(found.R, R)
    assert np.allclose(found.apply(source), target)
    mirrored = umeyama(source, target * [1, 1, -1])
    assert np.linalg.det(mirrored.R) == pytest.approx(1)  # never a reflection
    noisy = target + stream.normal(0, 0.1, target.shape)
    best = umeyama(source, noisy)
    residual = ((best.apply(source) - noisy) ** 2).sum()
    for other in (replace(best, scale=best.scale * 1.001), replace(best, t=best.t + 1e-3), found):
        assert ((other.apply(source) - noisy) ** 2).sum() > residual
    for points in (source[:1], np.ones((3, 3))):
        with pytest.raises(ReconError, match="no scale"):
            umeyama(points, points)


def test_rotation_residual_ignores_a_common_rotation() -> None:
    quaternions = np.random.default_rng(2).normal(size=(5, 9))
    quaternions[:, 7:] = 1
    rotations = decode_pose(quaternions, 14, 14)[0][:, :3, :3]
    assert rotation_residual_deg(rotations, rotations[0] @ rotations) < 1e-5
    about_z = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert rotation_residual_deg(np.stack([np.eye(3)] * 2), np.stack([np.eye(3), about_z])) == pytest.approx(45)
