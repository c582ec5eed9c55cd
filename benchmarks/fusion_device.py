"""Time of the maps in torch operations beside the compiled ones on the host: one 640x480 view, four at once, and one
160x120 rendering, of a tilted wall at 2 m.

    python benchmarks/fusion_device.py --device cuda --out FILE.json [--samples 50] [--voxel 0.02] [--maps surfel,tsdf]

The device map gets tensors that lie there, the host's gets NumPy arrays. Wall time around a synchronised call, host and
device in turn; every sample is kept in the JSON, the ratio is of medians. Where the host map cannot run, the reason
stands in its place (no open3d).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import device_name
from fusion import VGA, VGA_SMALL, plane, turned

from recon.errors import ReconError
from recon.fusion import Map
from recon.fusion.device.surfels import DeviceSurfelMap
from recon.fusion.device.tsdf import DeviceTsdfMap
from recon.fusion.surfel import Surfel
from recon.fusion.tsdf import Tsdf
from recon.geometry.views import PosedDepth

BATCH = 4


def main() -> None:
    """Compare the maps that are asked for; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--voxel", type=float, default=0.02)
    parser.add_argument("--maps", default="tsdf,surfel")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    out: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "voxel": arguments.voxel}
    for kind in arguments.maps.split(","):
        out[kind] = compared(kind, arguments.voxel, device, arguments.samples)
        arguments.out.write_text(json.dumps(out, indent=1) + "\n")


def compared(kind: str, voxel: float, device: torch.device, samples: int) -> dict[str, Any]:
    """Samples, sizes and ratios of one representation on the device and on the host."""
    option: Tsdf | Surfel = {"tsdf": Tsdf, "surfel": Surfel}[kind](voxel=voxel)
    made: Map = DeviceTsdfMap(option, device) if isinstance(option, Tsdf) else DeviceSurfelMap(option, device)
    maps, views, out = {"device": made}, {"device": [on(view, device) for view in posed()]}, dict[str, Any]()
    try:
        maps["host"], views["host"] = option.create(), posed()
    except ReconError as error:
        out["host"] = str(error)
    for part, call in PARTS.items():
        found = timed(call, maps, views, device, samples, warm_up=min(16, samples))
        for where, values in found.items():
            out.setdefault(where, {})[f"{part}_ms"] = values
            p50, p95 = np.percentile(values, (50, 95))
            print(f"{kind:6} {part:13} {where:6} median {p50:8.2f} ms, p95 {p95:8.2f} ms")
        if len(found) == 2:
            out[f"{part}_device_over_host"] = float(np.median(found["device"]) / np.median(found["host"]))
            print(f"{kind:6} {part:13} device / host {out[f'{part}_device_over_host']:.2f}")
    for where, found in maps.items():
        out[where]["stats"] = found.stats()
    return out


def integrate(fused: Map, views: list[PosedDepth], i: int) -> None:
    """One view into the map."""
    fused.integrate(views[i % len(views)], i)


def integrate_four(fused: Map, views: list[PosedDepth], i: int) -> None:
    """Four views into the map in one call, as a batch of cameras."""
    fused.integrate_all([views[(i + n) % len(views)] for n in range(BATCH)], i)


def render(fused: Map, views: list[PosedDepth], i: int) -> None:
    """To where the map lies: a tensor from the device, an array from the host."""
    call = fused.render_depth if fused.device is None else fused.render
    call(VGA_SMALL, views[i % len(views)].T_world_cam, 160, 120)


PARTS: dict[str, Callable[[Map, list[PosedDepth], int], None]] = {
    "integrate": integrate, "integrate_four": integrate_four, "render": render,
}  # fmt: skip


def timed(
    call: Callable[[Map, list[PosedDepth], int], None],
    maps: dict[str, Map],
    views: dict[str, list[PosedDepth]],
    device: torch.device,
    samples: int,
    warm_up: int,
) -> dict[str, list[float]]:
    """Milliseconds of each call on every map, in turn, after `warm_up` rounds."""
    found: dict[str, list[float]] = {where: [] for where in maps}
    for i in range(warm_up + samples):
        for where, fused in maps.items():
            synchronise(device)
            start = time.perf_counter()
            call(fused, views[where], i)
            synchronise(device)
            found[where].append((time.perf_counter() - start) * 1000)
    return {where: values[warm_up:] for where, values in found.items()}


def posed() -> list[PosedDepth]:
    """Eight exact 640x480 views of the wall from poses a few centimetres apart."""
    grey = np.full((480, 640, 3), 128, np.uint8)
    poses = [turned(0.01 * i, (0.02 * i, 0.01 * i, 0.015 * i)) for i in range(8)]
    return [PosedDepth("cam", grey, plane(45, VGA, T, 640, 480), VGA, T) for T in poses]


def on(view: PosedDepth, device: torch.device) -> PosedDepth:
    """The view with its images as tensors of the device."""
    depth: Any = torch.from_numpy(view.depth).to(device)
    image: Any = torch.from_numpy(view.image).to(device)
    return replace(view, depth=depth, image=image)


def synchronise(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
