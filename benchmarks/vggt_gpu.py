"""VGGT-1B on a CUDA GPU through engine=inductor, beside plain compiled PyTorch, with errors against FP32.

    python benchmarks/vggt_gpu.py --out vggt_8.json --views 8 --modes bf16 fp8 --peer 8
    python benchmarks/vggt_gpu.py --out vggt_1.json --views 1 --modes bf16 fp8 --peer 1
    python benchmarks/vggt_gpu.py --out vggt_many.json --views 32 64 --modes bf16
    python benchmarks/vggt_gpu.py --out vggt_other.json --views 8 --modes fp16 fp8-all
    python benchmarks/vggt_gpu.py --out vggt_scores.json --views 8 1 --modes fp8 --fp8-scores
    python benchmarks/vggt_gpu.py --out vggt_int8.json --views 8 --modes int8      # the plain network, compiled whole

Each takes 1.5 to 3 minutes on a GPU host, most of it building.

Needs torch and recon's plain dependencies. Packages are built by the build stage's own code (`Inductor.build` from
network and recipe, certificate included) and measured through the session that the command line opens: a graph replay
on the session's own input buffers, and copies of the outputs. The row says which kernels it got. Weights are seeded,
so nothing is downloaded; timing does not depend on their values. Camera and depth heads, 518x518, inputs on the GPU
before the clock starts, CUDA events, warm-up 10, 50 samples (10 from 64 views on), raw samples in the JSON, which is
written after every row. FP8
ranges come from other images than the measured ones. The peer is the plain network under BF16 autocast through
torch.compile, in the same run. `host_ms` also holds the copies from and to pinned host memory; `spaced_ms` is the
median of 50 calls with 0.1 s of idling before each, which the card's power limit does not slow down. Peak memory is
that of the session alone; one beyond `ALLOWED` ends the run with an error, one beyond twice `expected_gib` is noted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import (
    SAMPLES,
    WARMUP,
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

from recon.engines.inductor import Inductor
from recon.models.nets.config import PRESETS
from recon.models.vggt import VGGT
from recon.network import Network

MANY = 64  # views of which a call takes seconds: fewer samples, and no reference
TFLOP = {1: 3.35, 2: 7.07, 4: 15.6, 8: 37.18, 16: 98.1, 32: 291.0, 64: 963.0}
ALLOWED = {1: 6.0, 8: 6.0, 64: 40.0}  # GiB
TOKENS, PIXELS, CHUNK = 1374, 518 * 518, 8


def main() -> None:
    """Measure what the arguments ask for; print a row and write the JSON as each is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--modes", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--peer", type=int, nargs="*", default=[])
    parser.add_argument("--profile", type=int, nargs="*", default=[])
    parser.add_argument("--kernels", default="auto", help="engine.kernels")
    parser.add_argument("--fp8-scores", action="store_true", help="engine.fp8_scores, in the modes with FP8 layers")
    parser.add_argument("--preset", default="vggt-1b", help="another is only good for trying the script")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    record = machine()
    if arguments.golden:
        record["parity_rel_l2"] = parity(arguments.golden)
        print("parity, FP32 against golden:", {k: f"{v:.1e}" for k, v in record["parity_rel_l2"].items()})
    shared = Shared(network_of(arguments.preset, 1))
    over = []
    for views in dict.fromkeys([*arguments.views, *arguments.peer]):
        network = shared.at(network_of(arguments.preset, views))
        wanted = reference(network, "cuda") if views < MANY else []
        for mode in arguments.modes if views in arguments.views else []:
            row = measure(network, mode, wanted, arguments)
            note(record, row, arguments.out)
            if row["peak_gib"] > ALLOWED.get(views, 80.0):
                over.append(f"{views} views {mode}: {row['peak_gib']:.1f} GiB")
        if views in arguments.peer:
            note(record, peer(network, wanted, arguments.samples), arguments.out)
    if over:
        sys.exit(f"more memory than allowed: {'; '.join(over)}")


def network_of(preset: str, views: int) -> Network:
    """As `model=vggt-1b model.views=N model.weights=seeded:0` has it."""
    return VGGT(name="vggt", preset=preset, weights="seeded:0", height=518, width=518).network(views)


def measure(network: Network, mode: str, wanted: list[np.ndarray], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: a session as engine=inductor opens it."""
    views = network.inputs["images"].shape[0]
    scores = arguments.fp8_scores and mode.startswith("fp8")
    engine = Inductor(name="inductor", device="cuda", kernels=arguments.kernels, fp8_scores=scores)
    asked = recipe(network, mode, "cuda")
    with tempfile.TemporaryDirectory() as folder, session(network, asked, engine, Path(folder)) as (running, facts):
        feeds = filled(running, network.example(0))
        clear()
        found = [value.float().cpu().numpy() for value in running.infer(feeds).values()]
        count, warmup = (arguments.samples, WARMUP) if views < MANY else (10, 3)
        samples = timed(lambda: running.infer(feeds), count, warmup=warmup)
        row = {"views": views, "mode": mode} | percentiles(samples) | facts
        row |= {"peak_gib": peak_gib(), "expected_gib": expected_gib(views, mode)}
        row["tflops"] = TFLOP.get(views, 0.0) / row["p50_ms"] * 1e3
        row |= errors(network.outputs, found, wanted)
        host = {name: value.cpu().pin_memory() for name, value in feeds.items()}
        back = [torch.from_numpy(value).pin_memory() for value in found]

        def through_host() -> None:
            for target, output in zip(back, running.infer(host).values(), strict=True):
                target.copy_(output, non_blocking=True)

        spaced = timed(lambda: running.infer(feeds), arguments.samples if views <= 8 else 12, 0.1, warmup)
        row |= {"spaced_ms": float(np.percentile(spaced, 50)), "spaced_samples_ms": spaced}
        row["host_ms"] = float(np.percentile(timed(through_host, 10, warmup=warmup), 50))
        if views in arguments.profile:
            row["profile"] = profile(lambda: running.infer(feeds))
    return row


def expected_gib(views: int, mode: str) -> float:
    """Peak memory from the sizes of what lives at once, which shows which part grows and what has to be cut in parts.

    Per token, in units of 1024 channels: residual stream and its tapped copy 4 bytes each, four taps of both heads' 4
    bytes, and in a block query, key, value (6), their rotated copies (4), attention's and the projection's output, the
    norm (2 each) and twice the hidden layer (2 x 8): 50 bytes at most, though never all of it. Frames of a dense head
    go through in chunks of `CHUNK`, of which four maps of 256 channels at half size and two of 128 at full size live.
    Nothing else grows with the frames but images and outputs; so only the dense head needs chunks, up to hundreds of
    frames. The weights of VGGT-1B: 906 million in the blocks, 217 in the camera head, 33 in the dense head.
    """
    low = 1 if mode.startswith("fp8") else 2
    weights = 906e6 * low + 217e6 * 2 + 33e6 * 2
    tokens = views * TOKENS * 1024 * 50
    chunk = min(views, CHUNK) * (4 * 256 * 296 * 296 + 2 * 128 * PIXELS) * 2
    ends = views * PIXELS * 4 * (2 * 3 + 3 * 2)
    return (weights + max(tokens, views * TOKENS * 1024 * 24 + chunk) + ends) / 2**30


def peer(network: Network, wanted: list[np.ndarray], samples: int) -> dict[str, Any]:
    """The plain network as a user would run it: BF16 autocast, torch.compile, CUDA graphs for few views."""
    module, views = network.load().cuda(), network.inputs["images"].shape[0]
    images = network.example(0)["images"].cuda()
    clear()
    compiled = torch.compile(module, fullgraph=True, mode="default" if views > 4 else "reduce-overhead")

    def call() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return compiled(images)  # type: ignore[no-any-return]

    row = {"views": views, "mode": "peer"} | percentiles(timed(call, samples)) | {"peak_gib": peak_gib()}
    row |= errors(network.outputs, [output.float().cpu().numpy() for output in call()], wanted)
    torch.compiler.reset()
    return row


def note(record: dict[str, Any], row: dict[str, Any], out: Path) -> None:
    """Keep a row, write the file, print the line."""
    record["latency"].append(row)
    out.write_text(json.dumps(record, indent=1) + "\n")
    told = "  ".join(f"{name.removesuffix('_rel_l2')} {row[name]:.1e}" for name in row if name.endswith("_rel_l2"))
    extra = ""
    if "kernels" in row:
        extra = f"  {row['kernels']['effective']} {row['verdict']}  spaced {row['spaced_ms']:.2f}"
        extra += f" host {row['host_ms']:.2f} ms  built {row['build_seconds']:.0f} s"
        if row["peak_gib"] > 2 * row["expected_gib"]:
            extra += f"  MEMORY: {row['expected_gib']:.1f} GiB expected"
    times = f"p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms  peak {row['peak_gib']:5.2f} GiB"
    print(f"{row['views']:3d} views  {row['mode']:8s} {times}  {told}{extra}  {row['clocks']}", flush=True)


def profile(call: Any) -> list[tuple[str, int, float]]:
    """Kernels of one call: name, count, microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    rows = [(event.key[:120], event.count, float(event.self_device_time_total)) for event in record.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def parity(golden: Path) -> dict[str, float]:
    """Relative L2 of every output of the full network in true FP32 on the GPU."""
    from recon.models.nets.vggt import build

    with np.load(golden, allow_pickle=False) as data:
        images, wanted = data["images"], {name: data[name] for name in data.files}
    network = build(PRESETS["vggt-1b"], ("camera", "depth", "points"), images.shape[-2:], seed=0).cuda()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images).reshape(-1, *images.shape[-3:]).cuda())
    names = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
    return errors(names, [output.cpu().numpy() for output in outputs], [wanted[name] for name in names])


if __name__ == "__main__":
    main()
