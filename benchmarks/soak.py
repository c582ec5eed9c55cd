"""Memory over a long stream: 10,000 batches of the synthetic source through the real command, RSS sampled all along.

    python benchmarks/soak.py [--batches 10000]

Writes benchmarks/results/soak_cpu.json with the raw samples. Growth is judged from the tenth of the stream on, when
allocators and caches have settled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

HERE = Path(__file__).parent


def main() -> None:
    """Stream, fit the growth, print the figures, write the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "soak_cpu.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "recon", "model=recorded", "depth=recorded", "tracking=none", "stages=[reconstruct]",
            "source.count=2", "source.width=64", "source.height=48", "fusion.voxel=0.1",
            f"source.steps={given.batches}",
        ]  # fmt: skip
        samples, metrics = watch(command, Path(folder))
    middle = [row for row in samples if 0.1 * given.batches < row["frames"] / 2 <= given.batches]
    frames, rss = (np.array([row[key] for row in middle], float) for key in ("frames", "rss_mib"))
    growth = float(np.polyfit(frames / 2, rss, 1)[0] * 1000) if len(middle) > 2 else float("nan")
    found = {
        "batches": given.batches,
        "frames": metrics["frames_seen"],
        "seconds": samples[-1]["s"],
        "rss_mib_at_a_tenth": float(rss[0]),
        "rss_mib_at_the_end": float(rss[-1]),
        "growth_mib_per_1000_batches": growth,
        "metrics_json_mib": metrics["bytes"] / 2**20,
    }
    print(json.dumps(found, indent=1))
    given.output.write_text(json.dumps({"command": command[1:], **found, "samples": samples}) + "\n")


def watch(command: list[str], folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """RSS and frames done, every two seconds until the command has ended."""
    start, samples = time.monotonic(), []
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        logs = list(folder.glob("outputs/runs/*/*/frames.jsonl*"))
        lines = sum(1 for _ in logs[0].open()) if logs else 0
        try:
            rss = seen.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            break
        samples.append({"s": round(time.monotonic() - start, 1), "frames": lines, "rss_mib": round(rss, 1)})
        time.sleep(2)
    if process.wait():
        sys.exit(f"the run failed with exit code {process.returncode}")
    path = next(folder.glob("outputs/runs/*/*/metrics.json"))
    return samples, {"frames_seen": json.loads(path.read_text())["frames_seen"], "bytes": path.stat().st_size}


if __name__ == "__main__":
    main()
