"""Benchmark: one timing contract for every engine.

Warm-up inferences are thrown away. Then every inference is timed on its own and waited for: on the CPU by
`perf_counter_ns`, on CUDA by a pair of events on the current stream. Inputs are ready in memory before the clock starts
and outputs stay where the engine leaves them, so transfers between host and device are in no figure. Raw samples are
kept; percentiles interpolate linearly between them. The error is against torch FP32 on the same inputs.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError, Refused

if TYPE_CHECKING:
    import torch

    from recon.compare import OutputError
    from recon.engines import Session

PERCENTILES = (50, 90, 95, 99)
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
    co_run: list[str] = field(default_factory=list)
    """Engines to run at once on one device."""
    every: list[int] = field(default_factory=list)
    """Run each of `co_run` on every n-th frame."""

    def check(self) -> None:
        if self.iterations < 1 or self.warmup < 0:
            raise ReconError(
                f"benchmark.iterations={self.iterations} warmup={self.warmup}: at least 1 and 0",
                "50 iterations after 10 of warm-up is the default",
            )
        if self.co_run:
            raise Refused(
                f"benchmark.co_run={self.co_run}: timing engines that share a device is not part of this version",
                "benchmark.root=DIR times them one after another",
            )
        if self.every:
            raise ReconError(f"benchmark.every={self.every}: belongs to benchmark.co_run", "leave it out")
        if self.engine is not None and self.root is not None:
            raise ReconError("benchmark.engine and benchmark.root are both given", "give one of the two")
        if self.engine is not None and not Path(self.engine).is_file():
            raise ReconError(f"benchmark.engine={self.engine}: no such file", "give the path of a built engine")
        if self.root is not None and not Path(self.root).is_dir():
            raise ReconError(f"benchmark.root={self.root}: no such folder", "give a folder that holds built engines")


@dataclass(frozen=True)
class BenchmarkResult:
    """What one engine did. Latencies in ms, memory in MiB, clocks in MHz (None where the system does not tell).

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
        }
        optional = {
            "device_memory_mib": self.device_memory_mib,
            "cpu_mhz_before": self.cpu_mhz_before,
            "cpu_mhz_after": self.cpu_mhz_after,
        }
        flat |= {name: value for name, value in optional.items() if value is not None}
        if self.errors:
            flat["error_rel_l2_max"] = max(error.rel_l2 for error in self.errors.values())
            flat["error_cosine_min"] = min(error.cosine for error in self.errors.values())
        flat |= {"clock": self.clock, "device": self.device, "cpu": self.cpu, "warnings": "; ".join(self.warnings())}
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

    ready = {name: tensor.to(session.device) for name, tensor in feeds.items()}
    before, was_reset = cpu_mhz(), reset_peak_rss()
    timed = _cuda_ms if session.device != "cpu" else _host_ms
    samples = []
    for index in range(options.warmup + options.iterations):
        sample = timed(session, ready)
        if index >= options.warmup:
            samples.append(sample)
        if tick is not None:
            tick()
    peak, after = peak_rss_mib(), cpu_mhz()
    return BenchmarkResult(
        latency_samples_ms=samples,
        items_per_inference=items,
        warmup=options.warmup,
        clock="cuda events" if timed is _cuda_ms else "perf_counter_ns",
        session_memory_mib=session.memory_mib(),
        peak_rss_mib=peak,
        peak_rss_is_since_start=not was_reset,
        device_memory_mib=_device_memory_mib(session.device),
        threads=session.threads,
        cpu=cpu_name(),
        device=session.device,
        cpu_mhz_before=before,
        cpu_mhz_after=after,
        errors=compare(reference, session, [feeds], finite=False) if reference is not None else {},
    )


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


def csv_row(result: BenchmarkResult, identity: Mapping[str, str | float]) -> dict[str, str | float]:
    """One line of the rolling summary: who was timed (`identity`, columns first), then the figures.

    Every row has the same columns for the same identity columns; what could not be measured is empty.
    """
    optional = ("device_memory_mib", "cpu_mhz_before", "cpu_mhz_after", "error_rel_l2_max", "error_cosine_min")
    figures: dict[str, str | float] = {**dict.fromkeys(optional, ""), **result.summary()}
    return {**identity, **{name: figures[name] for name in sorted(figures)}}


def append_csv(path: Path, row: Mapping[str, str | float]) -> None:
    """Append a line so that a reader, or a kill at any moment, sees the whole table without it or with it.

    Raises:
        ReconError: the file has other columns, or cannot be written.
    """
    from recon.artifact import locked, writable, write_atomic

    with writable(path.parent), locked(path):
        old = path.read_text() if path.exists() else ""
        header = next(csv.reader(io.StringIO(old)), None)
        if header is not None and header != list(row):
            differing = sorted(set(header) ^ set(row)) or "their order"
            raise ReconError(
                f"{path}: its columns are not the ones of this version (they differ in {differing})",
                "move the file away; a new one is started",
            )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header is None:
            writer.writerow(row)
        writer.writerow(row.values())
        write_atomic(path, old + text.getvalue())


def as_plain(result: BenchmarkResult) -> dict[str, Any]:
    """The whole result with raw samples, as plain data for JSON."""
    return asdict(result) | {"summary": result.summary(), "warnings": result.warnings()}


def _host_ms(session: Session, feeds: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter_ns()
    session.infer(feeds)
    return (time.perf_counter_ns() - start) / 1e6


def _cuda_ms(session: Session, feeds: dict[str, torch.Tensor]) -> float:
    import torch

    event: Any = torch.cuda.Event  # torch leaves it untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(session.device)
    start.record(torch.cuda.current_stream(session.device))
    session.infer(feeds)
    end.record(torch.cuda.current_stream(session.device))
    end.synchronize()
    return float(start.elapsed_time(end))


def _device_memory_mib(device: str) -> float | None:
    if device == "cpu":
        return None
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return float(total - free) / 2**20
