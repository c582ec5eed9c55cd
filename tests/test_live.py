"""The streaming loop under trouble: signals, workers that fail, late batches, drift, sources that break."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from recon.config import option
from recon.errors import ReconError
from recon.geometry.views import Bootstrap, View
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.framelog import KEPT, SERIES_POINTS, FrameLog
from recon.live.reader import Reader
from recon.live.stream import FrameResult, Streamer, StreamOptions
from recon.sources.synthetic import Synthetic


def scene(steps: int, **values: object) -> Synthetic:
    source = replace(option("source", "synthetic"), width=96, height=72, steps=steps, moving=0, **values)
    assert isinstance(source, Synthetic)
    return source


def streamer(source: Synthetic, predict, bootstrap: Bootstrap | None = None, **options: float) -> Streamer:
    """A streamer over two maps of the bootstrap; its pool ends with the test process at the latest."""
    depth = option("depth", "recorded")
    found = bootstrap or option("model", "recorded").bootstrap(source.bootstrap(), source.scale(), None)
    fused, anchor = (replace(option("fusion", "tsdf"), voxel=0.08).create() for _ in range(2))
    for view in found.views:
        fused.integrate(view, 0)
        anchor.integrate(view, 0)
    pool = DepthAnythingPool(lambda: None, workers=2, predict=predict)
    return Streamer(source, depth, pool, found, fused, anchor, Align(), StreamOptions(**options))


def run(found: Streamer) -> list[FrameResult]:
    results: list[FrameResult] = []
    for _ in found.run(results.append):
        pass
    found.pool.close()
    return results


def test_a_depth_worker_that_fails_costs_one_frame() -> None:
    predict = option("depth", "recorded").predict

    def sometimes(view: View, session: None) -> np.ndarray:
        if view.camera == "cam1" and view.frame == 2:
            raise RuntimeError("out of memory\nlong story")
        return predict(view, session)

    source = scene(3)
    results = run(streamer(source, sometimes))
    lost = [result for result in results if not result.align.accepted]
    assert len(results) == 3 * len(source.cameras())
    assert [(result.view.camera, result.view.frame) for result in lost] == [("cam1", 2)]
    assert lost[0].align.reason == "no depth: RuntimeError: out of memory"


def test_batches_are_finished_in_order_whatever_the_workers_do() -> None:
    predict = option("depth", "recorded").predict

    def uneven(view: View, session: None) -> np.ndarray:
        time.sleep(0.05 if (view.frame + len(view.camera)) % 2 else 0)
        return predict(view, session)

    source = scene(4)
    plain, delayed = (run(streamer(source, kind, ahead=ahead)) for kind, ahead in ((predict, 1), (uneven, 3)))
    assert [(r.view.camera, r.view.frame, r.align.s) for r in plain] == [
        (r.view.camera, r.view.frame, r.align.s) for r in delayed
    ]


@dataclass
class Live(Synthetic):
    """The same frames, but as a camera gives them: whoever is late has missed them."""

    live: ClassVar[bool] = True


def test_a_live_batch_that_came_too_late_is_dropped_and_counted() -> None:
    predict = option("depth", "recorded").predict

    def slow(view: View, session: None) -> np.ndarray:
        time.sleep(0.1)
        return predict(view, session)

    file = scene(8)
    live = Live(**file.settings())
    for source, drops in ((file, False), (live, True)):
        found = streamer(source, slow, latency_budget_ms=30, ahead=2)
        results = run(found)
        assert len(results) + found.dropped_late == 8 * len(source.cameras())
        assert bool(found.dropped_late) is drops


def test_sustained_drift_bootstraps_anew() -> None:
    """The map is upside down: nothing fits it until the third poor step has bootstrapped anew."""
    source, model = scene(8), option("model", "recorded")
    right = model.bootstrap(source.bootstrap(), source.scale(), None)
    wrong = replace(right, views=[replace(view, depth=view.depth[::-1].copy()) for view in right.views])
    found = streamer(source, option("depth", "recorded").predict, wrong, rebootstrap_after=3)
    calls = []

    def again(views: list[View]):
        calls.append(views)
        fresh = model.bootstrap(views, source.scale(), None)
        anchor = replace(option("fusion", "tsdf"), voxel=0.08).create()
        for view in fresh.views:
            anchor.integrate(view, 0)
        return fresh, anchor

    found.again = again
    results = run(found)
    cameras = len(source.cameras())
    assert found.rebootstraps == [{"step": 3, "accepted": True}]
    assert len(calls) == 1
    assert not any(result.align.accepted for result in results[: 3 * cameras])
    assert np.mean([result.align.accepted for result in results[3 * cameras :]]) > 0.9


def test_what_a_source_raises_arrives_after_what_it_gave() -> None:
    def batches() -> Iterator[list[View]]:
        yield []
        raise ReconError("cam_0 went away", "plug it in")

    with Reader(batches, 1) as reader:
        first = reader.get(wait=True)
        assert first is not None
        assert first.step == 1
        with pytest.raises(ReconError, match="went away"):
            reader.get(wait=True)
        assert reader.get(wait=True) is None


def test_leaving_a_reader_early_closes_the_source() -> None:
    closed = []

    def batches() -> Iterator[list[View]]:
        try:
            while True:
                yield []
        finally:
            closed.append(True)

    with Reader(batches, 2) as reader:
        assert reader.get(wait=True) is not None
    assert closed == [True]


def test_a_long_log_stays_small(tmp_path: Path) -> None:
    result = run(streamer(scene(1), option("depth", "recorded").predict))[0]
    with FrameLog(tmp_path / "frames.jsonl") as log:
        for _ in range(KEPT + 500):
            log.add(result)
        assert not (tmp_path / "frames.jsonl").exists()
        log.close()
    metrics = log.metrics()
    assert metrics["frames_seen"] == KEPT + 500
    assert len(metrics["frames"]) == metrics["frames_listed"] == KEPT
    assert sum(1 for _ in (tmp_path / "frames.jsonl").open()) == KEPT + 500
    assert all(len(values) <= SERIES_POINTS for values in log.series().values())


def test_a_log_that_is_not_finished_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), FrameLog(tmp_path / "frames.jsonl"):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stream_and_everything_is_written(tmp_path: Path, number: signal.Signals) -> None:
    command = [
        sys.executable, "-m", "recon", "model=recorded", "depth=recorded", "source.width=96", "source.height=72",
        "source.steps=5000", "tracking=none", "fusion.voxel=0.08", "stages=[reconstruct,report]",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("outputs/runs/*/*/frames.jsonl.part")):
        assert time.monotonic() < deadline, "the stream never started"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    run_folder = next(tmp_path.glob("outputs/runs/*/*"))
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["stream"]["stopped_by"] == number.name
    assert 0 < metrics["frames_seen"] < 5000 * 4
    assert {"map_updated.ply", "frames.jsonl", "report.html", "manifest.json"} <= {p.name for p in run_folder.iterdir()}
    assert number.name in output
