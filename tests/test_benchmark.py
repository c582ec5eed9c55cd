"""The timing contract, its figures, and the rolling table."""

import csv
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from small_network import images, network, seeded

from recon.benchmark.contract import (
    BenchmarkOptions,
    BenchmarkResult,
    as_plain,
    benchmark,
    benchmark_folder,
    synthetic_feeds,
)
from recon.benchmark.lanes import Lane, run_frames, run_streams
from recon.benchmark.table import append_csv, csv_row
from recon.engines import Session
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.torch import TorchSession
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.network import TensorSpec


class Sleeper(Session):
    """Takes a known time, so that the clock itself is under test."""

    inputs = {"x": TensorSpec((2,))}  # noqa: RUF012 - the base declares it without a value
    outputs = {"x": TensorSpec((2,))}  # noqa: RUF012
    threads = 1

    def __init__(self, durations_ms: list[float]) -> None:
        self.durations_ms, self.calls = durations_ms, 0

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(self.durations_ms[self.calls % len(self.durations_ms)] / 1e3)
        self.calls += 1
        return {"x": feeds["x"] * 1.5}

    def memory_mib(self) -> float:
        return 3.0

    def close(self) -> None:
        self.durations_ms = []


def test_the_clock_is_right_and_warm_up_is_left_out() -> None:
    session, ticks = Sleeper([50.0] * 3 + [2.0] * 47), []
    options = BenchmarkOptions(iterations=40, warmup=3)
    result = benchmark(session, {"x": torch.ones(2)}, options, items=4, tick=lambda: ticks.append(1))
    assert session.calls == len(ticks) == 43
    assert len(result.latency_samples_ms) == 40
    summary = result.summary()
    assert 2.0 <= summary["latency_ms_p50"] < 4.0
    assert max(result.latency_samples_ms) < 50.0
    assert summary["throughput_items_per_s"] == pytest.approx(4e3 / summary["latency_ms_mean"])
    assert summary["session_memory_mib"] == 3.0
    assert any("40 samples" in warning for warning in result.warnings())


def test_an_engine_is_timed_and_compared_with_torch(tmp_path: Path) -> None:
    engine = OnnxRuntime(name="onnxruntime", threads=1)
    export(network(), tmp_path / "small.onnx", ExportOptions())
    engine.optimise(tmp_path / "small.onnx", tmp_path / "small.engine")
    with engine.load(tmp_path / "small.engine") as session:
        result = benchmark(session, images(3), BenchmarkOptions(), reference=TorchSession(network(), seeded()), items=2)
    summary = result.summary()
    assert len(result.latency_samples_ms) == summary["iterations"] == 50
    assert 0 < summary["latency_ms_min"] <= summary["latency_ms_p50"] <= summary["latency_ms_p99"]
    assert summary["latency_ms_p99"] <= summary["latency_ms_max"]
    assert summary["threads"] == 1
    assert summary["clock"] == "perf_counter_ns"
    assert 0 < summary["error_rel_l2_max"] < 1e-5
    assert summary["peak_rss_mib"] > summary["session_memory_mib"] > 0
    assert as_plain(result)["errors"]["tokens"]["nan_count"] == 0


def _result(samples: list[float]) -> BenchmarkResult:
    return BenchmarkResult(samples, 1, 0, "perf_counter_ns", 1.0, 2.0, False, None, 1, "cpu", "cpu", None, None)


def test_percentiles_and_the_noise_warning() -> None:
    result = _result([float(value) for value in range(1, 102)])
    assert [result.percentile_ms(p) for p in (50, 90, 99)] == pytest.approx([51.0, 91.0, 100.0])
    assert any("varies by" in warning for warning in result.warnings())
    assert _result([10.0] * 50 + [10.1] * 50).warnings() == []


def test_every_engine_of_a_list_is_tried() -> None:
    def broken() -> Session:
        raise ReconError("bad.engine: damaged", "delete it")

    results = benchmark_folder(
        [("one", lambda: Sleeper([0.1])), ("bad", broken), ("two", lambda: Sleeper([0.2]))],
        BenchmarkOptions(iterations=3, warmup=0),
    )
    assert list(results) == ["one", "bad", "two"]
    assert isinstance(results["bad"], ReconError)
    assert isinstance(results["two"], BenchmarkResult)


def test_synthetic_inputs_fit_the_session_and_repeat() -> None:
    session = Sleeper([0.0])
    session.inputs = {"a": TensorSpec((2, 3), "float16"), "b": TensorSpec((64,), "int64")}
    feeds = synthetic_feeds(session, 1)
    assert {name: (tuple(t.shape), t.dtype) for name, t in feeds.items()} == {
        "a": ((2, 3), torch.float16),
        "b": ((64,), torch.int64),
    }
    assert feeds["b"].unique().tolist() == [0, 1]
    assert all(torch.equal(value, synthetic_feeds(session, 1)[name]) for name, value in feeds.items())
    assert not torch.equal(feeds["a"], synthetic_feeds(session, 2)["a"])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (BenchmarkOptions(iterations=0), ReconError, "iterations=0"),
        (BenchmarkOptions(warmup=-1), ReconError, "warmup=-1"),
        (BenchmarkOptions(co_run=["a.engine", "b.engine"]), ReconError, r"a\.engine: no such file"),
        (BenchmarkOptions(co_run=[__file__]), ReconError, "two engines"),
        (BenchmarkOptions(co_run=[__file__] * 2, every=[1]), ReconError, "one number"),
        (BenchmarkOptions(co_run=[__file__] * 2, every=[2, 3]), ReconError, "every frame"),
        (BenchmarkOptions(co_run=[__file__] * 2, streams=2), ReconError, "give one of them"),
        (BenchmarkOptions(streams=0), ReconError, "streams=0"),
        (BenchmarkOptions(input="video"), ReconError, "input=video"),
        (BenchmarkOptions(every=[2]), ReconError, "every"),
        (BenchmarkOptions(engine="nowhere.engine"), ReconError, r"nowhere\.engine"),
        (BenchmarkOptions(root="nowhere"), ReconError, "nowhere"),
        (BenchmarkOptions(engine="a", root="b"), ReconError, "both"),
    ],
)
def test_impossible_options(options: BenchmarkOptions, kind: type[ReconError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        options.check()
    assert caught.value.remedy


def test_rows_make_a_table(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "benchmarks.csv"
    for name in ("first, with comma", "second"):
        append_csv(path, csv_row(_result([1.0, 2.0, 3.0]), {"engine": name, "key": "abc"}))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["engine"] for row in rows] == ["first, with comma", "second"]
    assert float(rows[1]["latency_ms_p50"]) == 2.0
    assert rows[0]["cpu_mhz_before"] == ""
    assert list(rows[0])[:2] == ["engine", "key"]


def test_a_table_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.csv"
    path.write_text("engine,speed\na,1\n")
    with pytest.raises(ReconError, match="speed") as caught:
        append_csv(path, csv_row(_result([1.0]), {"engine": "b"}))
    assert "move the file" in caught.value.remedy
    assert path.read_text() == "engine,speed\na,1\n"


def _append_many(path: Path, who: int, count: int) -> None:
    for index in range(count):
        append_csv(path, {"who": float(who), "index": float(index), "filler": "x" * 2000})


def test_writers_at_once_lose_no_row(tmp_path: Path) -> None:
    path, context = tmp_path / "benchmarks.csv", multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, who, 25)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    with path.open() as file:
        rows = [(float(row["who"]), float(row["index"])) for row in csv.DictReader(file)]
    assert sorted(rows) == [(who, index) for who in range(3) for index in range(25)]


def test_a_kill_at_any_moment_leaves_a_whole_table(tmp_path: Path) -> None:
    path, context, seen = tmp_path / "benchmarks.csv", multiprocessing.get_context("fork"), 0
    for attempt in range(8):
        worker = context.Process(target=_append_many, args=(path, attempt, 100_000))
        worker.start()
        time.sleep(0.03 + 0.011 * attempt)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        if path.exists():
            text = path.read_text()
            rows = list(csv.DictReader(text.splitlines()))
            assert text.endswith("\n")
            assert all(len(row["filler"]) == 2000 for row in rows), "no line is cut"
            assert len(rows) >= seen, "no line is lost"
            seen = len(rows)
    append_csv(path, {"who": 9.0, "index": 0.0, "filler": "end"})
    assert path.read_text().endswith("9.0,0.0,end\n")
    assert seen > 0


def lane(name: str, duration_ms: float, every: int = 1) -> Lane:
    return Lane(name, Sleeper([duration_ms]), {"x": torch.ones(2)}, every, items=2)


def test_streams_run_at_once_and_their_throughput_is_counted_together() -> None:
    """Sleeping takes no processor, so three lanes at once are three times as fast as one."""
    options = BenchmarkOptions(iterations=30, warmup=2)
    found = run_streams([lane(f"one#{index}", 5.0) for index in range(3)], options)
    assert list(found) == ["one#0", "one#1", "one#2"]
    for result in found.values():
        assert len(result.latency_samples_ms) == 30
        assert 5.0 <= result.percentile_ms(50) < 15.0
        assert result.company == 3
        assert result.frames_per_s is None
    combined = found["one#0"].combined_per_s
    assert combined is not None
    assert {result.combined_per_s for result in found.values()} == {combined}
    assert 1.5 * 200 < combined <= 3 * 200, "200 a second is what one lane alone can do at most"
    assert found["one#1"].summary()["combined_per_s"] == combined


def test_engines_share_frames_and_some_run_on_every_third() -> None:
    lanes = [lane("depth", 4.0), lane("detector", 8.0, every=3)]
    found = run_frames(lanes, BenchmarkOptions(iterations=30, warmup=3))
    assert (len(found["depth"].latency_samples_ms), len(found["detector"].latency_samples_ms)) == (30, 10)
    assert (lanes[0].session.calls, lanes[1].session.calls) == (33, 11)  # type: ignore[attr-defined]
    frames, combined = found["depth"].frames_per_s, found["depth"].combined_per_s
    assert frames is not None
    assert combined is not None
    assert combined == pytest.approx(frames * 40 / 30)
    at_best = 3e3 / (4 + 4 + 8)  # two frames of the first engine alone, one that waits for the second
    assert at_best / 3 < frames <= at_best


def test_an_engine_that_fails_in_company_ends_all_and_is_named() -> None:
    good, bad = lane("good", 1.0), lane("bad", 1.0)
    bad.feeds = {"y": torch.ones(2)}
    for together in (run_streams, run_frames):
        with pytest.raises(ReconError, match="'y'"):
            together([good, bad], BenchmarkOptions(iterations=1000, warmup=0))


def test_alone_on_the_cpu_there_are_no_transfers_to_tell_apart() -> None:
    result = benchmark(Sleeper([0.1]), {"x": torch.ones(2)}, BenchmarkOptions(iterations=3, warmup=0))
    assert result.host_samples_ms == result.end_to_end_samples_ms == []
    assert "end_to_end_ms_p50" not in result.summary()
    assert csv_row(result, {"name": "a"})["end_to_end_ms_p50"] == ""
