"""VGGT-1B on a CUDA GPU: the fast network beside plain compiled PyTorch, with errors against FP32. Needs torch alone.

    python benchmarks/vggt_gpu.py --out vggt_gpu.json [--views 1 8 32] [--modes bf16 fp16 fp8] [--peer 1 8]
                                  [--profile 8] [--golden vggt_1b_seed0_2x112x112.npz]

Weights are seeded, so nothing is downloaded; timing does not depend on their values. Camera and depth heads, 518x518,
inputs on the GPU before the clock starts, CUDA events, warm-up 10, 50 samples (10 from 64 views on), raw samples in
the JSON, which is written after every row. FP8 ranges are calibrated on other images than the measured ones. The
peer is the plain network under BF16 autocast through torch.compile, in the same run. `host_ms` also holds the copies
from and to pinned host memory; `spaced_ms` is the median of 12 calls with 0.25 s of idling before each, which the
card's power limit does not slow down.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recon.geometry.preprocess import example_images
from recon.kernels.graphs import Captured
from recon.models.nets.config import PRESETS
from recon.models.nets.fast import FastVGGT
from recon.models.nets.vggt import VGGT, build

WARMUP, SAMPLES, MANY = 10, 50, 64
SIZE = (518, 518)
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp8-fp16": torch.float16}
TFLOP = {1: 3.35, 2: 7.07, 4: 15.6, 8: 37.18, 16: 98.1, 32: 291.0, 64: 963.0}


def main() -> None:
    """Measure what the arguments ask for; print a row and write the JSON as each is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--views", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--modes", nargs="*", default=["bf16", "fp16", "fp8"])
    parser.add_argument("--peer", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--profile", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "latency": [],
    }  # fmt: skip
    if arguments.golden:
        record["parity_rel_l2"] = parity(arguments.golden)
        print("parity, FP32 against golden:", {k: f"{v:.1e}" for k, v in record["parity_rel_l2"].items()})
    network = build(PRESETS["vggt-1b"], ("camera", "depth"), SIZE, seed=0).cuda()
    wanted = {views: outputs_of(network, pictures(views, 0)) for views in arguments.views if views < MANY}

    def note(row: dict[str, Any]) -> None:
        record["latency"].append(row)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        times = f"p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms  peak {row['peak_gib']:5.2f} GiB"
        errors = "  ".join(f"{name} {row[name]:.1e}" for name in ("depth_rel_l2", "pose_rel_l2") if name in row)
        host = f"  spaced {row['spaced_ms']:.2f} host {row['host_ms']:.2f} ms" if "host_ms" in row else ""
        print(f"{row['views']:3d} views  {row['mode']:20s} {times}  {errors}{host}  {row['clocks']}", flush=True)

    for views in arguments.peer:
        note(peer(network, views, wanted))
    network.cpu()
    for mode in arguments.modes:
        fast = fast_network(network, mode)
        for views in arguments.views:
            note(measure(fast, mode, views, wanted))
            if views in arguments.profile:
                record[f"profile_{mode}_{views}"] = profile(
                    fast, views, arguments.out.with_suffix(f".{mode}{views}.txt")
                )
        del fast
        gc.collect()
        torch.cuda.empty_cache()
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def fast_network(network: VGGT, mode: str) -> FastVGGT:
    """The fast network on the GPU; FP8 calibrated on eight images of two other scenes."""
    examples = [pictures(8, seed) for seed in (1, 2)] if mode.startswith("fp8") else []
    fast = network.cuda().to_inference(LOW[mode], fp8=examples)
    network.cpu()
    gc.collect()
    torch.cuda.empty_cache()
    return fast


def measure(fast: FastVGGT, mode: str, views: int, wanted: dict[int, list[np.ndarray]]) -> dict[str, Any]:
    """One row of the fast network as a CUDA graph."""
    images = pictures(views, 0)
    torch.cuda.reset_peak_memory_stats()
    captured = Captured(fast, images)
    samples = timed(lambda: captured(images), SAMPLES if views < MANY else 10)
    row = summary(views, mode, samples)
    found = [output.float().cpu().numpy() for output in captured(images)]
    if views in wanted:
        row |= {"pose_rel_l2": rel_l2(found[0], wanted[views][0]), "depth_rel_l2": rel_l2(found[1], wanted[views][1])}
    host = images.cpu().pin_memory()
    back = [torch.empty(output.shape, pin_memory=True) for output in captured.outputs]

    def through_host() -> None:
        captured(host)
        for target, output in zip(back, captured.outputs, strict=True):
            target.copy_(output, non_blocking=True)

    row["spaced_ms"] = float(np.percentile(timed(lambda: captured(images), 12, pause=0.25), 50))
    row["host_ms"] = float(np.percentile(timed(through_host, 10), 50))
    return row


def peer(network: VGGT, views: int, wanted: dict[int, list[np.ndarray]]) -> dict[str, Any]:
    """The plain network as a user would run it: BF16 autocast, torch.compile, CUDA graphs for few views."""
    images = pictures(views, 0)
    torch.cuda.reset_peak_memory_stats()
    compiled = torch.compile(network, fullgraph=True, mode="default" if views > 4 else "reduce-overhead")

    def call() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return compiled(images)  # type: ignore[no-any-return]

    row = summary(views, "peer", timed(call, SAMPLES))
    found = [output.float().cpu().numpy() for output in call()]
    if views in wanted:
        row |= {"pose_rel_l2": rel_l2(found[0], wanted[views][0]), "depth_rel_l2": rel_l2(found[1], wanted[views][1])}
    torch.compiler.reset()
    return row


def summary(views: int, mode: str, samples: list[float]) -> dict[str, Any]:
    """Percentiles, rate, memory, clocks and the raw samples."""
    p50 = float(np.percentile(samples, 50))
    return {
        "views": views, "mode": mode, "p50_ms": p50, "p90_ms": float(np.percentile(samples, 90)),
        "p99_ms": float(np.percentile(samples, 99)), "tflops": TFLOP.get(views, 0.0) / p50 * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "clocks": clocks(), "samples_ms": samples,
    }  # fmt: skip


def profile(fast: FastVGGT, views: int, table: Path) -> list[tuple[str, int, float]]:
    """Kernels of one call: name, count, microseconds."""
    images = pictures(views, 0)
    fast(images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        fast(images)
        torch.cuda.synchronize()
    averages = record.key_averages()
    table.write_text(averages.table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=100))
    rows = [(event.key[:120], event.count, float(event.self_device_time_total)) for event in averages]
    return sorted(rows, key=lambda row: -row[2])


def parity(golden: Path) -> dict[str, float]:
    """Relative L2 of every output of the full network in true FP32 on the GPU."""
    with np.load(golden, allow_pickle=False) as data:
        images, wanted = data["images"], {name: data[name] for name in data.files}
    network = build(PRESETS["vggt-1b"], ("camera", "depth", "points"), images.shape[-2:], seed=0).cuda()
    found = outputs_of(network, torch.from_numpy(images).reshape(-1, *images.shape[-3:]).cuda())
    names = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
    return {name: rel_l2(output, wanted[name]) for name, output in zip(names, found, strict=True)}


def outputs_of(network: torch.nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.float().cpu().numpy() for output in network(images)]


def pictures(views: int, seed: int) -> torch.Tensor:
    """[views,3,H,W] FP32 RGB in 0..1 on the GPU."""
    images = torch.from_numpy(example_images(views, (SIZE[1], SIZE[0]), seed)).cuda()
    return (images.permute(0, 3, 1, 2).float() / 255).contiguous()


def timed(call: Callable[[], object], count: int, pause: float = 0) -> list[float]:
    """Milliseconds of every call after warm-up, by CUDA events; `pause` seconds of idling before each."""
    for _ in range(min(WARMUP, count)):
        call()
    samples = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        time.sleep(pause)
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def clocks() -> str:
    """SM clock, power and temperature right after the samples."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def rel_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = found.ravel().astype(np.float64), wanted.ravel().astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    main()
