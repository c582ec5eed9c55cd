"""Metres from a distance, a board or recorded depth: a reconstruction of unknown scale gets its true one back."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from recon.config import option
from recon.errors import ReconError
from recon.geometry.cameras import invert
from recon.geometry.rig import Baseline
from recon.geometry.scale import ScaleOptions, detect, metric
from recon.geometry.views import Bootstrap, PosedDepth, Scale, View

UNKNOWN = 3.7  # metres per unit


def shrunk(truth: Bootstrap) -> Bootstrap:
    """The same reconstruction as a network gives it: right up to scale."""

    def pose(T: np.ndarray) -> np.ndarray:
        moved = T.copy()
        moved[:3, 3] /= UNKNOWN
        return moved

    views = [
        replace(view, depth=(view.depth / UNKNOWN).astype(np.float32), T_world_cam=pose(view.T_world_cam))
        for view in truth.views
    ]
    poses = {camera: pose(T) for camera, T in truth.T_world_cam.items()}
    return replace(truth, views=views, T_world_cam=poses, scale=Scale(), depth_type="relative", in_source_frame=False)


@pytest.fixture(scope="module")
def room() -> tuple[list[View], Bootstrap]:
    source = replace(option("source", "synthetic"), width=96, height=72, steps=1)
    views = source.bootstrap()
    return views, option("model", "recorded").bootstrap(views, source.scale(), None)


def blind(views: list[View]) -> list[View]:
    return [replace(view, depth=None) for view in views]


def assert_same(found: Bootstrap, truth: Bootstrap, tolerance: float) -> None:
    assert found.scale.unit == "m"
    assert found.depth_type == "metric"
    assert found.notes["scale_metres_per_unit"] == pytest.approx(UNKNOWN, rel=tolerance)
    for got, wanted in zip(found.views, truth.views, strict=True):
        np.testing.assert_allclose(got.depth, wanted.depth, rtol=2 * tolerance)
        np.testing.assert_allclose(got.T_world_cam[:3, 3], wanted.T_world_cam[:3, 3], rtol=2 * tolerance, atol=1e-6)


def test_a_known_distance_between_two_cameras(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    apart = float(np.linalg.norm(truth.T_world_cam["cam0"][:3, 3] - truth.T_world_cam["cam2"][:3, 3]))
    by_hand = ScaleOptions(baseline=["cam0", "cam2"], baseline_m=apart)
    found = metric(shrunk(truth), blind(views), None, by_hand)
    assert_same(found, truth, 1e-6)
    assert found.scale.source == "known baseline"
    assert "one distance" in str(found.notes["scale_confidence"])
    from_the_source = metric(shrunk(truth), blind(views), Baseline("cam0", "cam2", apart), ScaleOptions())
    assert_same(from_the_source, truth, 1e-6)


def test_recorded_depth(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    found = metric(shrunk(truth), views, None, ScaleOptions())
    assert_same(found, truth, 1e-4)
    assert found.scale.source == "recorded depth"
    assert found.notes["scale_depth_spread"] < 1e-4


def test_a_metric_model(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    said = [replace(view, depth=view.depth * np.float32(1.05)) for view in views]  # the model is 5 % off
    found = metric(shrunk(truth), blind(views), None, ScaleOptions(), lambda: said)
    assert found.scale == Scale("m", "metric model")
    assert found.notes["scale_metres_per_unit"] == pytest.approx(1.05 * UNKNOWN, rel=1e-4)
    recorded = metric(shrunk(truth), views, None, ScaleOptions(), lambda: said)
    assert recorded.scale.source == "recorded depth"


def test_without_anything_known_the_unit_stays_arbitrary(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    assert metric(shrunk(truth), blind(views), None, ScaleOptions()).scale.unit == "arbitrary"
    assert metric(shrunk(truth), views, None, ScaleOptions(source="none")).scale.unit == "arbitrary"
    for source in ("baseline", "board", "depth", "model"):
        with pytest.raises(ReconError, match=f"scale.source={source} gives no metres"):
            metric(shrunk(truth), blind(views), None, ScaleOptions(source=source))


def test_a_metric_bootstrap_is_checked_not_changed(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    apart = float(np.linalg.norm(truth.T_world_cam["cam0"][:3, 3] - truth.T_world_cam["cam1"][:3, 3]))
    found = metric(truth, views, None, ScaleOptions(baseline=["cam0", "cam1"], baseline_m=1.02 * apart))
    assert found.views is truth.views
    assert found.notes["scale_check_baseline"] == pytest.approx(1.02)
    assert metric(truth, views, None, ScaleOptions()) is truth


BOARD = {"columns": 6, "rows": 5, "square_m": 0.08}


def photographed(dictionary: str) -> tuple[list[View], Bootstrap]:
    """A printed board 1.3 m before two cameras, drawn into their images by the homography of its plane."""
    per_square = 60
    if dictionary:
        words = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, dictionary))
        drawn = cv2.aruco.CharucoBoard((6, 5), 0.08, 0.06, words).generateImage((6 * per_square, 5 * per_square))
    else:  # 6 x 5 inner corners have 7 x 6 squares
        squares = np.indices((6, 7)).sum(axis=0) % 2
        drawn = (np.kron(squares, np.ones((per_square, per_square))) * 255).astype(np.uint8)
    K = np.array([[620.0, 0, 319.5], [0, 620.0, 239.5], [0, 0, 1]])
    to_metres = np.array([[0.08 / per_square, 0, -0.24], [0, 0.08 / per_square, -0.2], [0, 0, 1]])
    views, posed = [], []
    for index, x in enumerate((-0.25, 0.3)):
        angle = np.arctan2(x, 1.3)
        T_world_cam = np.eye(4)
        T_world_cam[:3, :3] = cv2.Rodrigues(np.array([0.0, -angle, 0.0]))[0]
        T_world_cam[:3, 3] = [x, 0, -1.3]
        T = invert(T_world_cam)
        H = K @ np.stack([T[:3, 0], T[:3, 1], T[:3, 3]], axis=1) @ to_metres
        image = cv2.warpPerspective(drawn, H, (640, 480), borderValue=255)
        views.append(View(f"c{index}", 0, np.repeat(image[..., None], 3, axis=2), K))
        depth = np.full((480, 640), 1.3, np.float32)
        posed.append(PosedDepth(f"c{index}", views[-1].image, depth, K, T_world_cam))
    poses = {view.camera: view.T_world_cam for view in posed}
    return views, Bootstrap(posed, {view.camera: K for view in posed}, poses, Scale("m", "known poses"), "metric")


@pytest.mark.parametrize("dictionary", ["DICT_4X4_50", ""])
def test_a_board_of_known_size(dictionary: str) -> None:
    views, truth = photographed(dictionary)
    options = ScaleOptions(**BOARD, dictionary=dictionary, marker_m=0.06 if dictionary else 0.0)
    options.check()
    found = metric(shrunk(truth), views, None, options)
    assert found.scale == Scale("m", "calibration board")
    assert found.notes["scale_metres_per_unit"] == pytest.approx(UNKNOWN, rel=0.003)
    assert found.notes["scale_board_rms_m"] < 0.002
    assert metric(truth, views, None, options).notes["scale_check_board"] == pytest.approx(1, rel=0.003)


def test_a_board_that_one_camera_sees_is_lifted_by_depth() -> None:
    views, truth = photographed("DICT_4X4_50")
    blank = np.full_like(views[1].image, 128)
    options = ScaleOptions(**BOARD, dictionary="DICT_4X4_50", marker_m=0.06)
    found = metric(shrunk(truth), [views[0], replace(views[1], image=blank)], None, options)
    assert found.notes["scale_board_corners_are"] == "lifted by the network's depth"
    assert found.notes["scale_metres_per_unit"] == pytest.approx(UNKNOWN, rel=0.15)  # its depth is a plane of 1.3 m


@pytest.mark.parametrize("lifted", [False, True])
def test_a_board_that_the_bootstrap_distorts_gives_no_metres(lifted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A network that is too weak puts cameras, or depth, where the corners are no board any more."""
    views, truth = photographed("DICT_4X4_50")
    ramp = np.linspace(0.2, 3, 640, dtype=np.float32)[None]
    poses = {camera: T @ turned(0.4) if camera == "c1" else T for camera, T in truth.T_world_cam.items()}
    posed = [replace(view, depth=view.depth * ramp, T_world_cam=poses[view.camera]) for view in truth.views]
    wrong = shrunk(replace(truth, views=posed, T_world_cam=poses))
    seen = [views[0], replace(views[1], image=np.full_like(views[1].image, 128))] if lifted else views
    options = ScaleOptions(**BOARD, dictionary="DICT_4X4_50", marker_m=0.06)
    assert metric(wrong, seen, None, options).scale == Scale()
    assert "miss its grid by" in caplog.text
    with pytest.raises(ReconError, match=r"scale\.source=board gives no metres: .* miss its grid"):
        metric(wrong, seen, None, replace(options, source="board"))


def turned(angle: float) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = cv2.Rodrigues(np.array([0.5 * angle, angle, 0.0]))[0]
    return T


def test_depth_that_does_not_resemble_the_bootstrap_gives_no_metres(
    room: tuple[list[View], Bootstrap], caplog: pytest.LogCaptureFixture
) -> None:
    views, truth = room
    upside_down = [replace(view, depth=view.depth[::-1, ::-1].copy() ** 3) for view in views]
    assert metric(shrunk(truth), upside_down, None, ScaleOptions()).scale == Scale()
    assert "no metres from recorded depth and the bootstrap's differ by" in caplog.text
    with pytest.raises(
        ReconError, match=r"scale\.source=model gives no metres: metric model and the bootstrap's differ"
    ):
        metric(shrunk(truth), blind(views), None, ScaleOptions(source="model"), lambda: upside_down)


@pytest.mark.parametrize(
    "values",
    [
        {"source": "guess"},
        {"baseline": ["a"]},
        {"baseline": ["a", "b"]},
        {"baseline": ["a", "a"], "baseline_m": 1.0},
        {"baseline_m": -1.0, "baseline": ["a", "b"]},
        {"square_m": 0.03},
        {"square_m": 0.03, "columns": 5, "rows": 4, "dictionary": "DICT_4X4_50"},
    ],
)
def test_impossible_options_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ReconError) as caught:
        ScaleOptions(**values).check()
    assert caught.value.remedy


def test_unknown_cameras_and_dictionaries_are_refused(room: tuple[list[View], Bootstrap]) -> None:
    views, truth = room
    with pytest.raises(ReconError, match="no camera 'top'"):
        metric(shrunk(truth), views, None, ScaleOptions(baseline=["cam0", "top"], baseline_m=1.0))
    with pytest.raises(ReconError, match="DICT_9X9"):
        metric(shrunk(truth), views, None, ScaleOptions(**BOARD, dictionary="DICT_9X9", marker_m=0.06))


def test_the_real_board_gives_the_real_scale(data_dir: Path) -> None:
    """office4: the rig's own poses, shrunk, come back to within two percent by the board that a person holds."""
    from recon.sources.videos import Videos

    folder = data_dir / "office4"
    if not folder.is_dir():
        pytest.skip("no office4 in the external data")
    rig = str(folder / "camera_array.toml")
    source = Videos(**{"name": "videos", "path": str(folder), "rig": rig, "timestamps": str(folder / "timestamps.csv")})
    options = ScaleOptions(columns=4, rows=5, square_m=0.054, dictionary="DICT_4X4_1000", marker_m=0.0405)
    found = []
    for batch in source.batches():
        posed = [
            PosedDepth(view.camera, view.image, np.ones(view.image.shape[:2], np.float32), view.K, view.T_world_cam)
            for view in batch
        ]
        poses = {view.camera: view.T_world_cam for view in posed}
        truth = Bootstrap(posed, {view.camera: view.K for view in posed}, poses, Scale(), "relative")
        if len(detect(batch, options).corner) >= 16:
            scaled = metric(shrunk(truth), batch, None, options)
            if scaled.scale.unit == "m" and scaled.notes["scale_board_corners_are"] == "triangulated":
                found.append(scaled.notes["scale_metres_per_unit"])
        if len(found) == 5:
            break
    assert len(found) == 5
    assert np.median(found) == pytest.approx(UNKNOWN, rel=0.02)
