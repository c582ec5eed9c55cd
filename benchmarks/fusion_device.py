"""Time of the torch TSDF per 640x480 view and per 160x120 rendering, inputs on the device, a tilted wall at 2 m.

    python benchmarks/fusion_device.py --device cuda --out FILE.json [--samples 50] [--voxel 0.02]

Wall time around a synchronised call; every sample is kept in the JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fusion import plane, turned

from recon.fusion.device.tsdf import DeviceTsdfMap
from recon.fusion.tsdf import Tsdf
from recon.geometry.views import PosedDepth

K = np.array([[525.0, 0, 319.5], [0, 525, 239.5], [0, 0, 1]])
K_SMALL = np.array([[131.25, 0, 79.5], [0, 131.25, 59.5], [0, 0, 1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--voxel", type=float, default=0.02)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    fused, views = DeviceTsdfMap(Tsdf(voxel=arguments.voxel), device), posed(device)

    def integrate(i: int) -> None:
        fused.integrate(views[i % len(views)], i)

    def render(i: int) -> None:
        fused.render(K_SMALL, views[i % len(views)].T_world_cam, 160, 120)

    out: dict[str, Any] = {"device": name(device), "torch": torch.__version__, "voxel": arguments.voxel}
    for part in (integrate, render):
        out[f"{part.__name__}_ms"] = timed(part, device, arguments.samples, min(16, arguments.samples))
        p50, p95 = np.percentile(out[f"{part.__name__}_ms"], (50, 95))
        print(f"{part.__name__}: median {p50:.2f} ms, p95 {p95:.2f} ms")
    out["stats"] = fused.stats()
    arguments.out.write_text(json.dumps(out, indent=1) + "\n")


def timed(call: Callable[[int], None], device: torch.device, samples: int, warm_up: int) -> list[float]:
    """Milliseconds of each call after `warm_up` calls."""
    found = []
    for i in range(warm_up + samples):
        synchronise(device)
        start = time.perf_counter()
        call(i)
        synchronise(device)
        found.append((time.perf_counter() - start) * 1000)
    return found[warm_up:]


def posed(device: torch.device) -> list[PosedDepth]:
    views = []
    for i in range(8):
        T = turned(0.01 * i, (0.02 * i, 0.01 * i, 0.015 * i))
        depth: Any = torch.from_numpy(plane(45, K, T, 640, 480)).to(device)
        image: Any = torch.full((480, 640, 3), 128, dtype=torch.uint8, device=device)
        views.append(PosedDepth("cam", image, depth, K, T))
    return views


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
