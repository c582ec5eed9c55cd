"""The live loop with everything on the GPU: cameras in real time, latency from frame to fused map, time of every stage.

    python benchmarks/live_gpu.py prepare --frames DIR                       # anywhere: renders and writes a recording
    python benchmarks/live_gpu.py run --frames DIR --out FILE.json           # 8 cameras, 640x480, 30 frames/s, 60 s
    python benchmarks/live_gpu.py run ... --engine tensorrt --plan FILE      # or inductor with its package
    python benchmarks/live_gpu.py run ... --device cpu --fps 2 --seconds 5 --architecture twin --input 56 56

Static cameras in a rendered room with moving objects; every camera gives a frame at every tick, and the newest wins:
what is not taken is dropped and counted. Images are decoded before the clock starts (`--decode` puts that into the
loop); from then on the loop is that of `recon.live`: one copy in, depth, reference, alignment, moving things, fusion.
`latency_ms` counts from the tick to the moment at which the frame is in the map and its figures are on the host. The
stream gets ready before its clock starts, as runs of the command line do (`warm_up_s`); --cold leaves that out.

--depth network+oracle (the default): the network (Depth Anything V2, seeded weights) runs on every image and is waited
for, but its answer, which means nothing, is put aside; handed on is the scene's own depth as disparity of unknown gain
and shift, new in every frame. --depth da-mini: the small trained network of this repository, whose own answer is used.
The JSON says which, and keeps every sample. Needs torch, numpy, opencv, numba and transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import host
from live_gpu_scene import Playback, Recording, read, record
from torch import Tensor

from recon.depth import Depth
from recon.depth.depth_anything import DepthAnything
from recon.engines import Session
from recon.fusion import Map
from recon.fusion.device.tsdf import DeviceTsdfMap
from recon.fusion.tsdf import Tsdf
from recon.geometry.views import DepthImage, View
from recon.live.align import Align
from recon.live.pool import DepthAnythingPool
from recon.live.stream import FrameResult, Streamer, StreamOptions
from recon.live.warmup import warm_up
from recon.models.recorded import Recorded
from recon.network import TensorSpec

TARGET_MS = 66.0
PARTS = ("read", "wait", "depth", "render", "align", "fuse")
ORACLE = "the scene's own depth as disparity, gain and shift unknown and new in every frame"


class OwnSession(Session):
    """The network in this process: on CUDA `to_inference` in FP16 (`mini`: FP32) as one CUDA graph, elsewhere as is."""

    def __init__(self, module: torch.nn.Module, batch: int, size: tuple[int, int], device: torch.device) -> None:
        self.inputs = {"pixel_values": TensorSpec((batch, 3, *size))}
        self.outputs = {"disparity": TensorSpec((batch, *size))}
        self.device = str(device)
        self._call: Any = module
        if device.type == "cuda":
            from recon.kernels.graphs import Captured

            self._call = Captured(module, torch.zeros((batch, 3, *size), device=device))

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"disparity": self._call(feeds["pixel_values"])[0].clone()}

    def memory_mib(self) -> float:
        return 0.0

    def close(self) -> None:
        self._call = None


@dataclass
class WithOracle(Depth):
    """A network that is run for its time, and depth that is right up to a gain and a shift of each frame.

    inverse: [C,frames,H,W] float32, 1/z of the recording on the device.
    """

    network_depth: DepthAnything | None = None
    inverse: Tensor | None = None
    recording: Recording | None = None

    def predict(self, view: View, session: Session | None) -> DepthImage:
        raise AssertionError("this benchmark has its images on a device")

    def predict_all(self, views: list[View], images: Tensor, session: Session | None) -> Tensor:
        """The scene's disparity; whatever the network found waits in the same stream, and is then dropped."""
        assert self.network_depth is not None
        assert self.inverse is not None
        assert self.recording is not None
        if session is not None:
            self.network_depth.predict_all(views, images, session)
        parts = []
        for view in views:
            rng = np.random.default_rng([int(view.camera[3:]), view.frame])
            gain, shift = float(np.exp(rng.uniform(-1, 1))), float(rng.uniform(-0.1, 0.3))
            shown = self.recording.played(view.frame - 1)
            parts.append((self.inverse[int(view.camera[3:]), shown] - shift) * gain)
        return torch.stack(parts)


def network_of(arguments: argparse.Namespace) -> DepthAnything:
    """The depth network at the size that is asked for; side and aspect are handed over as they are."""
    if arguments.depth == "da-mini":
        return DepthAnything(
            name="da-mini", weights="packaged:da-mini", architecture="mini", input_size=168, image_size=[320, 240]
        )
    height, width = arguments.input
    return DepthAnything(
        name=f"da2-{arguments.architecture}", weights="seeded:0", architecture=arguments.architecture,
        input_size=height, image_size=[width, height],
    )  # fmt: skip


def session_of(arguments: argparse.Namespace, network: DepthAnything, device: torch.device) -> Session | None:
    """The engine that runs the network; None with --depth oracle."""
    if arguments.depth == "oracle":
        return None
    if arguments.engine == "tensorrt":
        from recon.engines.tensorrt import TensorRT

        flavour = {"flavour": arguments.flavour, "allow_host_code": True}
        return TensorRT(name="tensorrt", **flavour).load(arguments.plan)
    if arguments.engine == "inductor":
        from recon.engines.inductor import Inductor

        return Inductor(name="inductor", device=str(device)).load(arguments.plan)
    module = network.network().load().to(device)
    if device.type == "cuda" and arguments.depth != "da-mini":
        module = module.to_inference(torch.float16)  # type: ignore[operator]
    return OwnSession(module, arguments.batch or arguments.cameras, network.size(), device)


def depth_of(
    arguments: argparse.Namespace, network: DepthAnything, recording: Recording, device: torch.device
) -> Depth:
    """What the stream takes for depth."""
    if arguments.depth == "da-mini":
        return network
    depth = torch.from_numpy(recording.depth).to(device)
    inverse = torch.where(depth > 0, 1 / depth, torch.nan)
    return WithOracle(name="oracle", network_depth=network, inverse=inverse, recording=recording)


def map_of(arguments: argparse.Namespace, device: torch.device) -> Map:
    """An empty map on the device, of the representation that is asked for."""
    if arguments.fusion == "tsdf":
        return DeviceTsdfMap(Tsdf(voxel=arguments.voxel), device)
    from recon.fusion.device.surfels import DeviceSurfelMap
    from recon.fusion.surfel import Surfel

    return DeviceSurfelMap(Surfel(voxel=arguments.voxel), device)


@dataclass
class Streamed:
    """What one stream gave: time that it took to get ready, latency by batch from the tick, and all frame rows."""

    warm_up_s: float
    latency_ms: list[float]
    rows: list[dict[str, Any]]
    source: Playback
    streamer: Streamer
    seconds: float


def stream(
    arguments: argparse.Namespace, recording: Recording, depth: Depth, pool: DepthAnythingPool, seconds: float
) -> Streamed:
    """Bootstrap two maps from the empty room and stream for so long."""
    source = Playback(name="playback", recording=recording, fps=arguments.fps, seconds=seconds)
    bootstrap = Recorded(name="recorded").bootstrap(source.bootstrap(), source.scale(), None)
    device = torch.device(arguments.device)
    fused, anchor = map_of(arguments, device), map_of(arguments, device)
    for made in (fused, anchor):
        made.integrate_all(bootstrap.views, 0)
    rows: list[dict[str, Any]] = []
    latency: list[float] = []
    align = Align(render_width=arguments.render_width)
    options = StreamOptions(ahead=arguments.ahead, cuda_graph=arguments.graph)
    streamer = Streamer(source, depth, pool, bootstrap, fused, anchor, align, options)

    def observe(frame: FrameResult) -> None:
        rows.append(frame.row())

    ready_s = 0.0 if arguments.cold else warm_up(streamer, partial(map_of, arguments, device))
    start = time.perf_counter()
    for step in streamer.run(observe):
        latency.append((time.perf_counter() - source.due[step]) * 1e3)
    return Streamed(ready_s, latency, rows, source, streamer, time.perf_counter() - start)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything for the JSON."""
    device = torch.device(arguments.device)
    recording = read(arguments.frames, decode=not arguments.decode)
    arguments.cameras = len(recording.K)
    network = network_of(arguments)
    depth = depth_of(arguments, network, recording, device)
    waiting = max(2, arguments.ahead) * arguments.cameras
    with DepthAnythingPool(
        partial(session_of, arguments, network, device), workers=arguments.workers, waiting=waiting,
        predict=depth.predict, predict_all=depth.predict_all,
    ) as pool:  # fmt: skip
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found = stream(arguments, recording, depth, pool, arguments.seconds)
        profiled = profile(arguments, recording, depth, pool) if arguments.profile else {}
        taken = pool.batch
    return {**machine(device), **settings(arguments, network, recording, taken), **figures(found, device), **profiled}


def profile(
    arguments: argparse.Namespace, recording: Recording, depth: Depth, pool: DepthAnythingPool
) -> dict[str, Any]:
    """Calls and device time per batch of a short stream of its own, which is slower than the measured one."""
    cuda = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cuda]) as seen:
        found = stream(arguments, recording, depth, pool, min(arguments.profile, arguments.seconds))
    batches = max(1, found.streamer.batches)
    on_device = cuda == torch.profiler.ProfilerActivity.CUDA
    rows = [
        (event.key[:120], event.count / batches,
         (event.self_device_time_total if on_device else event.self_cpu_time_total) / batches)
        for event in seen.key_averages()
    ]  # fmt: skip
    rows.sort(key=lambda row: -row[2])
    return {
        "profile": {
            "batches": batches, "calls_per_batch": sum(row[1] for row in rows),
            "us_per_batch": sum(row[2] for row in rows),
            "rows": [{"name": name, "calls": calls, "us": us} for name, calls, us in rows[:60]],
        }
    }  # fmt: skip


def figures(found: Streamed, device: torch.device) -> dict[str, Any]:
    """Latency, drops and stage times of a stream, with all samples."""
    first: dict[int, dict[str, Any]] = {}
    for row in found.rows:  # with all cameras at once, a part's time is that of the batch
        first.setdefault(row["frame"], row)
    parts = {part: [row.get(f"ms_{part}", float("nan")) for row in first.values()] for part in PARTS}
    parts["latency_from_arrival"] = [row["ms_latency"] for row in first.values()]
    accepted = sum(row["accepted"] for row in found.rows)
    streamer, reached = found.streamer, percentiles(found.latency_ms)
    dropped = found.source.dropped + streamer.dropped_late
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {
        "batches": streamer.batches, "frames": len(found.rows), "frames_fused": accepted,
        "rejected": dict(Counter(row["reason"] for row in found.rows if not row["accepted"])),
        "dropped": found.source.dropped, "dropped_late": streamer.dropped_late, "stream_s": found.seconds,
        "warm_up_s": found.warm_up_s, "target": {"dropped": 0, "latency_p95_ms": TARGET_MS},
        "target_reached": dropped == 0 and reached.get("p95", float("inf")) <= TARGET_MS,
        "latency_ms": reached, "ms": {part: percentiles(values) for part, values in parts.items()},
        "map": streamer.fused.stats(), "peak_memory_mib": memory, "stream": streamer.report(),
        "latency_samples_ms": [round(value, 3) for value in found.latency_ms],
        "samples_ms": {part: [round(value, 3) for value in values] for part, values in parts.items()},
    }  # fmt: skip


def settings(arguments: argparse.Namespace, network: DepthAnything, recording: Recording, taken: int) -> dict[str, Any]:
    """What was run."""
    height, width = recording.depth.shape[2:4]
    ran = {"network": network.name, "weights": network.weights, "input": list(network.size()), "images_at_once": taken}
    return {
        "cameras": len(recording.K), "size": [width, height], "recorded_frames": recording.frames, "fps": arguments.fps,
        "seconds": arguments.seconds, "cold": arguments.cold, "decode_in_loop": arguments.decode,
        "engine": None if arguments.depth == "oracle" else arguments.engine,
        **(ran if arguments.depth != "oracle" else {}),
        "depth_handed_on": "the network's own" if arguments.depth == "da-mini" else ORACLE,
        "fusion": arguments.fusion, "voxel_m": arguments.voxel, "render_width": arguments.render_width,
        "workers": arguments.workers, "ahead": arguments.ahead, "cuda_graph": arguments.graph,
    }  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    found = {**host(device), "python": platform.python_version(), "numpy": np.__version__}
    if device.type == "cuda":
        import triton

        found["triton"] = triton.__version__
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99, max and mean; empty where there is nothing."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return {}
    p50, p95, p99 = np.percentile(finite, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": max(finite), "mean": float(np.mean(finite))}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("what", choices=("prepare", "run"))
    found.add_argument("--frames", type=Path, required=True, help="folder of the recording")
    found.add_argument("--out", type=Path, help="JSON of a run")
    found.add_argument("--device", default="cuda")
    found.add_argument("--fps", type=float, default=30.0)
    found.add_argument("--seconds", type=float, default=60.0)
    found.add_argument("--cold", action="store_true", help="leave out what a run does to be ready for its first frame")
    found.add_argument("--cameras", type=int, default=8, help="prepare: cameras to render")
    found.add_argument("--size", type=int, nargs=2, default=(640, 480), help="prepare: width and height")
    found.add_argument("--recorded", type=int, default=12, help="prepare: frames of each camera, played to and fro")
    found.add_argument("--moving", type=int, default=5, help="prepare: moving objects")
    found.add_argument("--depth", choices=("network+oracle", "da-mini", "oracle"), default="network+oracle")
    found.add_argument("--engine", choices=("torch", "inductor", "tensorrt"), default="torch")
    found.add_argument("--plan", type=Path, help="plan of tensorrt, package of inductor")
    found.add_argument("--flavour", default="tensorrt", help="module of TensorRT")
    found.add_argument("--architecture", default="small")
    found.add_argument("--input", type=int, nargs=2, default=(518, 518), help="height and width of the network's input")
    found.add_argument("--batch", type=int, default=0, help="engine=torch: images an inference; 0 = all cameras")
    found.add_argument("--workers", type=int, default=1)
    found.add_argument("--ahead", type=int, default=2)
    found.add_argument("--decode", action="store_true", help="decode JPEG in the loop")
    found.add_argument("--profile", type=float, default=0.0, metavar="SECONDS", help="also profile a stream this long")
    found.add_argument("--no-graph", dest="graph", action="store_false", help="launch the fits one operation at a time")
    found.add_argument("--fusion", choices=("tsdf", "surfel"), default="tsdf")
    found.add_argument("--voxel", type=float, default=0.02)
    found.add_argument("--render-width", type=int, default=160)
    return found


def main() -> int:
    """Write a recording, or stream one and write the JSON."""
    arguments = parser().parse_args()
    if arguments.what == "prepare":
        size = (arguments.size[0], arguments.size[1])
        count = record(
            arguments.frames, arguments.cameras, size, arguments.recorded, arguments.fps, arguments.moving,
            arguments.device if torch.cuda.is_available() else "cpu",
        )  # fmt: skip
        print(f"{arguments.frames}: {count / 1e6:.1f} MB")
        return 0
    found = run(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    say(found)
    return 0


def say(found: dict[str, Any]) -> None:
    """The figures in a few lines."""
    latency = found["latency_ms"]
    print(f"{found['device']}, torch {found['torch']}: {found['cameras']} cameras at {found['fps']:g} frames/s")
    print(
        f"{found['batches']} batches, {found['frames_fused']} of {found['frames']} frames fused, dropped "
        f"{found['dropped']} and {found['dropped_late']} late"
    )
    first = ", ".join(f"{value:.1f}" for value in found["latency_samples_ms"][:4])
    print(f"ready after {found['warm_up_s']:.2f} s, first batches {first} ms")
    print("latency ms: " + ", ".join(f"{name} {value:.1f}" for name, value in latency.items()))
    for part, values in found["ms"].items():
        print(f"{part:20s} " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))


if __name__ == "__main__":
    sys.exit(main())
