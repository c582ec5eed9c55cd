"""benchmarks/live_gpu.py in its small form: a recording is written, streamed in real time, and its JSON says what ran.

In a process that has neither hydra nor open3d, as on a GPU host with PyTorch alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MISSING = ("omegaconf", "hydra", "mlflow", "open3d", "onnx", "onnxruntime", "rerun")
WITHOUT = f"""
import runpy, sys
for name in {MISSING!r}:
    sys.modules[name] = None
sys.argv[0] = {str(ROOT / "benchmarks" / "live_gpu.py")!r}
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def benchmark(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, *arguments], capture_output=True, text=True, env=environment,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    said = benchmark("prepare", "--frames", str(folder), "--cameras", "2", "--size", "96", "72", "--recorded", "3",
                     "--device", "cpu")  # fmt: skip
    assert said.endswith("MB\n")
    assert len(list(folder.glob("cam?/*.jpg"))) == 8
    return folder


def test_a_recording_is_streamed_in_real_time(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "live.json"
    said = benchmark(
        "run", "--frames", str(recording), "--out", str(out), "--device", "cpu", "--fps", "2", "--seconds", "2",
        "--architecture", "twin", "--input", "56", "56", "--voxel", "0.08", "--render-width", "48", "--decode",
    )  # fmt: skip
    found = json.loads(out.read_text())
    batches = len(found["latency_samples_ms"])
    assert 1 <= batches <= 4
    assert found["frames"] + found["dropped"] == 4 * 2
    assert found["frames"] == 2 * found["batches"] == 2 * batches
    assert found["frames_fused"] == found["frames"]
    assert (found["network"], found["input"], found["images_at_once"]) == ("da2-twin", [56, 56], 2)
    assert found["depth_handed_on"].startswith("the scene's own depth")
    assert all(len(found["samples_ms"][part]) == batches for part in ("depth", "render", "align", "fuse"))
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["p95"] <= max(found["latency_samples_ms"]) + 1e-3
    parts = sum(found["ms"][part]["p50"] for part in ("depth", "align", "fuse"))
    assert parts > 0
    assert found["target_reached"] is (found["dropped"] == 0 and found["latency_ms"]["p95"] <= 66)
    assert found["warm_up_s"] > 0
    assert f"ready after {found['warm_up_s']:.2f} s" in said
    assert "latency ms: p50" in said
