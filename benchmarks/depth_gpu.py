"""Depth Anything V2 on a CUDA GPU: the fast network beside plain compiled PyTorch, with errors against FP32.

    python benchmarks/depth_gpu.py --out depth_gpu.json [--sizes small base large] [--batches 1 8] [--modes peer fp16]

Needs torch and transformers. Seeded weights, 518x518, inputs on the GPU before the clock starts, CUDA events, warm-up
10, 50 samples, raw samples in the JSON, which is written after every row. The peer is the plain network under FP16
autocast through torch.compile with CUDA graphs, in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vggt_gpu import SAMPLES, clocks, outputs_of, rel_l2, timed

from recon.depth.nets.depth_anything import DisparityNet, build, preprocess
from recon.depth.nets.fast import FastDisparity
from recon.geometry.preprocess import example_images
from recon.kernels.graphs import Captured

SIZE = (518, 518)
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float16}


def main() -> None:
    """Measure what the arguments ask for; print a row and write the JSON as each is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", default=["small", "base", "large"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--modes", nargs="*", default=["peer", "fp16", "bf16", "fp8"])
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "latency": [],
    }  # fmt: skip
    for size in arguments.sizes:
        network = build(SIZE, seed=0, architecture=size, folder=None).cuda()
        wanted = {batch: outputs_of(network, pictures(batch, 0)) for batch in arguments.batches}
        for mode in arguments.modes:
            module = network if mode == "peer" else fast_network(network, mode)
            for batch in arguments.batches:
                row = {"size": size, "batch": batch, "mode": mode} | measure(module, batch, wanted[batch])
                record["latency"].append(row)
                if arguments.profile and mode != "peer":
                    record[f"profile_{size}_{mode}_{batch}"] = profile(module, batch)
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")
                print(
                    f"{size:6s} {mode:5s} batch {batch:2d}  p50 {row['p50_ms']:7.3f} ms  p99 {row['p99_ms']:7.3f} ms  "
                    f"{row['p50_ms'] / batch:6.3f} ms an image  rel-L2 {row['depth_rel_l2']:.1e}  {row['clocks']}",
                    flush=True,
                )
            del module
        torch.compiler.reset()
        gc.collect()


def fast_network(network: DisparityNet, mode: str) -> FastDisparity:
    """The fast network; FP8 calibrated on other images than the measured ones."""
    return network.to_inference(LOW[mode], fp8=[pictures(8, 1)] if mode == "fp8" else [])


def measure(module: torch.nn.Module, batch: int, wanted: list[np.ndarray]) -> dict[str, Any]:
    """Percentiles and error of one network at one batch."""
    images = pictures(batch, 0)
    torch.cuda.reset_peak_memory_stats()
    if isinstance(module, FastDisparity):
        call: Any = Captured(module, images)
    else:
        for (
            part
        ) in module.modules():  # hooks that record outputs, which no one asked for and torch.compile cannot trace
            part._forward_hooks.clear()
        compiled = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead")

        def call(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.inference_mode(), torch.autocast("cuda", torch.float16):
                return compiled(images)  # type: ignore[no-any-return]

    samples = timed(lambda: call(images), SAMPLES)
    found = call(images)[0].float().cpu().numpy()
    return {
        "p50_ms": float(np.percentile(samples, 50)), "p90_ms": float(np.percentile(samples, 90)),
        "p99_ms": float(np.percentile(samples, 99)), "depth_rel_l2": rel_l2(found, wanted[0]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "clocks": clocks(), "samples_ms": samples,
    }  # fmt: skip


def profile(module: torch.nn.Module, batch: int) -> list[tuple[str, int, float]]:
    """Kernels of one call: name, count, microseconds."""
    images = pictures(batch, 0)
    module(images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        module(images)
        torch.cuda.synchronize()
    rows = [(event.key[:120], event.count, float(event.self_device_time_total)) for event in record.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def pictures(batch: int, seed: int) -> torch.Tensor:
    """[batch,3,H,W] FP32, normalised as the network's processor does, on the GPU."""
    images = torch.from_numpy(example_images(batch, (SIZE[1], SIZE[0]), seed)).permute(0, 3, 1, 2).contiguous()
    return preprocess(images, SIZE).cuda()


if __name__ == "__main__":
    main()
