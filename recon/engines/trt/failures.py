"""Why TensorRT did not build: its words, what they mean, and what to change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from recon.engines.trt.messages import Heard
from recon.errors import ReconError
from recon.machine import MIB

MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|cannot allocate|could not be allocated|insufficient memory|memory allocation"
    r"|Device memory is insufficient",
    re.IGNORECASE,
)
ASKED = (
    (re.compile(r"(?:request(?:ed)?|allocat\w+|size)\D{0,60}?(\d{6,})(?: bytes)?", re.IGNORECASE), 1 / MIB),
    (re.compile(r"request(?:ed)?:? *(\d+) ?(?:MB|MiB)", re.IGNORECASE), 1.0),
)
TYPES = re.compile(r"HW-specific datatypes: ([\w, ]+)")


@dataclass(frozen=True)
class Situation:
    """What was being built, for the message. weights_mib: of the ONNX file; free_mib: (host, GPU or None) memory."""

    name: str
    version: str
    log: Path
    workspace_mib: int
    weights_mib: float
    peak_mib: float
    free_mib: tuple[float, float | None]


def explained(heard: Heard, at: Situation) -> ReconError:
    """The error to raise for a build without a plan: TensorRT's last errors in it, and the log that has them all."""
    reason = heard.reason
    told = f"{at.name}: TensorRT {at.version} built no plan: {reason}"
    kept = f"everything it said is in {at.log}"
    if "workspace limit" in reason or "insufficient workspace" in reason.lower():
        limit = f"engine.workspace_mib={at.workspace_mib} is too little" if at.workspace_mib else "too little workspace"
        return ReconError(f"{told}; {limit}", f"raise engine.workspace_mib, or 0 for no limit; {kept}")
    if any(MEMORY.search(text) for text in (*heard.errors, *heard.warnings)):
        return ReconError(f"{told}; {_memory(heard, at)}", f"{_less_memory()}; {kept}")
    if found := TYPES.search(reason):
        remedy = f"leave out the GPUs that lack {found[1].strip()} in engine.compute_capability, or choose another"
        return ReconError(told, f"{remedy} precision or quant_mode; {kept}")
    if "FP32 GEMM is not supported" in reason:
        return ReconError(told, f"precision=fp16, or leave sm75 out of engine.compute_capability; {kept}")
    return ReconError(told, kept)


def out_of_memory(at: Situation, error: BaseException) -> ReconError:
    """The error for memory that ran out in this process instead of inside TensorRT."""
    told = f"{at.name}: out of memory while TensorRT {at.version} built it ({error or type(error).__name__})"
    return ReconError(f"{told}; {_memory(Heard(), at)}", f"{_less_memory()}; what it said until then is in {at.log}")


def _memory(heard: Heard, at: Situation) -> str:
    """How much was needed, as far as anyone knows, and how much there was."""
    asked = [
        float(found[1]) * unit
        for text in (*heard.errors, *heard.warnings)
        for pattern, unit in ASKED
        for found in pattern.finditer(text)
    ]
    least = (
        f"the {at.peak_mib:.0f} MiB that this process had grown to, with {at.weights_mib:.0f} MiB of weights to place"
    )
    needed = f"it asked for {max(asked):.0f} MiB beyond {least}" if asked else f"it needed more than {least}"
    host, gpu = at.free_mib
    free = f"{host:.0f} MiB of host memory" + (f" and {gpu:.0f} MiB of GPU memory" if gpu is not None else "")
    return f"{needed}; free now: {free}"


def _less_memory() -> str:
    return (
        "use fewer views, a smaller input size, engine.optimization_level=2 or a limit in engine.workspace_mib, or"
        " free memory that others hold"
    )
