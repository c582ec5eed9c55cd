"""A reconstructed board: on a made-up rig with known errors, and on the real rig of the office recording."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from recon.config import Evaluate
from recon.errors import ReconError
from recon.geometry.board import Camera, Corners, board_errors, lift, read_corners, read_points, triangulate
from recon.geometry.cameras import invert, project, transform
from recon.geometry.rig_files import read_rig
from recon.geometry.sim3 import Sim3
from recon.geometry.world import ToSource
from recon.live.boardscores import read_board
from recon.sources.videos import Videos

SQUARE = 0.05
BOARD = np.array([[x * SQUARE, y * SQUARE, 0] for y in range(4) for x in range(3)])
K = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])


def rig() -> dict[str, Camera]:
    """Three cameras 1 m in front of the board, turned about the board's upright axis."""
    cameras = {}
    for number, angle in enumerate((-25, 0, 25)):
        R = Rotation.from_euler("y", angle, degrees=True).as_matrix()
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = R, BOARD.mean(axis=0) - R @ [0, 0, 1.0]
        cameras[f"cam_{number}"] = Camera(K, T)
    return cameras


def seen(cameras: dict[str, Camera], moments: int = 3) -> tuple[Corners, dict[tuple[int, int], np.ndarray]]:
    """The board turning from moment to moment, and where its corners truly are."""
    rows, truth = [], {}
    for moment in range(moments):
        R = Rotation.from_euler("x", 10 * moment, degrees=True).as_matrix()
        world = (BOARD - BOARD.mean(axis=0)) @ R.T + BOARD.mean(axis=0)
        for number, point in enumerate(world):
            truth[moment, number] = point
            rows += [(moment, number, name, camera.project(point)) for name, camera in cameras.items()]
    moment, corner, name, pixel = zip(*rows, strict=True)
    return Corners(np.array(moment), np.array(corner), np.array(name), np.array(pixel), BOARD[list(corner)]), truth


def test_exact_corners_give_no_error() -> None:
    corners, truth = seen(rig())
    found = board_errors(triangulate(corners, rig()), corners, rig(), truth)
    assert found["board_corners"] == 36
    assert max(value for name, value in found.items() if name != "board_corners") < 1e-9


def test_a_rig_in_another_unit_shows_in_the_spacing() -> None:
    """Translations 10 % too long: pixels cannot tell, squares can."""
    cameras = rig()
    corners, truth = seen(cameras)
    large = {
        name: Camera(K, np.block([[c.T_world_cam[:3, :3], 1.1 * c.T_world_cam[:3, 3:]], [np.eye(4)[3:]]]))
        for name, c in cameras.items()
    }
    found = board_errors(triangulate(corners, large), corners, large, truth)
    assert found["board_reprojection_px_median"] < 1e-6
    assert found["board_spacing_error_mean"] == pytest.approx(0.1 * SQUARE, rel=1e-3)
    assert found["board_distance_median"] > 0.004


def test_corners_off_by_a_pixel_reproject_by_less_than_one() -> None:
    cameras = rig()
    corners, truth = seen(cameras)
    noisy = Corners(
        corners.moment,
        corners.corner,
        corners.camera,
        corners.pixel + np.random.default_rng(0).normal(size=corners.pixel.shape),
        corners.board,
    )
    found = board_errors(triangulate(noisy, cameras), noisy, cameras, truth)
    assert 0.3 < found["board_reprojection_px_median"] < 1.2
    assert 0.0005 < found["board_distance_median"] < 0.01


def test_depth_lifts_corners_to_where_they_are() -> None:
    """Depth of the board's plane in every camera, 2 % too far: the board is found 2 cm behind itself."""
    cameras = rig()
    corners, truth = seen(cameras, moments=1)
    grid = np.stack([*np.meshgrid(np.arange(320), np.arange(240)), np.ones((240, 320))], axis=-1)
    depth = {}
    for name, camera in cameras.items():
        rays = grid @ np.linalg.inv(K).T @ camera.T_world_cam[:3, :3].T
        depth[0, name] = (-camera.T_world_cam[2, 3] / rays[..., 2]).astype(np.float32)  # the board lies in z = 0
    found = board_errors(lift(corners, cameras, depth), corners, cameras, truth)
    assert found["board_corners"] == 12
    assert found["board_distance_p95"] < 1e-4
    behind = {key: np.float32(1.02) * image for key, image in depth.items()}
    behind[0, "cam_1"][100:140] = 0
    worse = board_errors(lift(corners, cameras, behind), corners, cameras, truth)
    assert worse["board_distance_median"] == pytest.approx(0.02, rel=0.1)
    assert lift(corners, cameras, {(0, "cam_1"): np.zeros((240, 320), np.float32)}) == {}


def test_a_corner_at_a_depth_edge_is_left_out() -> None:
    cameras = {"cam_1": rig()["cam_1"]}
    corners, _ = seen(cameras, moments=1)
    steps = np.where(np.arange(320) < corners.pixel[0, 0] + 0.5, 1.0, 3.0).astype(np.float32) * np.ones(
        (240, 1), np.float32
    )
    found = lift(corners, cameras, {(0, "cam_1"): steps})
    assert 0 < len(found) < 12


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ReconError, match="cannot be read"):
        read_corners(tmp_path / "xy.csv")
    (tmp_path / "xyz.csv").write_text("sync_index,keypoint_id\n1,2\n")
    with pytest.raises(ReconError, match="x_coord"):
        read_points(tmp_path / "xyz.csv")
    assert board_errors({}, seen(rig())[0], rig()) == {}


def test_office_board(data_dir: Path) -> None:
    """Real cameras and detections: our rig reader, lens model and triangulation against the recording's own corners."""
    folder = data_dir / "office4"
    entries = read_rig(folder / "camera_array.toml").entries
    detected = read_corners(folder / "xy_CHARUCO.csv", "{}")
    names = {name: next(key for key in entries if key.removeprefix("cam_") == name) for name in map(str, range(4))}
    lenses = {name: entries[key].lens for name, key in names.items()}
    cameras = {name: Camera(lenses[name].K, entries[key].T_world_cam) for name, key in names.items()}
    straight = np.stack(
        [
            [*lenses[str(name)].slopes(pixel), 1.0] @ lenses[str(name)].K[:2].T
            for name, pixel in zip(detected.camera, detected.pixel, strict=True)
        ]
    )
    corners = Corners(detected.moment, detected.corner, detected.camera, straight, detected.board)
    truth = read_points(folder / "xyz_CHARUCO.csv")
    given = board_errors(truth, corners, cameras)
    ours = board_errors(triangulate(corners, cameras), corners, cameras, truth)
    assert given["board_reprojection_px_median"] < 1.6
    assert ours["board_reprojection_px_median"] <= given["board_reprojection_px_median"] + 0.05
    assert ours["board_distance_median"] < 0.002
    assert ours["board_distance_p95"] < 0.01
    assert abs(ours["board_spacing_error_mean"]) < 0.001
    assert ours["board_spacing_error_median"] < 0.002
    assert ours["board_corners"] > 300


def test_office_videos_through_their_source(data_dir: Path) -> None:
    """Frames as the stream gets them, undistorted and posed by the source: the board that they triangulate fits, and
    depth of the right size puts it where it is, also for a map in another frame and unit."""
    folder = data_dir / "office4"
    times = str(folder / "timestamps.csv")
    source = Videos(
        name="videos", path=str(folder), rig=str(folder / "camera_array.toml"), timestamps=times, max_batches=6
    )
    board = read_board(folder, source.cameras())
    other = ToSource(Sim3(0.5, np.eye(3), np.zeros(3)), "")
    assert board.truth is not None
    views = [source.bootstrap(), *source.batches()]
    for moment, batch in enumerate(views, 35):
        for view in batch:
            pose = other.inverse_pose(view.T_world_cam)
            known = [point for (m, _), point in board.truth.items() if m == moment]
            z = np.median((np.array(known) - view.T_world_cam[:3, 3]) @ view.T_world_cam[:3, 2])
            depth = np.full(view.image.shape[:2], z / 0.5, np.float32)
            board.add(view, depth, view.K, pose)
    found = board.scores(other)
    assert found["board_rig_corners"] > 60
    assert found["board_rig_reprojection_px_median"] < 1.6
    assert found["board_rig_distance_median"] < 0.003
    assert found["board_rig_spacing_error_median"] < 0.002
    assert found["board_distance_median"] < 0.05  # the board is tilted, and this depth is one plane for all of it
    assert found["board_corners"] >= found["board_rig_corners"]


def test_a_board_folder_that_lacks_a_file(tmp_path: Path) -> None:
    with pytest.raises(ReconError, match="xy_CHARUCO"):
        Evaluate(board=str(tmp_path)).check()


def test_pixels_of_the_helper_are_those_of_the_geometry() -> None:
    camera = rig()["cam_0"]
    expected, _ = project(transform(invert(camera.T_world_cam), BOARD), K)
    np.testing.assert_allclose(camera.project(BOARD), expected)
