"""Depth Anything V2 on a CUDA GPU through engine=inductor, beside plain compiled PyTorch, with errors against FP32.

    python benchmarks/depth_gpu.py --out depth.json --modes fp16 bf16 peer peer-bf16
    python benchmarks/depth_gpu.py --out depth_fp8.json --modes fp8-fp16 --sizes small base
    python benchmarks/depth_gpu.py --out depth_8.json --modes fp8 bf16 peer --sizes base large --batches 8

Needs torch and transformers. Sessions, errors and timing as in `vggt_gpu`. Seeded weights, 518x518, raw samples in the
JSON, which is written after every row. The peer is the plain network under FP16 (or BF16) autocast through
torch.compile with CUDA graphs, in the same run. A batch is a network of that many images (`depth.batch` on the command
line).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import (
    SAMPLES,
    Shared,
    clear,
    errors,
    filled,
    machine,
    peak_gib,
    percentiles,
    recipe,
    reference,
    session,
    timed,
)

from recon.depth.depth_anything import DepthAnything
from recon.engines.inductor import Inductor
from recon.network import Network, TensorSpec

PEERS = {"peer": torch.float16, "peer-bf16": torch.bfloat16}


def main() -> None:
    """Measure what the arguments ask for; print a row and write the JSON as each is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", default=["small", "base", "large"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--modes", nargs="*", default=["fp16", "bf16", "peer", "peer-bf16"])
    parser.add_argument("--kernels", default="auto", help="engine.kernels")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    record = machine()
    for size in arguments.sizes:
        shared = Shared(network_of(size, 1))
        for batch in arguments.batches:
            network = shared.at(network_of(size, batch))
            wanted = reference(network, "cuda")
            for mode in sorted(arguments.modes, key=lambda mode: mode in PEERS):  # they take hooks off the module
                act = peer if mode in PEERS else measure
                found = act(network, mode, wanted, arguments)
                note(record, {"size": size, "batch": batch, "mode": mode} | found, arguments.out)
        torch.compiler.reset()
        clear()


def network_of(size: str, batch: int) -> Network:
    """As `depth=da2-<size> depth.weights=seeded:0 depth.image_size=[1,1]` has it, for a batch of images."""
    option = DepthAnything(name=f"da2-{size}", architecture=size, weights="seeded:0", image_size=[1, 1])
    found = option.network()
    shape = (batch, *found.inputs["pixel_values"].shape[1:])

    def example(seed: int) -> dict[str, torch.Tensor]:
        images = [found.example(1000 * seed + i)["pixel_values"] for i in range(batch)]
        return {"pixel_values": torch.cat(images)}

    name = f"{option.name}-{'x'.join(map(str, shape))}"
    return replace(found, name=name, inputs={"pixel_values": TensorSpec(shape)}, example=example)


def measure(network: Network, mode: str, wanted: list[np.ndarray], arguments: argparse.Namespace) -> dict[str, Any]:
    """A session as engine=inductor opens it."""
    engine = Inductor(name="inductor", device="cuda", kernels=arguments.kernels)
    asked = recipe(network, mode, "cuda")
    with tempfile.TemporaryDirectory() as folder, session(network, asked, engine, Path(folder)) as (running, facts):
        feeds = filled(running, network.example(0))
        clear()
        found = [value.float().cpu().numpy() for value in running.infer(feeds).values()]
        samples = timed(lambda: running.infer(feeds), arguments.samples)
        return percentiles(samples) | {"peak_gib": peak_gib()} | errors(["depth"], found, wanted) | facts


def peer(network: Network, mode: str, wanted: list[np.ndarray], arguments: argparse.Namespace) -> dict[str, Any]:
    """The plain network as a user would run it. Hooks that record outputs, which no one asked for and torch.compile
    cannot trace, are taken off."""
    module = network.load().cuda()
    for part in module.modules():
        part._forward_hooks.clear()
    inputs = [value.cuda() for value in network.example(0).values()]
    clear()
    compiled = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def call() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), torch.autocast("cuda", PEERS[mode]):
            return compiled(*inputs)  # type: ignore[no-any-return]

    samples = timed(call, arguments.samples)
    found = [output.float().cpu().numpy() for output in call()]
    return percentiles(samples) | {"peak_gib": peak_gib()} | errors(["depth"], found, wanted)


def note(record: dict[str, Any], row: dict[str, Any], out: Path) -> None:
    """Keep a row, write the file, print the line."""
    record["latency"].append(row)
    out.write_text(json.dumps(record, indent=1) + "\n")
    kernels = f"  {row['kernels']['effective']} {row['verdict']}" if "kernels" in row else ""
    times = f"p50 {row['p50_ms']:7.3f} ms  p99 {row['p99_ms']:7.3f} ms  {row['p50_ms'] / row['batch']:6.3f} ms an image"
    what = f"{row['size']:6s} {row['mode']:9s} batch {row['batch']:2d}"
    print(f"{what}  {times}  rel-L2 {row['depth_rel_l2']:.1e}{kernels}  {row['clocks']}", flush=True)


if __name__ == "__main__":
    main()
