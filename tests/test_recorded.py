"""Recorded options: the known answer is found where nothing is spoilt, and every error has the size asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recon.depth.recorded import Recorded as RecordedDepth
from recon.errors import ReconError
from recon.geometry.views import Scale, View
from recon.models.recorded import Recorded as RecordedModel

CLEAN = {"drift": 0.0, "jitter": 0.0, "distortion": 0.0, "noise": 0.0, "bleed": 0.0, "outliers": 0.0}
SHAPE = (120, 160)


def _view(camera: str = "cam0", frame: int = 3, holes: bool = False) -> View:
    rng = np.random.default_rng(1)
    v, u = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    depth = (1.5 + 0.02 * v + 0.5 * np.sin(u / 20) + 0.05 * rng.random(SHAPE)).astype(np.float32)
    depth[40:80, 60:100] = 1.0
    if holes:
        depth[:20, :30] = 0
        depth[70:75] = np.nan
    K = np.array([[150.0, 0, 80], [0, 150.0, 60], [0, 0, 1]])
    return View(camera, frame, np.zeros((*SHAPE, 3), np.uint8), K, np.eye(4), depth)


def _fit(disparity: np.ndarray, depth: np.ndarray) -> tuple[float, float]:
    known = np.isfinite(disparity)
    A = np.stack([disparity[known], np.ones(known.sum())], axis=1).astype(np.float64)
    s, t = np.linalg.lstsq(A, 1 / depth[known].astype(np.float64), rcond=None)[0]
    return float(s), float(t)


@pytest.mark.parametrize("camera", ["cam0", "cam1", "left eye"])
def test_least_squares_finds_scale_and_shift_when_nothing_is_spoilt(camera: str) -> None:
    option = RecordedDepth(name="recorded", seed=4, **(CLEAN | {"drift": 0.05, "jitter": 0.02}))
    for frame in (1, 30):
        view = _view(camera, frame, holes=True)
        assert view.depth is not None
        disparity = option.predict(view, None)
        hole = ~(view.depth > 0)
        np.testing.assert_array_equal(np.isnan(disparity), hole)
        assert disparity.dtype == np.float32
        assert _fit(disparity, view.depth) == pytest.approx(option.scale_shift(camera, frame), rel=1e-3, abs=1e-4)
        s, t = option.scale_shift(camera, frame)
        np.testing.assert_allclose(1 / (s * disparity + t)[~hole], view.depth[~hole], rtol=1e-4)


def test_the_same_seed_camera_and_frame_give_the_same_disparity_and_others_do_not() -> None:
    option = RecordedDepth(name="recorded")
    first = option.predict(_view(), None)
    np.testing.assert_array_equal(first, RecordedDepth(name="recorded").predict(_view(), None))
    for other in (_view("cam1"), _view(frame=4)):
        assert not np.allclose(first, option.predict(other, None))
    assert not np.allclose(first, RecordedDepth(name="recorded", seed=1).predict(_view(), None))


def test_gain_is_spread_over_cameras_and_drifts_slowly() -> None:
    option = RecordedDepth(name="recorded", jitter=0.0)
    gains = np.array([1 / option.scale_shift(f"cam{i}", 0)[0] for i in range(200)])
    assert 0.2 * np.exp(-0.05) <= gains.min() < 0.4
    assert 25 < gains.max() <= 50 * np.exp(0.05)
    stream = np.log([option.scale_shift("cam0", frame)[0] for frame in range(160)])
    assert 0.05 < np.ptp(stream) <= 0.1001
    assert abs(np.diff(stream)).max() < 0.005
    shifts = np.array([-option.scale_shift(f"cam{i}", 0)[1] for i in range(200)])
    assert -0.12 - 1e-9 <= shifts.min() < 0
    assert 0.2 < shifts.max() <= 0.32


@pytest.mark.parametrize(("knob", "value"), [("distortion", 0.05), ("noise", 0.02)])
def test_multiplicative_errors_have_the_size_asked_for(knob: str, value: float) -> None:
    option = RecordedDepth(name="recorded", **(CLEAN | {knob: value}))
    sizes = []
    for number in range(12):
        view = _view(f"cam{number}")
        assert view.depth is not None
        s, t = option.scale_shift(view.camera, view.frame)
        sizes.append((((s * option.predict(view, None) + t) * view.depth - 1) ** 2).mean())
    assert np.sqrt(np.mean(sizes)) == pytest.approx(value, rel=0.2)


def test_outliers_are_one_or_two_nearer_blobs_of_the_share_asked_for() -> None:
    option = RecordedDepth(name="recorded", **(CLEAN | {"outliers": 0.1}))
    shares = []
    for frame in range(30):
        view = _view(frame=frame)
        assert view.depth is not None
        s, t = option.scale_shift("cam0", frame)
        ratio = (s * option.predict(view, None) + t) * view.depth
        changed = abs(ratio - 1) > 1e-3
        shares.append(changed.mean())
        assert (ratio[changed] > 1).all()
    assert 0.06 < np.mean(shares) < 0.11  # parts of blobs hang over the border, and blobs overlap


def test_edges_bleed_and_flat_parts_do_not() -> None:
    option = RecordedDepth(name="recorded", **(CLEAN | {"bleed": 0.01}))
    depth = np.full(SHAPE, 4.0, np.float32)
    depth[:, 80:] = 1.0
    s, t = option.scale_shift("cam0", 3)
    z = 1 / (s * option.predict(replace(_view(), depth=depth), None) + t)
    np.testing.assert_allclose(z[:, :70], 4, rtol=1e-3)
    np.testing.assert_allclose(z[:, 90:], 1, rtol=1e-3)
    assert ((z[0] > 1.1) & (z[0] < 3.6)).sum() >= 3


def test_depth_without_a_recording_is_refused_and_an_empty_one_predicts_nothing() -> None:
    option = RecordedDepth(name="recorded")
    with pytest.raises(ReconError, match=r"camera cam0, frame 3 has no recorded depth"):
        option.predict(replace(_view(), depth=None), None)
    assert np.isnan(option.predict(replace(_view(), depth=np.zeros(SHAPE, np.float32)), None)).all()


@pytest.mark.parametrize(
    "wrong", [{"noise": -0.1}, {"outliers": 0.9}, {"gain_low": 0.0}, {"shift_low": 1.0}, {"seed": -1}]
)
def test_impossible_knobs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ReconError, match=f"depth.{next(iter(wrong))}"):
        RecordedDepth(name="recorded", **wrong).check()  # type: ignore[arg-type]


def test_recorded_bootstrap_is_what_the_source_gives() -> None:
    views = [_view("a"), _view("b")]
    found = RecordedModel(name="recorded").bootstrap(views, Scale("m", "known poses"), None)
    assert (found.depth_type, found.scale.unit, found.in_source_frame) == ("metric", "m", True)
    assert [view.camera for view in found.views] == ["a", "b"]
    assert found.views[0].depth is views[0].depth
    assert RecordedModel(name="recorded").bootstrap(views, Scale(), None).depth_type == "relative"


@pytest.mark.parametrize(("field", "noun"), [("depth", "depth"), ("K", "intrinsics"), ("T_world_cam", "poses")])
def test_recorded_bootstrap_names_what_is_missing(field: str, noun: str) -> None:
    with pytest.raises(ReconError, match=rf"camera cam0 has no {noun}") as caught:
        RecordedModel(name="recorded").bootstrap([replace(_view(), **{field: None})], Scale(), None)
    assert f"source.{noun}" in caught.value.remedy
    with pytest.raises(ReconError, match="no pixel has depth"):
        RecordedModel(name="recorded").bootstrap([replace(_view(), depth=np.zeros(SHAPE, np.float32))], Scale(), None)
