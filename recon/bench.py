"""The benchmark stage: which engines are timed, on what, and where the figures go."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recon.artifact import read_manifest
from recon.benchmark import BenchmarkResult, append_csv, benchmark, benchmark_folder, csv_row
from recon.console import steps
from recon.errors import ReconError
from recon.store import Store, engine_manifest, open_engine

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


def benchmark_engines(store: Store) -> dict[str, BenchmarkResult]:
    """Time what was asked for: one engine file, every engine below a folder, or the engines of the configuration.

    Every result is a line of `<output>/benchmarks.csv`. Keys are engine file names (network names for `engine=torch`).

    Raises:
        ReconError: an engine cannot be opened or run; below a folder, only when none can.
    """
    options = store.config.benchmark
    if options.engine or options.root:
        results = _of_files(store, [Path(options.engine)] if options.engine else _below(Path(options.root or "")))
    else:
        results = _of_networks(store)
    for name, result in results.items():
        for warning in result.warnings():
            log.warning("%s: %s", name, warning)
    return results


def _of_networks(store: Store) -> dict[str, BenchmarkResult]:
    """The configuration's own engines, on the networks' examples, with their error against FP32 torch."""
    from recon.compare import compare
    from recon.engines.torch import Torch

    options, results = store.config.benchmark, {}
    for role, network in store.networks().items():
        with ExitStack() as stack:
            session = store.session(role, stack)
            assert session is not None
            tick = stack.enter_context(steps(f"Timing {network.name}", options.warmup + options.iterations))
            items = next(iter(network.inputs.values())).shape[0]
            feeds = network.example(options.seed)
            result = benchmark(session, feeds, options, items=items, tick=tick)
            reference = stack.enter_context(Torch(name="torch").session(network, None))  # after: not in its memory
            result = replace(result, errors=compare(reference, session, [feeds], finite=False))
        results[network.name] = result
        axes = {"quant_mode": store.config.quant_mode.name, "precision": store.config.precision.name}
        _record(store, network.name, axes, store.config.engine.name, result)
    return results


def _of_files(store: Store, files: list[Path]) -> dict[str, BenchmarkResult]:
    """Built engine files, each opened for its own turn, on synthetic input."""
    options = store.config.benchmark
    manifests = {file: engine_manifest(file) for file in files}
    entries = [(file.name, lambda file=file: open_engine(file, manifests[file])) for file in files]
    with steps("Timing engines", len(files) * (options.warmup + options.iterations)) as tick:
        found = benchmark_folder(entries, options, tick=tick)
    failures = [error for error in found.values() if isinstance(error, ReconError)]
    if failures and len(failures) == len(found):
        raise failures[0]
    for error in failures:
        log.warning("left out: %s", error)
    results = {name: result for name, result in found.items() if isinstance(result, BenchmarkResult)}
    for file, manifest in manifests.items():
        if file.name in results:
            axes = {axis: str(manifest.requested[axis]["name"]) for axis in ("quant_mode", "precision")}
            engine = str(manifest.effective["engine"]["name"])
            _record(store, str(manifest.requested["network"]), axes, engine, results[file.name])
    return results


def _below(root: Path) -> list[Path]:
    """Every file below a folder whose manifest says that it is an engine."""
    found = []
    for path in sorted(file.with_suffix("") for file in root.rglob("*.json")):
        if path.is_file() and read_manifest(path).kind == "engine":
            found.append(path)
    if not found:
        raise ReconError(f"benchmark.root={root}: no engine with a manifest below it", "build some with stages=[build]")
    return found


def _record(store: Store, network: str, axes: dict[str, str], engine: str, result: BenchmarkResult) -> None:
    append_csv(store.root / "benchmarks.csv", csv_row(result, {"name": network, **axes, "engine": engine}))
