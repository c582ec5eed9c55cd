"""Benchmark: one timing contract for every engine, alone or in company.

Warm-up inferences are thrown away. Then every inference is timed on its own and waited for. *Latency* is the device's:
on the CPU by `perf_counter_ns`, on CUDA by a pair of events on the stream, with inputs ready in device memory before
the clock starts and outputs left where the engine leaves them. On CUDA two more times are shown apart: *host*, from the
call to the end of the work as the calling thread sees it, and *end to end*, with inputs brought from host memory and
outputs brought back. Raw samples are kept; percentiles interpolate linearly between them. The error is
against torch FP32 on the same inputs. `recon.benchmark.lanes` times several engines at once by the same contract.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError

if TYPE_CHECKING:
    import torch

    from recon.compare import OutputError
    from recon.engines import Session

PERCENTILES = (50, 90, 95, 99)
INPUTS = ("auto", "random", "source")
NOISY_CV = 0.1  # a standard deviation above a tenth of the mean: the machine was busy, or clocks moved


@dataclass
class BenchmarkOptions:
    """What is timed, and for how long."""

    iterations: int = 50
    """Timed inferences. Below 50 the tail percentiles are those of too few samples, and the result says so."""
    warmup: int = 10
    """Inferences before the clock starts."""
    seed: int = 0
    """Seed of synthetic inputs."""
    engine: str | None = None
    """One engine file to time; None = the engines of this configuration."""
    root: str | None = None
    """Time every engine below this folder into one table."""
    input: str = "auto"
    """What engine files (engine, root, co_run) are fed with: random numbers, or frames of the source (source). auto:
    frames where a source other than the synthetic default is configured."""
    streams: int = 1
    """Sessions of one engine that run at once, each in a thread (and CUDA stream) of its own."""
    co_run: list[str] = field(default_factory=list)
    """Engines to run at once on one device."""
    every: list[int] = field(default_factory=list)
    """Run each of `co_run` on every n-th frame; empty: all on every frame."""

    def check(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise ReconError(
                f"benchmark.iterations={self.iterations} warmup={self.warmup}: at least 1 and 0",
                "50 iterations after 10 of warm-up is the default",
            )
        if self.input not in INPUTS:
            raise ReconError(f"benchmark.input={self.input}: no such input", f"choose from {', '.join(INPUTS)}")
        if self.streams < 1:
            raise ReconError(f"benchmark.streams={self.streams}: must be at least 1", "1 times the engine alone")
        self._check_co_run()
        if self.engine is not None and self.root is not None:
            raise ReconError("benchmark.engine and benchmark.root are both given", "give one of the two")
        if self.engine is not None and not Path(self.engine).is_file():
            raise ReconError(f"benchmark.engine={self.engine}: no such file", "give the path of a built engine")
        if self.root is not None and not Path(self.root).is_dir():
            raise ReconError(f"benchmark.root={self.root}: no such folder", "give a folder that holds built engines")

    @property
    def of_files(self) -> bool:
        """Whether engine files are timed, and not the engines of the configuration."""
        return bool(self.engine or self.root or self.co_run)

    def _check_co_run(self) -> None:
        if not self.co_run:
            if self.every:
                raise ReconError(f"benchmark.every={self.every}: belongs to benchmark.co_run", "leave it out")
            return
        if self.engine is not None or self.root is not None or self.streams > 1:
            raise ReconError(
                "benchmark.co_run is given together with benchmark.engine, root or streams", "give one of them"
            )
        if len(self.co_run) < 2:
            raise ReconError(
                f"benchmark.co_run={self.co_run}: needs two engines or more", "benchmark.engine=PATH times one alone"
            )
        for path in self.co_run:
            if not Path(path).is_file():
                raise ReconError(f"benchmark.co_run: {path}: no such file", "give paths of built engines")
        if self.every and (len(self.every) != len(self.co_run) or min(self.every) < 1):
            raise ReconError(
                f"benchmark.every={self.every}: needs one number of at least 1 for each of {len(self.co_run)} engines",
                "benchmark.every=[1,3] runs the second one on every third frame",
            )
        if self.every and min(self.every) > 1:
            raise ReconError(
                f"benchmark.every={self.every}: no engine runs on every frame", "divide by the smallest number"
            )


@dataclass(frozen=True)
class BenchmarkResult:
    """What one engine did. Latencies in ms, memory in MiB, clocks in MHz (None where the system does not tell).

    host_samples_ms, end_to_end_samples_ms: empty on the CPU, where both are the latency. input: what it was fed with.
    company: engines or streams that ran at the same time, this one included; combined_per_s: inferences of all of them
    together a second, frames_per_s: frames of a co-run a second (None when alone).
    session_memory_mib: as the session itself states it. peak_rss_mib: the whole process while it was timed.
    device_memory_mib: taken on the GPU by all its users after the run; None on the CPU.
    """

    latency_samples_ms: list[float]
    items_per_inference: int
    warmup: int
    clock: str
    session_memory_mib: float
    peak_rss_mib: float
    peak_rss_is_since_start: bool
    device_memory_mib: float | None
    threads: int
    cpu: str
    device: str
    cpu_mhz_before: float | None
    cpu_mhz_after: float | None
    errors: dict[str, OutputError] = field(default_factory=dict)
    host_samples_ms: list[float] = field(default_factory=list)
    end_to_end_samples_ms: list[float] = field(default_factory=list)
    input: str = "example"
    company: int = 1
    combined_per_s: float | None = None
    frames_per_s: float | None = None

    def percentile_ms(self, percent: float) -> float:
        """Latency below which `percent` of the samples lie, linear between samples."""
        return float(np.percentile(self.latency_samples_ms, percent))

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation over mean."""
        return float(np.std(self.latency_samples_ms) / np.mean(self.latency_samples_ms))

    def warnings(self) -> list[str]:
        """What a reader has to know before trusting the figures."""
        count, found = len(self.latency_samples_ms), []
        if (cv := self.coefficient_of_variation) > NOISY_CV:
            found.append(f"latency varies by {cv:.0%} of its mean: the machine was busy or its clocks moved")
        if count < 50:
            found.append(f"{count} samples: percentiles above {100 - 100 / count:.0f} rest on the largest one alone")
        if self.peak_rss_is_since_start:
            found.append("peak memory is that of the process since its start: the system does not reset it")
        return found

    def summary(self) -> dict[str, float | str]:
        """The figures, flat, with the unit in every name."""
        samples = np.asarray(self.latency_samples_ms)
        flat: dict[str, float | str] = {f"latency_ms_p{p}": self.percentile_ms(p) for p in PERCENTILES}
        flat |= {
            "latency_ms_mean": float(samples.mean()),
            "latency_ms_std": float(samples.std()),
            "latency_ms_min": float(samples.min()),
            "latency_ms_max": float(samples.max()),
            "latency_cv": self.coefficient_of_variation,
            "throughput_items_per_s": 1e3 * self.items_per_inference / float(samples.mean()),
            "items_per_inference": float(self.items_per_inference),
            "iterations": float(samples.size),
            "warmup": float(self.warmup),
            "session_memory_mib": self.session_memory_mib,
            "peak_rss_mib": self.peak_rss_mib,
            "threads": float(self.threads),
            "company": float(self.company),
        }
        optional = {
            "device_memory_mib": self.device_memory_mib,
            "cpu_mhz_before": self.cpu_mhz_before,
            "cpu_mhz_after": self.cpu_mhz_after,
            "combined_per_s": self.combined_per_s,
            "frames_per_s": self.frames_per_s,
        }
        for name, extra in (("host", self.host_samples_ms), ("end_to_end", self.end_to_end_samples_ms)):
            if extra:
                optional |= {f"{name}_ms_p{p}": float(np.percentile(extra, p)) for p in (50, 99)}
        flat |= {name: value for name, value in optional.items() if value is not None}
        if self.errors:
            flat["error_rel_l2_max"] = max(error.rel_l2 for error in self.errors.values())
            flat["error_cosine_min"] = min(error.cosine for error in self.errors.values())
        flat |= {
            "clock": self.clock,
            "input": self.input,
            "device": self.device,
            "cpu": self.cpu,
            "warnings": "; ".join(self.warnings()),
        }
        return flat


def benchmark(
    session: Session,
    feeds: Mapping[str, torch.Tensor],
    options: BenchmarkOptions,
    *,
    reference: Session | None = None,
    items: int = 1,
    tick: Callable[[], None] | None = None,
) -> BenchmarkResult:
    """Time `session` on `feeds`; compare with `reference` (torch FP32) on the same feeds where one is given.

    items: images or views in one inference, for the throughput. tick: called after every inference, for a progress bar;
    its time is in no sample. Feeds are moved to the session's device first.
    """
    from recon.compare import compare
    from recon.machine import cpu_mhz, cpu_name, peak_rss_mib, reset_peak_rss

    before, was_reset = cpu_mhz(), reset_peak_rss()
    clock = Clock(session, feeds)
    for index in range(options.warmup + options.iterations):
        clock.time(keep=index >= options.warmup)
        if tick is not None:
            tick()
    if clock.on_device:
        clock.time_transfers(options.warmup, options.iterations)
    peak, after = peak_rss_mib(), cpu_mhz()
    return BenchmarkResult(
        latency_samples_ms=clock.device_ms,
        items_per_inference=items,
        warmup=options.warmup,
        clock="cuda events" if clock.on_device else "perf_counter_ns",
        session_memory_mib=session.memory_mib(),
        peak_rss_mib=peak,
        peak_rss_is_since_start=not was_reset,
        device_memory_mib=device_memory_mib(session.device),
        threads=session.threads,
        cpu=cpu_name(),
        device=session.device,
        cpu_mhz_before=before,
        cpu_mhz_after=after,
        errors=compare(reference, session, [feeds], finite=False) if reference is not None else {},
        host_samples_ms=clock.host_ms,
        end_to_end_samples_ms=clock.end_to_end_ms,
    )


class Clock:
    """Times inferences of one session. device_ms is what `BenchmarkResult` calls latency; the rest is for CUDA."""

    def __init__(self, session: Session, feeds: Mapping[str, torch.Tensor]) -> None:
        self.session, self.on_device = session, session.device != "cpu"
        self._host_feeds = {name: tensor.cpu() for name, tensor in feeds.items()}
        self._ready = {name: tensor.to(session.device) for name, tensor in feeds.items()}
        self.device_ms: list[float] = []
        self.host_ms: list[float] = []
        self.end_to_end_ms: list[float] = []

    def time(self, keep: bool = True) -> None:
        """One inference on inputs that are ready on the device."""
        device, host = self._on_device() if self.on_device else self._on_host()
        if keep:
            self.device_ms.append(device)
            if self.on_device:
                self.host_ms.append(host)

    def time_transfers(self, warmup: int, iterations: int) -> None:
        """Inferences with inputs brought from host memory (page-locked) and outputs brought back."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._host_feeds.items()}
        for index in range(warmup + iterations):
            start = time.perf_counter_ns()
            feeds = {name: tensor.to(self.session.device, non_blocking=True) for name, tensor in pinned.items()}
            for output in self.session.infer(feeds).values():
                output.cpu()  # waits for the work
            if index >= warmup:
                self.end_to_end_ms.append((time.perf_counter_ns() - start) / 1e6)

    def _on_host(self) -> tuple[float, float]:
        start = time.perf_counter_ns()
        self.session.infer(self._ready)
        passed = (time.perf_counter_ns() - start) / 1e6
        return passed, passed

    def _on_device(self) -> tuple[float, float]:
        import torch

        event: Any = torch.cuda.Event  # torch leaves it untyped
        start, end = event(enable_timing=True), event(enable_timing=True)
        stream = torch.cuda.current_stream(self.session.device)
        stream.synchronize()
        called = time.perf_counter_ns()
        start.record(stream)
        self.session.infer(self._ready)
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)), (time.perf_counter_ns() - called) / 1e6


def benchmark_folder(
    entries: Sequence[tuple[str, Callable[[], Session]]],
    options: BenchmarkOptions,
    *,
    feeds: Callable[[Session], Mapping[str, torch.Tensor]] | None = None,
    tick: Callable[[], None] | None = None,
) -> dict[str, BenchmarkResult | ReconError]:
    """Time many engines one after another, each opened for its own turn only.

    An engine that cannot be opened or run is an entry with its error; the others are timed all the same.
    feeds: inputs for a session; None = `synthetic_feeds` with the seed of the options.
    """
    results: dict[str, BenchmarkResult | ReconError] = {}
    for name, opened in entries:
        try:
            with opened() as session:
                inputs = feeds(session) if feeds is not None else synthetic_feeds(session, options.seed)
                results[name] = benchmark(session, inputs, options, tick=tick)
        except ReconError as error:
            results[name] = error
    return results


def synthetic_feeds(session: Session, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs of the right shapes and dtypes: uniform in [0, 1) for floats, 0 or 1 for integers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, spec in session.inputs.items():
        values = torch.rand(spec.shape, generator=generator)
        dtype = getattr(torch, spec.dtype)
        feeds[name] = values.to(dtype) if dtype.is_floating_point else (values > 0.5).to(dtype)
    return feeds


def as_plain(result: BenchmarkResult) -> dict[str, Any]:
    """The whole result with raw samples, as plain data for JSON."""
    return asdict(result) | {"summary": result.summary(), "warnings": result.warnings()}


def device_memory_mib(device: str) -> float | None:
    """Memory of the device that all its users have taken, MiB; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return float(total - free) / 2**20
