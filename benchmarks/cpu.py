"""The CPU's share of "fast": the demo's engines against ONNX Runtime set by hand, and what a command costs to start.

    python benchmarks/cpu.py --out FILE.json [--rounds 30]

Engines: the demo's two, built by the real command, against every combination of graph level, threads, execution mode
and spinning on the exported ONNX file, in plain `onnxruntime.run` with NumPy arrays. All candidates in turn, `--rounds`
times, so that a busy moment hits all of them; medians, and the ratio of ours to the best by hand.
Commands: `--help`, and a second run of the demo's engine stages, everything cached; wall time, median of five.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from recon.machine import cpu_name, physical_cores

STARTS = 5
STAGES = ("stages=[export,build]", "tracking=none")


def main() -> None:
    """Time commands and engines, write the raw samples, print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = wall([*STAGES], folder)
        commands = {
            "help": [wall(["--help"], folder) for _ in range(STARTS)],
            "engine stages, first run": [first],
            "engine stages, cached": [wall([*STAGES], folder) for _ in range(STARTS)],
        }
        networks = {path.name: against_hand(path, given.rounds) for path in engines(folder)}
    found = {
        "machine": {"cpu": cpu_name(), "cores": physical_cores(), "python": platform.python_version()},
        "onnxruntime": version("onnxruntime"),
        "seconds": {key: {"median": float(np.median(all_)), "all": all_} for key, all_ in commands.items()},
        "networks": networks,
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    for key, times in commands.items():
        print(f"{key}: {np.median(times):.2f} s")
    for name, row in networks.items():
        print(
            f"{name}: {row['ours_ms']:.2f} ms, best by hand {row['best_ms']:.2f} ms ({row['best']}): {row['ratio']:.3f}"
        )


def wall(arguments: list[str], folder: Path) -> float:
    """Seconds of `python -m recon ARGUMENTS` from start to exit."""
    here = str(Path(__file__).parent.parent)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "recon", *arguments],
        cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    return time.perf_counter() - start


def engines(folder: Path) -> list[Path]:
    """The ONNX Runtime engines that the command has built below a folder."""
    return sorted(path for path in folder.rglob("*.onnxruntime.engine") if path.is_file())


def version(package: str) -> str:
    """The installed version of a package."""
    from importlib.metadata import version

    return version(package)


def against_hand(engine: Path, rounds: int) -> dict[str, Any]:
    """Median times of one engine as the project opens it, and of every setting of plain ONNX Runtime."""
    from recon.benchmark.contract import synthetic_feeds
    from recon.store import engine_manifest, open_engine

    manifest = engine_manifest(engine)
    onnx = exported(engine)
    with open_engine(engine, manifest) as session:
        feeds = synthetic_feeds(session, 0)
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        runs: dict[str, Callable[[], object]] = {"ours": lambda: session.infer(feeds)}
        for label, options in settings():
            runs[label] = plain(onnx, options, arrays)
        samples = taken_in_turn(runs, rounds)
    middle = {label: float(np.median(times)) for label, times in samples.items()}
    best = min((label for label in middle if label != "ours"), key=lambda label: middle[label])
    return {
        "ours_ms": middle["ours"], "best_ms": middle[best], "best": best, "ratio": middle["ours"] / middle[best],
        "median_ms": middle, "samples_ms": samples,
    }  # fmt: skip


def taken_in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds: in every round each candidate once, after one to warm up, in another order every time.

    The pause lets threads of the one before, which wait busily, go to sleep.
    """
    samples: dict[str, list[float]] = {label: [] for label in runs}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for label in order.permutation(list(runs)):
            time.sleep(0.03)
            runs[label]()
            start = time.perf_counter()
            runs[label]()
            samples[label].append((time.perf_counter() - start) * 1e3)
    return samples


def settings() -> list[tuple[str, Any]]:
    """Every hand-set session option worth trying."""
    import onnxruntime as ort

    found = []
    threads = sorted({1, physical_cores(), os.cpu_count() or 1})
    levels = {"basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL}
    for level, count, parallel, spin in product(levels, threads, (False, True), (False, True)):
        options = ort.SessionOptions()
        options.graph_optimization_level = levels[level]
        options.intra_op_num_threads = count
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL if parallel else ort.ExecutionMode.ORT_SEQUENTIAL
        options.inter_op_num_threads = 2 if parallel else 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        words = (level, f"threads={count}", *(["parallel"] if parallel else []), *(["spinning"] if spin else []))
        found.append((" ".join(words), options))
    return found


def plain(onnx: Path, options: Any, arrays: dict[str, np.ndarray]) -> Callable[[], object]:
    """A call of plain ONNX Runtime on these arrays, in a session with these options."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, arrays)


def exported(engine: Path) -> Path:
    """The FP32 ONNX file that the engine was built from; it lies beside it."""
    return engine.with_name(engine.name.removesuffix(".onnxruntime.engine") + ".onnx")


if __name__ == "__main__":
    main()
