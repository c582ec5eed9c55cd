"""Stage depth: the videos are decoded again, predictions are read back, and what is lost is said."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from recon.config import Config, option
from recon.depth import Depth
from recon.depthvideo import DepthResult, depth_videos
from recon.depthvideo.keep import encode
from recon.depthvideo.pictures import HEADER, RunningRange, colourise, columns_of, side_by_side
from recon.errors import ReconError, Refused
from recon.geometry.views import DepthImage, Scale, View
from recon.live.pool import DepthAnythingPool
from recon.options import DepthVideoOptions
from recon.sources import Source

av = pytest.importorskip("av")
OPTIONS = DepthVideoOptions(width=64, grid_width=256)


@dataclass
class Ramps(Source):
    """Cameras that show a grey ramp, each frame a little brighter; times are not even."""

    count: int = 3
    steps: int = 6
    interrupt_at: int = 0

    def cameras(self) -> list[str]:
        return [f"cam{number}" for number in range(self.count)]

    def bootstrap(self) -> list[View]:
        return self._batch(0)

    def batches(self) -> Iterator[list[View]]:
        for step in range(1, self.steps):
            if step == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            yield self._batch(step)

    def __len__(self) -> int:
        return self.steps - 1

    def content_key(self) -> str:
        return "ramps"

    def scale(self) -> Scale:
        return Scale()

    def _batch(self, step: int) -> list[View]:
        ramp = np.tile(np.linspace(20, 120, 80).astype(np.uint8), (60, 1)) + np.uint8(10 * step)
        image = np.repeat(ramp[..., None], 3, axis=2)
        return [View(name, step, image, time_s=5.0 + 0.1 * step**2) for name in self.cameras()]


@dataclass
class FromImage(Depth):
    """Disparity = the red channel; fails where asked to."""

    fail_from: int = 10**9
    fail_to: int = 10**9

    def predict(self, view: View, session: object) -> DepthImage:
        if self.fail_from <= view.frame < self.fail_to:
            raise RuntimeError("out of memory")
        found = view.image[..., 0].astype(np.float32)
        found[:5, :5] = np.nan
        return found


def config(source: Source, depth: Depth, **changes: object) -> Config:
    return Config(depth=depth, source=source, stages=["depth"], depth_video=replace(OPTIONS, **changes))


def made(settings: Config, folder: Path) -> DepthResult:
    with DepthAnythingPool(lambda: None, workers=2, waiting=8, predict=settings.depth.predict) as pool:
        return depth_videos(settings, pool, folder)


def frames(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_every_frame_is_in_the_videos_at_its_time(tmp_path: Path, codec: str) -> None:
    source = Ramps()
    result = made(config(source, FromImage(), codec=codec), tmp_path)
    assert sorted(path.name for path in (tmp_path / "depth_video").iterdir()) == sorted(
        ["all.mp4", "cam0.mp4", "cam1.mp4", "cam2.mp4"]
    )
    videos = [path for path in result.files if path.suffix == ".mp4"]
    assert {path.name for path in videos} == {"all.mp4", "cam0.mp4", "cam1.mp4", "cam2.mp4"}
    assert (tmp_path / "depth_frames.jsonl").read_text().count("\n") == 18
    for path in videos:
        found = frames(path)
        np.testing.assert_allclose([t for t, _ in found], [0.1 * step**2 for step in range(6)], atol=0.002)
    _, last = frames(tmp_path / "depth_video" / "cam1.mp4")[-1]
    assert last.shape == (HEADER + 48, 128, 3)
    left = last[HEADER + 8 : -8, 8:56].astype(float).mean(axis=(0, 2))
    expected = np.interp(np.arange(8, 56) + 0.5, [0, 64], [70, 170])
    assert np.abs(left - expected).mean() < 4
    first = frames(tmp_path / "depth_video" / "cam1.mp4")[0][1]
    right = first[HEADER + 8 : -8, 64:].astype(float).mean(axis=0)
    assert right[60, 0] > right[60, 2] + 50  # bright = near = warm
    assert right[8, 2] > right[8, 0] + 20


def test_metrics_hold_every_frame(tmp_path: Path) -> None:
    result = made(config(Ramps(), FromImage()), tmp_path)
    found = result.metrics()
    assert found["depth_type"] == "disparity"
    assert found["frames_seen"] == 18
    assert found["frames_lost"] == {}
    assert found["latency_ms_p50"] > 0
    assert [row["frame"] for row in found["frames"] if row["camera"] == "cam2"] == list(range(6))
    row = found["frames"][0]
    assert row["low"] == pytest.approx(22, abs=1.5)
    assert row["high"] == pytest.approx(118, abs=1.5)
    json.dumps(found)


def test_a_frame_that_fails_is_shown_grey_counted_and_named(tmp_path: Path) -> None:
    result = made(config(Ramps(count=1), FromImage(fail_from=2, fail_to=4)), tmp_path)
    assert result.metrics()["frames_lost"] == {"RuntimeError: out of memory": 2}
    assert "2 lost" in result.outcome()
    shown = frames(tmp_path / "depth_video" / "cam0.mp4")
    assert len(shown) == 6
    panel = shown[2][1][HEADER + 8 : -8, 72:120].astype(int)
    assert np.ptp(panel.reshape(-1, 3).mean(axis=0)) < 15  # grey


def test_a_broken_network_ends_the_run_and_leaves_no_video(tmp_path: Path) -> None:
    with pytest.raises(ReconError, match="no frame got depth"):
        made(config(Ramps(count=1), FromImage(fail_from=0)), tmp_path)
    with pytest.raises(ReconError, match=r"failed on 2[0-9] frames in a row"):
        made(config(Ramps(steps=40), FromImage(fail_from=1)), tmp_path)
    assert not list(tmp_path.rglob("*.mp4"))


def test_ctrl_c_leaves_whole_videos(tmp_path: Path) -> None:
    result = made(config(Ramps(interrupt_at=4), FromImage()), tmp_path)
    assert result.stopped == result.metrics()["stopped_by"] == "SIGINT"
    assert len(frames(tmp_path / "depth_video" / "all.mp4")) == 5  # of 6: the batch in hand is finished
    assert "SIGINT" in result.outcome()


def test_predictions_come_back_from_png_and_npz(tmp_path: Path) -> None:
    import cv2

    made(config(Ramps(count=2, steps=2), FromImage(), save="png16"), tmp_path / "a")
    made(config(Ramps(count=2, steps=2), FromImage(), save="npz"), tmp_path / "b")
    index = json.loads((tmp_path / "a" / "depth_raw" / "index.json").read_text())
    assert index["type"] == "disparity"
    assert len(index["frames"]) == 4
    for row in index["frames"]:
        codes = cv2.imread(str(tmp_path / "a" / "depth_raw" / row["file"]), cv2.IMREAD_UNCHANGED)
        values = np.where(codes > 0, row["offset"] + row["scale"] * (codes.astype(float) - 1), np.nan)
        stored = np.load((tmp_path / "b" / "depth_raw" / row["file"]).with_suffix(".npz"))
        assert str(stored["type"]) == "disparity"
        np.testing.assert_allclose(values, stored["disparity"], atol=0.002)


def test_metric_depth_is_stored_in_millimetres() -> None:
    codes, scale, offset = encode(np.array([[1.234, np.nan, 0.0015, 3.0]], np.float32), "metric")
    assert codes.tolist() == [[1234, 0, 2, 3000]] or codes.tolist() == [[1234, 0, 1, 3000]]
    assert offset + scale * (1234 - 1) == pytest.approx(1.234)


def test_the_range_follows_slowly() -> None:
    """A frame of other depths for one moment hardly moves the colours; a lasting change is followed."""
    running = RunningRange(0, 100, 0.1)
    near, far = np.linspace(1, 2, 100, dtype=np.float32), np.linspace(1, 12, 100, dtype=np.float32)
    assert running.update(near)["shown_high"] == 2
    assert running.update(far)["shown_high"] == pytest.approx(3.0)
    for _ in range(60):
        shown = running.update(far)
    assert shown["shown_high"] == pytest.approx(12, abs=0.1)


def test_colours_mean_near_whatever_the_type() -> None:
    values = np.array([[1.0, 4.0, np.nan]], np.float32)
    as_disparity, as_depth = (colourise(values, (1.0, 4.0), kind) for kind in ("disparity", "metric"))
    warm, cold = as_disparity[0, 1].astype(int), as_disparity[0, 0].astype(int)
    assert warm[0] > warm[2]
    assert cold[2] >= cold[0]
    assert np.array_equal(as_depth[0, 0], as_disparity[0, 1])
    assert np.array_equal(as_depth[0, 2], as_disparity[0, 2])


def test_cameras_of_different_shape_share_a_grid(tmp_path: Path) -> None:
    class Mixed(Ramps):
        def _batch(self, step: int) -> list[View]:
            views = super()._batch(step)
            tall = np.ascontiguousarray(np.rot90(views[1].image))
            return [views[0], replace(views[1], image=tall)][: 1 if step == 2 else 2]

    made(config(Mixed(count=2, steps=4), FromImage()), tmp_path)
    assert len(frames(tmp_path / "depth_video" / "all.mp4")) == 4
    assert len(frames(tmp_path / "depth_video" / "cam1.mp4")) == 3
    assert frames(tmp_path / "depth_video" / "cam1.mp4")[0][1].shape == (HEADER + 86, 128, 3)


def test_grid_shapes() -> None:
    assert [columns_of(count, 8 / 3) for count in (1, 2, 4, 9)] == [1, 1, 2, 3]
    panel = side_by_side(np.zeros((30, 40, 3), np.uint8), None, 40, ("a", "b" * 100))
    assert panel.shape == (HEADER + 30, 80, 3)


def test_a_missing_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("recon.options").options.CODECS, "h264", "no_such_encoder")
    with pytest.raises(Refused, match="no encoder"):
        made(config(Ramps(), FromImage()), tmp_path)


@pytest.mark.parametrize("change", [{"codec": "av1"}, {"save": "tiff"}, {"smooth": 0.0}, {"low_percentile": 99.0}])
def test_impossible_options(change: dict[str, object]) -> None:
    with pytest.raises(ReconError, match=next(iter(change))):
        replace(DepthVideoOptions(), **change).check()


def test_a_synthetic_source_through_recorded_depth(tmp_path: Path) -> None:
    source = replace(option("source", "synthetic"), width=64, height=48, steps=2, count=2)
    result = made(config(source, option("depth", "recorded")), tmp_path)
    assert result.log.seen == len(result.log.rows) == 6
    assert len(frames(tmp_path / "depth_video" / "all.mp4")) == 3
