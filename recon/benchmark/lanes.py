"""Several engines, or several sessions of one, on the same device at the same time, under the contract of `benchmark`.

A *lane* is a session with a thread of its own, and on CUDA a stream of its own. Streams run freely side by side; in a
co-run frames arrive one after another, all engines that are due on a frame start together, and the frame ends when the
last of them has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recon.benchmark.contract import BenchmarkOptions, BenchmarkResult, Clock, device_memory_mib

if TYPE_CHECKING:
    import torch

    from recon.engines import Session

log = logging.getLogger(__name__)


@dataclass
class Lane:
    """One session that takes part. every: it runs on every n-th frame. items: images or views in one inference."""

    name: str
    session: Session
    feeds: Mapping[str, torch.Tensor]
    every: int = 1
    items: int = 1
    input: str = "random"


def run_streams(lanes: Sequence[Lane], options: BenchmarkOptions) -> dict[str, BenchmarkResult]:
    """All lanes at once, each `iterations` times after its warm-up, without waiting for one another.

    Combined throughput counts the inferences that ended while every lane was still running: at the end the last lanes
    would have the device to themselves. None, with a warning, where there was no such time.
    """
    gate = threading.Barrier(len(lanes))
    ends: dict[str, list[int]] = {lane.name: [] for lane in lanes}
    started: list[int] = []

    def work(lane: Lane, clock: Clock) -> None:
        for _ in range(options.warmup):
            clock.time(keep=False)
        gate.wait()
        started.append(time.perf_counter_ns())
        for _ in range(options.iterations):
            clock.time()
            ends[lane.name].append(time.perf_counter_ns())

    clocks = _together(lanes, work, gate)
    begin, end = max(started), min(times[-1] for times in ends.values())
    done = sum(begin < moment <= end for times in ends.values() for moment in times)
    combined = done / ((end - begin) / 1e9) if end > begin else None
    if combined is None:
        log.warning("one stream had ended before another began: no combined throughput; raise benchmark.iterations")
    return {lane.name: _result(lane, clocks[lane.name], options, len(lanes), combined) for lane in lanes}


def run_frames(lanes: Sequence[Lane], options: BenchmarkOptions) -> dict[str, BenchmarkResult]:
    """Frames one after another; each lane runs on every `lane.every`-th of them, beside those that are due with it."""
    gate = threading.Barrier(len(lanes))
    moments: list[int] = []

    def work(lane: Lane, clock: Clock) -> None:
        for frame in range(-options.warmup, options.iterations):
            gate.wait()
            if frame == 0 and lane is lanes[0]:
                moments.append(time.perf_counter_ns())
            if frame % lane.every == 0:
                clock.time(keep=frame >= 0)
        gate.wait()
        if lane is lanes[0]:
            moments.append(time.perf_counter_ns())

    clocks = _together(lanes, work, gate)
    seconds = (moments[1] - moments[0]) / 1e9
    done = sum(len(clock.device_ms) for clock in clocks.values())
    return {
        lane.name: _result(lane, clocks[lane.name], options, len(lanes), done / seconds, options.iterations / seconds)
        for lane in lanes
    }


def _together(lanes: Sequence[Lane], work: Callable[[Lane, Clock], None], gate: threading.Barrier) -> dict[str, Clock]:
    """Run `work` in a thread per lane; the first error of any is raised when all have ended."""
    clocks: dict[str, Clock] = {}
    errors: list[BaseException] = []

    def run(lane: Lane) -> None:
        try:
            with _stream(lane.session.device):
                clock = clocks[lane.name] = Clock(lane.session, lane.feeds)
                work(lane, clock)
        except threading.BrokenBarrierError:
            pass  # another lane failed, and has told
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=run, args=(lane,), name=f"lane {lane.name}") for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return clocks


@contextmanager
def _stream(device: str) -> Iterator[None]:
    """On CUDA, a stream of the thread's own as its current one."""
    if device == "cpu":
        yield
        return
    import torch

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield


def _result(
    lane: Lane,
    clock: Clock,
    options: BenchmarkOptions,
    company: int,
    combined: float | None,
    frames: float | None = None,
) -> BenchmarkResult:
    from recon.machine import cpu_mhz, cpu_name, peak_rss_mib

    return BenchmarkResult(
        latency_samples_ms=clock.device_ms,
        items_per_inference=lane.items,
        warmup=options.warmup,
        clock="cuda events" if clock.on_device else "perf_counter_ns",
        session_memory_mib=lane.session.memory_mib(),
        peak_rss_mib=peak_rss_mib(),
        peak_rss_is_since_start=True,
        device_memory_mib=device_memory_mib(lane.session.device),
        threads=lane.session.threads,
        cpu=cpu_name(),
        device=lane.session.device,
        cpu_mhz_before=None,
        cpu_mhz_after=cpu_mhz(),
        host_samples_ms=clock.host_ms,
        input=lane.input,
        company=company,
        combined_per_s=combined,
        frames_per_s=frames,
    )
