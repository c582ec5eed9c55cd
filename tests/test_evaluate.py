"""Evaluation against a truth that is known: the same reconstruction in any frame and unit gets the same figures."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from recon.config import Config, Evaluate, option
from recon.errors import ReconError
from recon.evaluate import bootstrap_poses, evaluate_map, load_reference, units
from recon.geometry.sim3 import Sim3
from recon.geometry.views import Bootstrap, DepthImage, PosedDepth, Scale
from recon.geometry.world import ToSource, align_cameras, to_source
from recon.live.scores import PER_FRAME, DepthScores
from recon.models.recorded import Recorded
from recon.sources.synthetic import Synthetic

OTHER = ToSource(
    Sim3(2.5, Rotation.from_euler("xyz", [20, -50, 130], degrees=True).as_matrix(), np.array([1, -2, 3.0])), ""
)
"""source = OTHER(map): the map's unit is 2.5 m."""
SIZE = {"width": 96, "height": 72, "steps": 1, "count": 3, "moving": 0}


@dataclass
class Learned(Recorded):
    """Recorded depth that passes for a network's."""

    has_network: ClassVar[bool] = True


def source() -> Synthetic:
    found = replace(option("source", "synthetic"), **SIZE)
    assert isinstance(found, Synthetic)
    return found


@pytest.fixture(scope="module")
def exact() -> Bootstrap:
    cameras = source()
    found = Recorded(name="recorded").bootstrap(cameras.bootstrap(), cameras.scale(), None)
    return replace(found, T_predicted=found.T_world_cam, T_given=found.T_world_cam)


def elsewhere(found: Bootstrap, scale: Scale | None = None) -> Bootstrap:
    """The bootstrap as a network without the source's poses gives it: in a frame and unit of its own."""
    views = [
        replace(
            view,
            T_world_cam=OTHER.inverse_pose(view.T_world_cam),
            depth=view.depth / np.float32(OTHER.similarity.scale),
        )
        for view in found.views
    ]
    poses = {view.camera: view.T_world_cam for view in views}
    return replace(
        found, views=views, T_world_cam=poses, T_predicted=poses, scale=scale or Scale(), in_source_frame=False
    )


def judged(bootstrap: Bootstrap, voxel: float, **changes: Any) -> dict[str, Any]:
    """Evaluation of the map of a bootstrap, and of one streamed frame per camera with the bootstrap's own depth."""
    fused = replace(option("fusion", "surfel"), voxel=voxel).create()
    scores = DepthScores(bootstrap)
    cameras = source()
    for view, posed in zip(cameras.bootstrap(), bootstrap.views, strict=True):
        fused.integrate(posed, 0)
        if posed.depth.shape == view.image.shape[:2]:
            scores.add(SimpleNamespace(view=view, depth=posed.depth))  # type: ignore[arg-type]
    result = SimpleNamespace(bootstrap=bootstrap, fused=fused, scale=bootstrap.scale, depth_scores=scores, board=None)
    fusion = option("fusion", "surfel")
    config = Config(source=cameras, model=Learned(name="recorded"), fusion=fusion, evaluate=Evaluate(), **changes)
    return evaluate_map(config, result)  # type: ignore[arg-type]


def test_exact_depth_and_poses_get_full_marks(exact: Bootstrap) -> None:
    found = judged(exact, 0.03)
    assert found["unit"] == "m"
    assert found["depth_absrel"] < 1e-6
    assert found["bootstrap_depth_delta1"] == 1
    assert found["bootstrap_depth_rmse"] < 1e-5
    assert found["pose_auc5"] == 1
    assert found["pose_ate_rmse"] < 1e-9
    assert found["map_precision"] > 0.97
    assert found["plane_rms"] < 0.01
    assert found["planes"] >= 3
    assert found["map_alignment"].startswith("none")
    assert found["depth_alignment"].startswith("none")


def test_every_figure_has_its_unit_and_every_group_its_alignment(exact: Bootstrap) -> None:
    found = judged(exact, 0.03)
    known = units(found)
    asked = {
        "depth_absrel": "1", "depth_rmse": "m", "depth_delta1": "1", "map_accuracy_mean": "m", "pose_auc5": "1",
        "map_completeness_mean": "m", "map_f_score": "1", "pose_ate_rmse": "m", "pose_rpe_trans_rmse": "m",
        "pose_rpe_rot_rmse_deg": "deg", "plane_rms": "m", "map_threshold": "m", "planes": "count",
        "pose_rotation_median_deg": "deg", "rendered_rmse": "m", "depth_frames_judged": "count",
    }  # fmt: skip
    assert {name: known[name] for name in asked} == asked
    assert known.keys() == {name for name, value in found.items() if not isinstance(value, str)}
    for group in ("depth", "bootstrap_depth", "pose", "map", "plane"):
        assert found[f"{group}_alignment"]
    elsewhere_units = units(judged(elsewhere(exact), 0.03 / OTHER.similarity.scale))
    assert elsewhere_units["rendered_rmse"] == "the map's own"
    board = {"unit": "m", "board_reprojection_px_median": 1.0, "board_distance_p95": 0.1, "board_spacing_error_mean": 0.0,
             "board_rig_corners": 3.0}  # fmt: skip
    assert list(units(board).values()) == ["px", "m", "m", "count"]


def test_another_frame_and_unit_get_the_same_figures_and_say_so(exact: Bootstrap) -> None:
    """Misses the exact case by what sampling and single precision leave, and names Sim3 everywhere."""
    here, there = judged(exact, 0.03), judged(elsewhere(exact), 0.03 / OTHER.similarity.scale)
    for name in ("depth_absrel", "bootstrap_depth_absrel", "pose_ate_rmse", "pose_rpe_trans_rmse"):
        assert abs(there[name] - here[name]) < 1e-5, name
    for name in ("map_f_score", "map_precision", "map_recall", "plane_rms"):
        assert there[name] == pytest.approx(here[name], abs=0.02), name
    assert there["pose_scale_applied"] == pytest.approx(2.5)
    assert all("Sim3" in there[f"{group}_alignment"] for group in ("depth", "map", "pose", "bootstrap_depth"))
    assert "arbitrary" in there["unit"]


def test_a_map_in_metres_gets_no_scale(exact: Bootstrap) -> None:
    """Metres from a board, but wrong by 2.5: SE3 leaves the error, as it must."""
    found = judged(elsewhere(exact, Scale("m", "board")), 0.03 / OTHER.similarity.scale)
    assert "SE3" in found["map_alignment"]
    assert "Se3" in found["pose_alignment"]
    assert found["depth_absrel"] == pytest.approx(0.6, abs=0.01)
    assert found["pose_scale_applied"] == 1
    assert found["map_f_score"] < 0.5


def test_without_poses_of_the_source_there_is_no_map_figure_but_a_reason(exact: Bootstrap) -> None:
    found = judged(replace(elsewhere(exact), T_given={}), 0.03 / OTHER.similarity.scale)
    assert "no poses" in found["map_not_judged"]
    assert found["depth_alignment"] == PER_FRAME
    assert found["depth_absrel"] < 1e-6  # the median scale finds the unit
    assert not any(name.startswith("pose_") for name in found)


def test_an_arbitrary_map_is_not_compared_with_a_reference_in_metres(exact: Bootstrap, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, points=np.zeros((10, 3)))
    cameras = source()
    fused = replace(option("fusion", "surfel"), voxel=0.05).create()
    for posed in exact.views:
        fused.integrate(posed, 0)
    lost = elsewhere(exact)
    result = SimpleNamespace(bootstrap=lost, fused=fused, scale=lost.scale, depth_scores=DepthScores(lost), board=None)
    config = Config(
        source=cameras, model=Recorded(name="recorded"), fusion=option("fusion", "surfel"), evaluate=Evaluate(str(path))
    )
    assert "in metres" in evaluate_map(config, result)["map_not_judged"]  # type: ignore[arg-type]
    assert load_reference(str(path)).points.shape == (10, 3)


@pytest.mark.parametrize(
    "arrays",
    [
        {"points": np.zeros((0, 3))}, {"points": np.full((4, 3), np.nan)}, {"points": np.zeros((4, 2))},
        {"points": np.zeros((4, 3)), "normals": np.zeros((3, 3))}, {"points": np.zeros((4, 3)), "seen": np.ones(5)},
    ],
)  # fmt: skip
def test_a_reference_that_is_none_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ReconError, match=r"reference\.npz: (points|normals) are") as caught:
        load_reference(str(tmp_path / "reference.npz"))
    assert caught.value.remedy


def test_pose_figures_of_known_errors(exact: Bootstrap) -> None:
    """One camera of three turned by 7 degrees: two of three pairs are off by 7, so AUC@5 is 1/3."""
    turned = {name: pose.copy() for name, pose in exact.T_world_cam.items()}
    turned["cam1"][:3, :3] = turned["cam1"][:3, :3] @ Rotation.from_euler("y", 7, degrees=True).as_matrix()
    found = bootstrap_poses(replace(exact, T_predicted=turned))
    assert found["pose_rotation_median_deg"] == pytest.approx(7)
    assert found["pose_auc5"] == pytest.approx(1 / 3)
    assert found["pose_auc30"] < 1
    assert found["pose_ate_rmse"] < 1e-9
    assert found["pose_rpe_rot_rmse_deg"] == pytest.approx(7)


def test_two_cameras_have_no_trajectory_error(exact: Bootstrap) -> None:
    two = {name: exact.T_world_cam[name] for name in ("cam0", "cam1")}
    found = bootstrap_poses(replace(exact, T_predicted=two))
    assert found["pose_auc5"] == 1
    assert "pose_ate_rmse" not in found
    assert bootstrap_poses(replace(exact, T_given={})) == {}


def test_alignment_of_cameras_on_a_line_is_unique() -> None:
    given = np.tile(np.eye(4), (3, 1, 1))
    given[:, 0, 3] = [0, 1, 3]
    found = np.stack([OTHER.inverse_pose(pose) for pose in given])
    similarity = align_cameras(found, given, True)
    np.testing.assert_allclose(similarity.R, OTHER.similarity.R, atol=1e-12)
    np.testing.assert_allclose([similarity.scale, *similarity.t], [2.5, *OTHER.similarity.t], atol=1e-9)


def test_poses_go_to_the_source_and_back(exact: Bootstrap) -> None:
    found = to_source(elsewhere(exact))
    assert found is not None
    pose = exact.T_world_cam["cam2"]
    np.testing.assert_allclose(found.pose(OTHER.inverse_pose(pose)), pose, atol=1e-6)
    np.testing.assert_allclose(found.inverse_pose(pose), OTHER.inverse_pose(pose), atol=1e-6)


def test_bootstrap_depth_is_read_where_the_network_saw_it(exact: Bootstrap) -> None:
    """The network's image is the source's, cropped and at half the size: each of its pixels is judged by its own."""
    posed = exact.views[0]
    K = posed.K.copy()
    K[:2, 2] = (K[:2, 2] - [10, 6] + 0.5) / 2 - 0.5
    K[:2, :2] /= 2
    half: DepthImage = np.ascontiguousarray(posed.depth[6:66, 10:90][::2, ::2])
    cut = PosedDepth(posed.camera, posed.image[6:66, 10:90][::2, ::2], half, K, posed.T_world_cam)
    found = judged(replace(exact, views=[cut, *exact.views[1:]]), 0.05)
    assert found["bootstrap_depth_delta1"] > 0.97  # half a pixel off at depth edges
    assert found["bootstrap_depth_median_abs"] < 0.01
