"""ONNX to plan, with strongly typed networks only: every number format comes from the graph."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import TYPE_CHECKING, Any

from recon.artifact import destination, file_hash, write_atomic
from recon.console import Phases, phases
from recon.engines.trt import layers, parsing, profiles, targets
from recon.engines.trt.failures import Situation, explained, out_of_memory
from recon.engines.trt.library import Library
from recon.engines.trt.messages import MESSAGES, Heard, logger
from recon.engines.trt.plan import PlanFacts, remember
from recon.engines.trt.shared import log_path
from recon.errors import ReconError, Refused
from recon.machine import MIB, peak_rss_mib
from recon.onnxgraph import read_model

if TYPE_CHECKING:
    from recon.engines.tensorrt import TensorRT

log = logging.getLogger(__name__)


def build(engine: TensorRT, library: Library, onnx: Path, out: Path) -> dict[str, Any]:
    """Write the plan `out` and its build log beside it; returns facts for the manifest.

    Raises:
        ReconError: TensorRT cannot parse or build the graph, memory ran out, or the profiles do not fit it.
    """
    model = read_model(onnx)
    parsing.name_by_module(model)
    start, file = time.perf_counter(), log_path(out)
    kept = destination(file)
    try:
        with MESSAGES.listen(file) as heard:
            plan, facts = _plan(engine, library, model, onnx, heard, kept)
            out.write_bytes(memoryview(plan))
    except (ReconError, KeyboardInterrupt):
        _keep(file, kept)  # the folder in which it lies is about to go
        raise
    facts |= {
        "bytes": out.stat().st_size,
        "build_seconds": time.perf_counter() - start,
        "attention": layers.attention(file),
        "layers": len(layers.from_log(file)),
        "warnings": heard.warnings,
        "log": file.name,
    }
    remember(file_hash(out), PlanFacts.of(facts["plan"]))
    return facts


def _plan(
    engine: TensorRT, library: Library, model: Any, onnx: Path, heard: Heard, kept: Path
) -> tuple[Any, dict[str, Any]]:
    """The serialised plan (a buffer) and what is known of it."""
    trt = library.trt
    situation = _situation(engine, library, onnx, kept)
    builder = _builder(library, heard)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = parsing.parse(library, network, logger(library), model, onnx, heard)
    inputs = parsing.inputs(network)
    profiles.fit(engine.profiles, inputs)
    decomposable = parsing.decompose_attention(library, network)
    config = builder.create_builder_config()
    built_for = _targets(engine, library, network)
    _configure(engine, library, builder, config, built_for)
    cache = _timing_cache(library, config, kept)
    try:
        with phases(f"TensorRT {onnx.stem}") as shown, _interruptible() as pressed:
            monitor = _monitor(library, shown, pressed)
            config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
    except MemoryError as error:
        raise out_of_memory(situation(), error) from error
    if pressed.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise explained(heard, situation())
    _save_timing_cache(config, cache)
    del parser  # it had to outlive the build
    facts = {
        "plan": _facts(engine, library, inputs, built_for),
        "attention_nodes": decomposable,
        "timing_cache": cache.name if cache else "",
    }
    return plan, facts


def _builder(library: Library, heard: Heard) -> Any:
    try:
        builder = library.trt.Builder(logger(library))
    except TypeError as error:  # pybind's word for a null pointer
        raise Refused(
            f"TensorRT {library.version} cannot make a builder here: {heard.reason}",
            "it needs an NVIDIA GPU and its driver; engine.flavour=tensorrt_rtx builds without",
        ) from error
    return builder


def _targets(engine: TensorRT, library: Library, network: Any) -> list[str]:
    """The GPUs that the plan will run on. TensorRT for RTX: those asked for, or all that have the network's types."""
    if not library.portable:
        return [targets.here()]
    return engine.compute_capability or targets.able(targets.of_network(library.trt, network))


def _configure(engine: TensorRT, library: Library, builder: Any, config: Any, built_for: list[str]) -> None:
    trt = library.trt
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = engine.optimization_level
    if engine.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, engine.workspace_mib * MIB)
    if not engine.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for wanted, flag in (
        (engine.weight_streaming, "WEIGHT_STREAMING"),
        (engine.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if engine.hardware_compatible:
        level = getattr(trt.HardwareCompatibilityLevel, engine.hardware_compatible.upper())
        config.hardware_compatibility_level = level
    if library.portable:
        config.num_compute_capabilities = len(built_for)
        for index, target in enumerate(built_for):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    for ranges in engine.profiles:
        profile = builder.create_optimization_profile()
        for name, points in ranges.items():
            profile.set_shape(name, *(tuple(points[point]) for point in profiles.POINTS))
        config.add_optimization_profile(profile)


def _timing_cache(library: Library, config: Any, kept: Path) -> Path | None:
    """Load what earlier builds with this TensorRT on this GPU have timed. RTX times nothing at build."""
    if library.portable:
        return None
    import torch

    gpu = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = kept.parent / f"tensorrt-{library.version}_{gpu}.timing"
    known = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(known, ignore_mismatch=False):
        log.warning("%s is from another TensorRT or GPU: it starts anew", path.name)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return path


def _save_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        write_atomic(path, bytes(memoryview(config.get_timing_cache().serialize())))


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Ctrl-C as a flag: an exception inside a callback would be swallowed by TensorRT's bindings."""
    pressed = Event()
    if current_thread() is not main_thread():  # signals go to the main thread
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(library: Library, shown: Phases, pressed: Event) -> Any:
    """TensorRT's progress on the console; Ctrl-C cancels the build at its next step."""

    class Monitor(library.trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            library.trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            shown.start(name, steps)

        def step_complete(self, name: str, step: int) -> bool:
            shown.step(name, step + 1)
            return not pressed.is_set()

        def phase_finish(self, name: str) -> None:
            shown.finish(name)

    return Monitor()


def _facts(
    engine: TensorRT, library: Library, inputs: dict[str, tuple[int, ...]], built_for: list[str]
) -> dict[str, Any]:
    """What has to be known before the plan is opened again."""
    return {
        "flavour": library.flavour,
        "version": library.version,
        "targets": built_for,
        "gpu": "" if library.portable else _gpu_name(),
        "version_compatible": engine.version_compatible,
        "hardware_compatible": engine.hardware_compatible,
        "host_code": engine.version_compatible,  # such a plan brings its own lean runtime
        "weight_streaming": engine.weight_streaming,
        "profiles": engine.plain_profiles(),
        "inputs": {name: list(shape) for name, shape in inputs.items()},
    }


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _keep(file: Path, kept: Path) -> None:
    if file != kept and file.is_file():
        shutil.copyfile(file, kept)


def _situation(engine: TensorRT, library: Library, onnx: Path, kept: Path) -> Callable[[], Situation]:
    """What `failures` is told; memory is read when it is called, at the moment of failure."""
    weights = sum(part.stat().st_size for part in onnx.parent.glob(onnx.name + "*") if part.suffix != ".json")

    def now() -> Situation:
        return Situation(
            onnx.name, library.version, kept, engine.workspace_mib, weights / MIB, peak_rss_mib(), _free_mib()
        )

    return now


def _free_mib() -> tuple[float, float | None]:
    import psutil
    import torch

    gpu = torch.cuda.mem_get_info()[0] / MIB if torch.cuda.is_available() else None
    return float(psutil.virtual_memory().available) / MIB, gpu
