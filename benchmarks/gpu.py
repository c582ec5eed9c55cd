"""What the benchmarks of networks on a GPU share: sessions of engine=inductor, recipes, timing, errors."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import call_ms, host, largest_inputs
from torch import Tensor

from recon.artifact import obtain
from recon.certificate import certify
from recon.engines import Build, Session
from recon.engines.inductor import Inductor
from recon.formats import Ranges, Recipe
from recon.lowbit.support import full_fp32
from recon.network import Network
from recon.precision import Precision
from recon.quant.none import NoQuant
from recon.quantise import make_recipe

os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")  # as recon.app does; read at the first product
WARMUP, SAMPLES = 10, 50
CALIBRATION_SEEDS = (1, 2)  # the measured inputs are those of seed 0
MODES = {  # precision, format of the rest, layers that are kept in it
    "bf16": ("bf16", "bf16", []),
    "fp16": ("fp16", "fp16", []),
    "fp8": ("fp8", "bf16", ["camera_head.*"]),
    "fp8-all": ("fp8", "bf16", []),
    "fp8-fp16": ("fp8", "fp16", ["camera_head.*"]),
    "int8": ("int8", "bf16", []),
}
"""`fp8` keeps what fp8 must not touch where poses matter (docs/quantisation.md)."""


class Shared:
    """A network whose weights are made once and stay on the GPU between builds; conversion leaves them as they are."""

    def __init__(self, network: Network) -> None:
        self.module = network.load()
        self.network = replace(network, load=lambda: self.module)

    def at(self, network: Network) -> Network:
        """Another geometry of the same image size, with these weights."""
        return replace(network, load=lambda: self.module)


def recipe(network: Network, mode: str, device: str) -> Recipe:
    """The recipe of a mode, with ranges of FP32 over the calibration seeds."""
    precision, rest, keep = MODES[mode]
    module = network.load().to(device)
    seeds = CALIBRATION_SEEDS if precision in ("fp8", "int8") else ()
    seen = largest_inputs(module, map(network.example, seeds), device)
    module.cpu()
    ranges = Ranges(seen, {}, "max", "seeds", len(CALIBRATION_SEEDS), "example inputs")
    return make_recipe(network, NoQuant(name="none", keep=keep), Precision(name=precision, rest=rest), ranges)


@contextmanager
def session(
    network: Network, asked: Recipe, engine: Inductor, folder: Path
) -> Iterator[tuple[Session, dict[str, Any]]]:
    """A session of a package that is built here and now as the build stage does it, and what is known of it.

    The FP32 module leaves the GPU before the session opens, so that its memory is the session's own.
    """
    path = folder / f"{network.name}.pt2"

    def make(at: Path) -> dict[str, Any]:
        facts = engine.build(Build(network, None, lambda: asked), at / path.name)
        return facts | {"certificate": certify(engine, at / path.name, facts, {})}

    start = time.perf_counter()
    manifest = obtain(path, "engine", f"{time.time()}", make).manifest
    built = time.perf_counter() - start
    network.load().cpu()
    clear()
    certificate = manifest.facts["certificate"]
    facts = {
        "kernels": manifest.effective["kernels"], "verdict": certificate["verdict"],
        "sentence": certificate["sentence"], "weights_mib": manifest.facts["weights_mib"], "build_seconds": built,
    }  # fmt: skip
    try:
        with engine.load(path) as found:
            yield found, facts
    finally:
        path.unlink()
        clear()


def filled(running: Session, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The session's own input buffers with the example in them; copies on the GPU where it has none."""
    feeds = {name: value.cuda() for name, value in example.items()}
    for name, buffer in running.buffers().items():
        feeds[name] = buffer.copy_(feeds[name])
    return feeds


def clear() -> None:
    """Give freed GPU memory back and start a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reference(network: Network, device: str) -> list[np.ndarray]:
    """Outputs of the plain module in FP32 without TF32, on the measured inputs."""
    module = network.load().to(device)
    with torch.inference_mode(), full_fp32(device):
        return [value.float().cpu().numpy() for value in module(*(v.to(device) for v in network.example(0).values()))]


def timed(call: Callable[[], object], count: int, pause: float = 0, warmup: int = WARMUP) -> list[float]:
    """Milliseconds of every call after warm-up, by CUDA events; `pause` seconds of idling before each."""
    for _ in range(min(warmup, count)):
        call()
    samples = []
    for _ in range(count):
        torch.cuda.synchronize()
        time.sleep(pause)
        samples.append(call_ms(call))
    return samples


def percentiles(samples: list[float]) -> dict[str, Any]:
    """p50, p90, p99, clocks right after, and the raw samples."""
    named = {f"p{q}_ms": float(np.percentile(samples, q)) for q in (50, 90, 99)}
    return named | {"clocks": clocks(), "samples_ms": samples}


def peak_gib() -> float:
    """Most GPU memory that torch held at once since `clear`."""
    return torch.cuda.max_memory_allocated() / 2**30


def clocks() -> str:
    """SM clock, power and temperature."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", "-i", which, "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def errors(names: Iterable[str], found: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> dict[str, float]:
    """||found - wanted|| / ||wanted|| of every output, in float64."""
    rows = {}
    for name, a, b in zip(names, found, wanted, strict=False):  # nothing is wanted where FP32 is too large
        exact = b.ravel().astype(np.float64)
        rows[f"{name}_rel_l2"] = float(np.linalg.norm(a.ravel() - exact) / np.linalg.norm(exact))
    return rows


def machine() -> dict[str, Any]:
    """Card, versions, date, and a list for the rows."""
    return {**host(), "driver": _driver(), "latency": []}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
