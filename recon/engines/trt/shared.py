"""Deserialised plans: one per file and process, however many sessions run it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from recon.engines.trt import layers, plan, targets
from recon.engines.trt.library import Library, library
from recon.engines.trt.messages import MESSAGES, logger
from recon.errors import ReconError, Refused
from recon.formats import Inspection
from recon.machine import MIB

if TYPE_CHECKING:
    from recon.engines.tensorrt import TensorRT

log = logging.getLogger(__name__)


@dataclass
class Shared:
    """A deserialised plan. `device_mib`: by how much the GPU's free memory shrank while it was opened."""

    path: Path
    library: Library
    facts: plan.PlanFacts
    runtime: Any
    engine: Any
    device: int
    device_mib: float
    key: tuple[Any, ...]
    users: int = 1
    lock: Lock = field(default_factory=Lock)  # contexts are made and freed one at a time

    def release(self) -> None:
        """One user less; the last one frees the plan. Contexts have to be gone before."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            _open.pop(self.key, None)
            self.engine = None
            self.runtime = None  # after the engine that it made


_open: dict[tuple[Any, ...], Shared] = {}
_lock = Lock()


def opened(path: Path, options: TensorRT) -> Shared:
    """The deserialised plan, shared with every session of this process that has it open; release() it.

    Raises:
        ReconError: what `plan` refuses, no GPU, or TensorRT cannot read it.
    """
    import torch

    found = library(options.flavour)
    if reason := cannot_run(options):
        raise Refused(f"{path}: {reason}", "run it where its GPU is; engine=onnxruntime runs on the CPU")
    facts, data = plan.vetted(path)
    device = torch.cuda.current_device()
    plan.belongs(path, facts, found, targets.here(), str(torch.cuda.get_device_name(device)), options.allow_host_code)
    key = (hashlib.sha256(data).hexdigest(), found.flavour, device, options.weight_budget_mib)
    with _lock:
        if (known := _open.get(key)) is not None:
            known.users += 1
            return known
        _open[key] = _deserialised(path, found, facts, data, device, options.weight_budget_mib, key)
        return _open[key]


def cannot_run(options: TensorRT) -> str:
    """Why plans of these options cannot run on this machine; empty when they can."""
    here = targets.here()
    if not here:
        return "TensorRT runs on an NVIDIA GPU, and PyTorch sees none here"
    if options.flavour != "tensorrt_rtx":
        return ""
    if here not in targets.RTX_TARGETS:
        return f"TensorRT for RTX does not run on this GPU ({here}); it knows {', '.join(targets.RTX_TARGETS)}"
    if options.compute_capability and here not in options.compute_capability:
        return f"engine.compute_capability={options.compute_capability} leaves out this GPU, {here}"
    return ""


def inspected(path: Path, options: TensorRT) -> Inspection:
    """Layers as the inspector of the loaded plan gives them; where it cannot be loaded, as its build log lists them."""
    reason = cannot_run(options)
    if not reason:
        shared = opened(path, options)
        try:
            found, reason = _from_inspector(shared)
        finally:
            shared.release()
        if found:
            return Inspection(found)
    plan.vetted(path)
    file = log_path(path)
    if file.is_file() and (listed := layers.from_log(file)):
        return Inspection(listed)
    return Inspection(unseen=f"{reason}, and {file.name} with TensorRT's own list of layers is not beside the plan")


def log_path(path: Path) -> Path:
    """The build log of a plan: beside it."""
    return path.with_name(path.name + ".log")


def _from_inspector(shared: Shared) -> tuple[tuple[Any, ...], str]:
    trt = shared.library.trt
    if not hasattr(trt, "EngineInspector"):
        return (), f"{shared.library.flavour} has no inspector"
    with MESSAGES.listen() as heard:
        inspector = shared.engine.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON) if inspector is not None else ""
        del inspector  # it has to go before its engine
    found = layers.from_inspector(text) if text.strip() else ()
    if any(layer.compute for layer in found):
        return found, ""
    return (), f"TensorRT's inspector tells no formats of this plan ({heard.reason})"


def _deserialised(
    path: Path,
    found: Library,
    facts: plan.PlanFacts,
    data: bytes,
    device: int,
    budget: int | None,
    key: tuple[Any, ...],
) -> Shared:
    import torch

    before = torch.cuda.mem_get_info(device)[0]
    with MESSAGES.listen() as heard:
        runtime = found.trt.Runtime(logger(found))
        if heard.errors:  # the object may be hollow: any call on it would end the process
            raise ReconError(f"TensorRT {found.version} cannot run here: {heard.reason}", "check driver and GPU")
        if facts.host_code:
            runtime.engine_host_code_allowed = True  # `belongs` has seen that the user allows it
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ReconError(
            f"{path}: TensorRT {found.version} cannot read this plan: {heard.reason}", "delete it and build it again"
        )
    if facts.weight_streaming:
        wanted = engine.get_weight_streaming_automatic_budget() if budget is None else budget * MIB
        engine.weight_streaming_budget_v2 = min(wanted, engine.streamable_weights_size)
    taken = max(0, before - torch.cuda.mem_get_info(device)[0]) / MIB
    log.info("%s opened by %s %s: %.0f MiB on the GPU", path.name, found.flavour, found.version, taken)
    return Shared(path, found, facts, runtime, engine, device, taken, key)
