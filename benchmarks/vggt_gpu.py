"""VGGT-1B as plain PyTorch on a CUDA GPU: latency by view count, and parity with golden outputs. Needs torch alone.

    python benchmarks/vggt_gpu.py --out vggt_gpu.json [--golden vggt_1b_seed0_2x112x112.npz] [--views 1 2 4 8]

Weights are seeded, so nothing is downloaded; timing does not depend on their values. Camera and depth heads, 518x518,
inputs on the GPU before the clock starts, CUDA events, warm-up 10, 50 samples, raw samples in the JSON. This is the
starting point that engines are compared with, not a tuned engine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from recon.geometry.preprocess import example_images
from recon.models.nets.config import PRESETS
from recon.models.nets.vggt import build

WARMUP, SAMPLES = 10, 50
SIZE = (518, 518)


def main() -> None:
    """Measure what the arguments ask for, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if arguments.golden:
        record["parity_rel_l2"] = parity(arguments.golden)
        print("parity, FP32 against golden:", {k: f"{v:.1e}" for k, v in record["parity_rel_l2"].items()})
    network = build(PRESETS["vggt-1b"], ("camera", "depth"), SIZE, seed=0).cuda()
    record["latency"] = [row for views in arguments.views for row in latencies(network, views)]
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["latency"]:
        times = f"p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms  peak {row['peak_gib']:5.2f} GiB"
        errors = f"depth rel-L2 {row['depth_rel_l2']:.1e}  pose {row['pose_rel_l2']:.1e}"
        print(f"{row['views']:3d} views  {row['mode']:22s} {times}  {errors}")


def parity(golden: Path) -> dict[str, float]:
    """Relative L2 of every output of the full network in true FP32 on the GPU: convolutions default to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    with np.load(golden, allow_pickle=False) as data:
        images, wanted = data["images"], {name: data[name] for name in data.files}
    network = build(PRESETS["vggt-1b"], ("camera", "depth", "points"), images.shape[-2:], seed=0).cuda()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images).reshape(-1, *images.shape[-3:]).cuda())
    torch.backends.cudnn.allow_tf32 = True
    names = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
    found = {name: output.cpu().numpy() for name, output in zip(names, outputs, strict=True)}
    return {name: rel_l2(found[name].ravel(), wanted[name].ravel()) for name in names}


def latencies(network: torch.nn.Module, views: int) -> list[dict[str, object]]:
    """One row per way of running: TF32 eager, BF16 autocast eager, BF16 autocast compiled; errors against FP32."""
    pictures = torch.from_numpy(example_images(views, (SIZE[1], SIZE[0]), 0)).cuda()
    images = pictures.permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        reference = [output.float().cpu().numpy() for output in network(images)]
    compiled = torch.compile(network, fullgraph=True, mode="default" if views > 4 else "reduce-overhead")
    rows = []
    for mode, module, low in (
        ("tf32 eager", network, False),
        ("bf16 autocast eager", network, True),
        ("bf16 autocast compiled", compiled, True),
    ):
        torch.set_float32_matmul_precision("high")
        torch.cuda.reset_peak_memory_stats()

        def call(module: torch.nn.Module = module, low: bool = low) -> tuple[torch.Tensor, ...]:
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=low):
                return module(images)

        samples = timed(call)
        outputs = [output.float().cpu().numpy() for output in call()]
        torch.set_float32_matmul_precision("highest")
        rows.append({
            "views": views, "mode": mode,
            "p50_ms": float(np.percentile(samples, 50)), "p99_ms": float(np.percentile(samples, 99)),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "pose_rel_l2": rel_l2(outputs[0], reference[0]),
            "depth_rel_l2": rel_l2(outputs[1], reference[1]), "samples_ms": samples,
        })  # fmt: skip
    return rows


def timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of every call after warm-up, by CUDA events."""
    for _ in range(WARMUP):
        call()
    samples = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def rel_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    main()
