"""The benchmark stage: which engines are timed, on what, and where the figures go."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.artifact import Manifest, read_manifest
from recon.benchmark.contract import BenchmarkResult, benchmark, benchmark_folder, synthetic_feeds
from recon.benchmark.lanes import Lane, run_frames, run_streams
from recon.benchmark.table import append_csv, csv_row
from recon.console import steps
from recon.errors import ReconError
from recon.network import Network
from recon.store import Store, built, engine_manifest, open_engine

if TYPE_CHECKING:
    import torch

    from recon.config import Config
    from recon.engines import Session
    from recon.network import TensorSpec

log = logging.getLogger(__name__)

ROLES = {"images": "model", "pixel_values": "depth"}
"""Input name -> role of the network that has it: whose preprocessing its frames need."""


def benchmark_engines(store: Store) -> dict[str, BenchmarkResult]:
    """Time what was asked for: engine files alone or together, every engine below a folder, or the configuration's own.

    Every result is a line of `<output>/benchmarks.csv`. Keys are engine file names (network names for the engines of
    the configuration), with `#n` for the n-th stream or a name that is there already.

    Raises:
        ReconError: an engine cannot be opened or run; below a folder, only when none can.
    """
    options = store.config.benchmark
    if options.co_run:
        results = _co_run(store, [Path(path) for path in options.co_run])
    elif options.engine and options.streams > 1:
        results = _streams_of_file(store, Path(options.engine))
    elif options.engine or options.root:
        results = _of_files(store, [Path(options.engine)] if options.engine else _below(Path(options.root or "")))
    else:
        results = _of_networks(store)
    for name, result in results.items():
        for warning in result.warnings():
            log.warning("%s: %s", name, warning)
    return results


def _of_networks(store: Store) -> dict[str, BenchmarkResult]:
    """The configuration's own engines, on the networks' examples, with their error against FP32 torch."""
    from recon.accuracy import reference_beside
    from recon.compare import compare

    options = store.config.benchmark
    results: dict[str, BenchmarkResult] = {}
    axes = {"quant_mode": store.config.quant_mode.name, "precision": store.config.precision.name}
    for role, network in store.networks().items():
        if store.config.engine.builds and (reason := store.config.engine.runs_here()):
            log.warning("%s is built, not timed: %s", network.name, reason)
            built(store, network)
            continue
        with ExitStack() as stack:
            session = store.session(role, stack)
            assert session is not None
            tick = stack.enter_context(steps(f"Timing {network.name}", options.warmup + options.iterations))
            items = next(iter(network.inputs.values())).shape[0]
            feeds = network.example(options.seed)
            found = {network.name: benchmark(session, feeds, options, items=items, tick=tick)}
            if options.streams > 1:
                others = [_again(store, role, session, stack) for _ in range(options.streams - 1)]
                lanes = [Lane(f"{network.name}#{i}", one, feeds, items=items, input="example")
                         for i, one in enumerate([session, *others])]  # fmt: skip
                found |= run_streams(lanes, options)
            reference = stack.enter_context(reference_beside(session, network))  # after: not in its memory
            alone = found[network.name]
            found[network.name] = replace(alone, errors=compare(reference, session, [feeds], finite=False))
        for name, result in found.items():
            _record(store, name, axes, store.config.engine.name, result)
        results |= found
    return results


def _again(store: Store, role: str, session: Session, stack: ExitStack) -> Session:
    """Another session of the same engine: over the same weights where it can share them."""
    if (shared := session.sibling()) is not None:
        return stack.enter_context(shared)
    opened = store.session(role, stack)
    assert opened is not None
    return opened


def _of_files(store: Store, files: list[Path]) -> dict[str, BenchmarkResult]:
    """Built engine files, each opened for its own turn."""
    options = store.config.benchmark
    manifests = {file: engine_manifest(file) for file in files}
    names = dict(zip(_names(files), files, strict=True))
    entries = [(name, lambda file=file: open_engine(file, manifests[file])) for name, file in names.items()]
    kind = _input(store.config)
    with steps("Timing engines", len(files) * (options.warmup + options.iterations)) as tick:
        found = benchmark_folder(entries, options, feeds=lambda session: _feeds(store.config, session), tick=tick)
    failures = [error for error in found.values() if isinstance(error, ReconError)]
    if failures and len(failures) == len(found):
        raise failures[0]
    for error in failures:
        log.warning("left out: %s", error)
    results = {name: replace(one, input=kind) for name, one in found.items() if isinstance(one, BenchmarkResult)}
    for name, result in results.items():
        _record_file(store, str(manifests[names[name]].requested["network"]), manifests[names[name]], result)
    return results


def _streams_of_file(store: Store, file: Path) -> dict[str, BenchmarkResult]:
    """One engine file alone first, then in several sessions at once."""
    alone = _of_files(store, [file])
    manifest = engine_manifest(file)
    with ExitStack() as stack:
        first = stack.enter_context(open_engine(file, manifest))
        sessions = [first]
        for _ in range(store.config.benchmark.streams - 1):
            sessions.append(stack.enter_context(first.sibling() or open_engine(file, manifest)))
        names = [f"{file.name}#{index}" for index in range(len(sessions))]
        lanes = _lanes(store.config, list(zip(names, sessions, [1] * len(names), strict=True)))
        results = run_streams(lanes, store.config.benchmark)
    for name, result in results.items():
        _record_file(store, name, manifest, result)
    return alone | results


def _co_run(store: Store, files: list[Path]) -> dict[str, BenchmarkResult]:
    """Several engine files on the same frames at once."""
    options = store.config.benchmark
    manifests = [engine_manifest(file) for file in files]
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(open_engine(file, manifest)) for file, manifest in zip(files, manifests, strict=True)
        ]
        every = options.every or [1] * len(files)
        lanes = _lanes(store.config, list(zip(_names(files), sessions, every, strict=True)))
        results = run_frames(lanes, options)
    for (name, result), manifest in zip(results.items(), manifests, strict=True):
        _record_file(store, name, manifest, result)
    return results


def _lanes(config: Config, entries: list[tuple[str, Session, int]]) -> list[Lane]:
    kind = _input(config)
    return [
        Lane(name, session, _feeds(config, session), every, next(iter(session.inputs.values())).shape[0], kind)
        for name, session, every in entries
    ]


def _names(files: list[Path]) -> list[str]:
    """File names, told apart by a number where two are the same."""
    found: list[str] = []
    for file in files:
        same = sum(name.partition("#")[0] == file.name for name in found)
        found.append(f"{file.name}#{same}" if same else file.name)
    return found


def _input(config: Config) -> str:
    """`random` or `source=NAME`."""
    asked = config.benchmark.input
    real = asked == "source" or (asked == "auto" and config.source.name != "synthetic")
    return f"source={config.source.name}" if real else "random"


def _feeds(config: Config, session: Session) -> dict[str, torch.Tensor]:
    """Input for an engine of which only the session is known."""
    if _input(config) == "random":
        return synthetic_feeds(session, config.benchmark.seed)
    from recon.frames import feeds

    name, spec = next(iter(session.inputs.items()))
    if name not in ROLES or len(spec.shape) != 4:
        raise ReconError(
            f"input {name!r}{list(spec.shape)}: frames can be prepared for {', '.join(ROLES)} alone",
            "benchmark.input=random",
        )
    network = Network(name, session.inputs, tuple(session.outputs), "", _no_module, lambda _: {})
    return feeds(_at_size(config, ROLES[name], spec), network, ROLES[name], 1, 0)[0]


def _no_module() -> torch.nn.Module:
    raise AssertionError("of an engine file only inputs and outputs are known")


def _at_size(config: Config, role: str, spec: TensorSpec) -> Config:
    """The configuration with the network's option at an engine's image size."""
    height, width = spec.shape[-2:]
    if role == "model":
        sizes: dict[str, object] = {"height": height, "width": width}
    else:
        sizes = {"input_size": height, "image_size": [width, height]}
    option = getattr(config, role)
    if not all(hasattr(option, key) for key in sizes):
        raise ReconError(
            f"{role}={option.name} has no preprocessing for {list(spec.shape)}",
            f"choose the {role} that the engine was built from, or benchmark.input=random",
        )
    changed: dict[str, Any] = {role: replace(option, **sizes)}
    return replace(config, **changed)


def _below(root: Path) -> list[Path]:
    """Every file below a folder whose manifest says that it is an engine."""
    found = []
    for path in sorted(file.with_suffix("") for file in root.rglob("*.json")):
        if path.is_file() and read_manifest(path).kind == "engine":
            found.append(path)
    if not found:
        raise ReconError(f"benchmark.root={root}: no engine with a manifest below it", "build some with stages=[build]")
    return found


def _record_file(store: Store, name: str, manifest: Manifest, result: BenchmarkResult) -> None:
    axes = {axis: str(manifest.requested[axis]["name"]) for axis in ("quant_mode", "precision")}
    _record(store, name, axes, str(manifest.effective["engine"]["name"]), result)


def _record(store: Store, network: str, axes: dict[str, str], engine: str, result: BenchmarkResult) -> None:
    append_csv(store.root / "benchmarks.csv", csv_row(result, {"name": network, **axes, "engine": engine}))
