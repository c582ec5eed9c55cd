"""Scale and shift alignment against its acceptance figures A1 to A6.

    python benchmarks/alignment.py --data DIR [--out FILE.json] [--device cpu]

With --device the fits are those of `recon.geometry.align_torch` on that device, as the stream makes them where the map
lies on a GPU: A1 to A3 one frame at a time, A5 and A6 all streams in one batch; A4 is then the wall time of a batch of
eight cameras, figures fetched, and has no bound.

DIR holds `views.npz` (depth of a fused map and of the sensor, [40,480,640] uint16 millimetres each) and `simulate.py`,
which makes the disparity of an affine-invariant network from sensor depth: random gain and shift, 5 % smooth
distortion, 1 % noise, edge bleeding, and coherent new objects in front.

Judged are static pixels (both depths there, no object, map and sensor within 0.1 m) against the oracle: least squares
of 1/z on d with weights z^2 on exactly those pixels. `median bias` is the difference of the median relative depth
error, `near/far bias` the larger difference over the nearest and farthest 10 % of depths. Streams: see `stream`.
Times are of the process's CPU, all threads together, so they hold for one core.
"""

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recon.geometry.align import AlignOptions, Fit, fit, samples, to_depth
from recon.live.align import Align, AlignResult, CameraAligner

PIXELS = 5000
STREAM_GATES = Align(min_coverage=0.0, min_span=0.5)
"""Gates of A5: at 12 % coverage the default gate on coverage would refuse every frame."""


@dataclass(frozen=True)
class Data:
    """The recording: depth of the map and of the sensor by view, [H,W] metres each (0: none), and its simulator."""

    map_m: list[np.ndarray]
    sensor_m: list[np.ndarray]
    simulate: Callable[..., tuple[np.ndarray, tuple[float, float], np.ndarray]]


@dataclass(frozen=True)
class Draw:
    """One simulated frame. disparity, map_m, sensor_m: [H,W]; static: [H,W] bool; oracle: (s, t); d, y: the sample."""

    disparity: np.ndarray
    map_m: np.ndarray
    sensor_m: np.ndarray
    static: np.ndarray
    oracle: tuple[float, float]
    d: np.ndarray
    y: np.ndarray
    rng: np.random.Generator


def load(folder: Path, views: int = 40) -> Data:
    """The first `views` views, and the simulator that lies beside them."""
    spec = importlib.util.spec_from_file_location("alignment_simulate", folder / "simulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(folder / "views.npz", allow_pickle=False) as arrays:
        maps, sensors = arrays["map_depth_mm"][:views], arrays["sensor_depth_mm"][:views]
    return Data([m / 1000 for m in maps], [s / 1000 for s in sensors], module.simulate)


def draws(data: Data, outliers: float, ghosts: float = 0.0, per_view: int = 2) -> Iterator[Draw]:
    """The documented draws; `ghosts`: share of the map covered by objects that the sensor no longer sees."""
    for view, (map_m, sensor_m) in enumerate(zip(data.map_m, data.sensor_m, strict=True)):
        for draw in range(per_view):
            rng = np.random.default_rng(1000 + view + 500 * draw)
            disparity, _, new = data.simulate(sensor_m, rng, outliers=outliers)
            seen, gone = haunted(data, map_m, ghosts, rng) if ghosts else (map_m, np.zeros(map_m.shape, bool))
            valid = (map_m > 0) & (sensor_m > 0)
            static = valid & ~new & ~gone & (np.abs(map_m - sensor_m) < 0.1)
            chosen = rng.choice(np.flatnonzero(valid), PIXELS, replace=False)
            d, y = disparity.ravel()[chosen], 1 / seen.ravel()[chosen]
            yield Draw(disparity, seen, sensor_m, static, oracle(disparity, sensor_m, static), d, y, rng)


def haunted(data: Data, map_m: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The map with objects in it that have gone, made by the simulator's own objects, and their mask."""
    d, (s, t), gone = data.simulate(map_m, rng, distortion=0, noise=0, bleed_px=0, outliers=share)
    gone &= map_m > 0
    return np.where(gone, 1 / (s * d + t), map_m), gone


def oracle(disparity: np.ndarray, sensor_m: np.ndarray, static: np.ndarray) -> tuple[float, float]:
    """(s, t) of least squares of 1/z on the disparity with weights z^2, over the static pixels."""
    d, z = disparity[static], sensor_m[static]
    s, t = np.linalg.lstsq(np.stack([d, np.ones(len(d))], 1) * z[:, None], np.ones(len(d)), rcond=None)[0]
    return float(s), float(t)


def judge(draw: Draw, found: Fit) -> dict[str, float]:
    """Biases against the oracle, as shares, and the error of s."""
    d, z = draw.disparity[draw.static], draw.sensor_m[draw.static]
    ours, best = (1 / (s * d + t) / z - 1 for s, t in ((found.s, found.t), draw.oracle))
    near, far = np.quantile(z, (0.1, 0.9))
    ends = [abs(np.median(ours[end]) - np.median(best[end])) for end in (z <= near, z >= far)]
    return {
        "median_bias": float(abs(np.median(ours) - np.median(best))),
        "near_far_bias": float(max(ends)),
        "scale_error": abs(found.s / draw.oracle[0] - 1),
    }


def batched(device: str) -> Callable[..., Fit]:
    """`fit` by `align_torch` on a device, for samples that are in random order already."""
    import torch

    from recon.geometry import align_torch as twin

    options = AlignOptions()

    def one(d: np.ndarray, y: np.ndarray, prior: tuple[float, float] | None, rng: np.random.Generator) -> Fit:
        tensors = [torch.from_numpy(np.asarray(part, np.float64)).to(device)[None] for part in (d, y, 1 / y)]
        valid = torch.ones_like(tensors[0], dtype=torch.bool)
        found = twin.Samples(*tensors, valid, valid.sum(1), torch.ones_like(tensors[0][:, 0]))
        seeds = torch.tensor([int(rng.integers(1 << 31))], device=device)
        start = torch.tensor([prior or (np.nan, np.nan)], dtype=torch.float64, device=device)
        fitted = twin.fit(found, start, twin.draw(seeds, found, options), options)
        far = torch.zeros_like(found.overlap)
        return twin.fits(twin.figures(found, fitted, far).cpu().numpy(), options, 0.0)[0]

    return one


def updates(
    aligners: list[CameraAligner], predictions: list[np.ndarray], seen: np.ndarray, frame: int, device: str
) -> list[AlignResult]:
    """One frame of each aligner, on the host or in one batch on a device."""
    if not device:
        return [one.update(prediction, seen, frame) for one, prediction in zip(aligners, predictions, strict=True)]
    import torch

    from recon.live.device_align import DeviceAligner

    maps = torch.from_numpy(np.stack([seen] * len(aligners))).to(device)
    batch = torch.from_numpy(np.stack(predictions)).to(device)
    return DeviceAligner(aligners[0]).update_all(aligners, batch, maps, [frame] * len(aligners))


def single_frames(
    data: Data, outliers: float, ghosts: float = 0.0, prior: bool = False, fitter: Callable[..., Fit] = fit
) -> list[dict[str, Any]]:
    """Fit every draw; with `prior`, from the oracle made wrong by 5 % in s and 0.02 /m in t, signs at random."""
    found = []
    for draw in draws(data, outliers, ghosts, per_view=1 if ghosts else 2):
        start = None
        if prior:
            sign = draw.rng.choice([-1, 1], 2)
            start = (draw.oracle[0] * (1 + 0.05 * sign[0]), draw.oracle[1] + 0.02 * sign[1])
        result = fitter(draw.d, draw.y, start, draw.rng)
        found.append({**judge(draw, result), "source": result.source})
    return found


def cost(data: Data, rounds: int = 3) -> dict[str, list[float]]:
    """CPU and wall time in ms of both ways to fit PIXELS pixels; 1.0 in `same` where a rerun gives the same bits."""
    found: dict[str, list[float]] = {name: [] for name in ("ransac_cpu", "ransac_wall", "prior_cpu", "prior_wall")}
    found["same"] = []
    for draw in draws(data, 0.2, per_view=1):
        near = (draw.oracle[0] * 1.05, draw.oracle[1] - 0.02)
        for name, prior in (("ransac", None), ("prior", near)):
            results = []
            for _ in range(rounds):
                rng = np.random.default_rng(7)
                wall, cpu = time.perf_counter(), time.process_time()
                results.append(fit(draw.d, draw.y, prior, rng))
                found[f"{name}_cpu"].append((time.process_time() - cpu) * 1e3)
                found[f"{name}_wall"].append((time.perf_counter() - wall) * 1e3)
            assert results[0].source == name, "the timed fit took the other way"
            found["same"].append(float(len({(r.s, r.t) for r in results}) == 1))
    return found


def cost_of_batch(data: Data, device: str, rounds: int = 30) -> dict[str, list[float]]:
    """Wall time in ms of the fits of eight cameras on a device, after two that are not counted."""
    import torch

    from recon.live.device_align import DeviceAligner

    some = [draw for draw, _ in zip(draws(data, 0.2, per_view=1), range(8), strict=False)]
    aligners = [Align().aligner(str(i), "disparity", metric=True) for i in range(len(some))]
    batch = torch.from_numpy(np.stack([draw.disparity for draw in some]).astype(np.float32)).to(device)
    maps = torch.from_numpy(np.stack([draw.map_m[2::4, 2::4] for draw in some]).astype(np.float32)).to(device)
    ours, found = DeviceAligner(aligners[0], graphs=True), []
    for k in range(rounds + 2):
        start = time.perf_counter()
        ours.update_all(aligners, batch, maps, [k] * len(some))
        found.append((time.perf_counter() - start) * 1e3)
    return {"batch_wall": found[2:]}


def stream(
    data: Data, frames: int, seed: int, coverage: float | None, options: Align, device: str = ""
) -> dict[str, list[float]]:
    """AbsRel per frame, percent, of a stream aligned by `CameraAligner` and by independent fits (`raw`).

    Each view stands for frames/views frames, with 0 to 30 % new objects and a distortion drawn anew each frame. Gain
    and shift are `constant`, `drift` (s: random walk, 1 % a frame), `jitter` (3 % each frame) or `jump` (20 % up at
    half time). coverage: share of the image in a window that wanders and outside of which the map is empty; None = all.
    Frames before the first accepted one have no scale and are left out; `accepted` is the share of frames.
    """
    rng = np.random.default_rng(seed)
    gains = _gains(rng, frames)
    aligners = {name: options.aligner(name, "disparity", metric=True) for name in gains}
    found: dict[str, list[float]] = {name: [] for name in ("raw", *gains, "accepted")}
    centre = rng.uniform(0.2, 0.8, 2)
    for k in range(frames):
        view = k * len(data.sensor_m) // frames
        sensor_m, map_m = data.sensor_m[view], data.map_m[view]
        disparity, (s, t), new = data.simulate(sensor_m, rng, outliers=rng.uniform(0, 0.3))
        centre = np.clip(centre + rng.normal(0, 0.03, 2), 0, 1)
        seen = (map_m if coverage is None else _window(map_m, centre, coverage)).astype(np.float32)
        static = np.flatnonzero((map_m > 0) & (sensor_m > 0) & ~new & (np.abs(map_m - sensor_m) < 0.1))[::10]
        inverse = s * disparity + t
        d, y, _ = samples(inverse.astype(np.float32), seen, np.random.default_rng([seed, k]), PIXELS)
        free = fit(d, y, None, np.random.default_rng([seed, k]))
        found["raw"].append(_absrel(inverse, free.s, free.t, sensor_m, static))
        predictions = {name: ((inverse + 0.1) * gain[k]).astype(np.float32) for name, gain in gains.items()}
        results = updates(list(aligners.values()), list(predictions.values()), seen, k, device)
        for (name, prediction), result in zip(predictions.items(), results, strict=True):
            if result.s is not None and result.t is not None:
                found[name].append(_absrel(prediction, result.s, result.t, sensor_m, static))
            if name == "constant":
                found["accepted"].append(float(result.accepted))
    return found


def _gains(rng: np.random.Generator, frames: int) -> dict[str, np.ndarray]:
    return {
        "constant": np.full(frames, 3.0),
        "drift": 3 * np.exp(np.cumsum(rng.normal(0, 0.01, frames))),
        "jitter": 3 * np.exp(rng.normal(0, 0.03, frames)),
        "jump": np.where(np.arange(frames) < frames // 2, 3.0, 3.6),
    }


def _window(map_m: np.ndarray, centre: np.ndarray, coverage: float) -> np.ndarray:
    """The map inside a window of the image's aspect that holds `coverage` of its pixels."""
    out = np.zeros_like(map_m)
    sizes = [round(side * coverage**0.5) for side in map_m.shape]
    rows, columns = (
        slice(start := int(c * (side - size)), start + size)
        for c, side, size in zip(centre, map_m.shape, sizes, strict=True)
    )
    out[rows, columns] = map_m[rows, columns]
    return out


def _absrel(disparity: np.ndarray, s: float, t: float, sensor_m: np.ndarray, pixels: np.ndarray) -> float:
    """Percent; depth beyond 10 m or not positive counts as 10 m."""
    depth = to_depth(disparity.ravel()[pixels].astype(np.float32), s, t, 10.0)
    z = sensor_m.ravel()[pixels]
    return float(100 * np.mean(np.abs(np.where(depth > 0, depth, 10.0) - z) / z))


def rows_single(samples_of: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, float, float]]:
    """(figure, target, measured) of A1 to A3, in percent."""

    def of(name: str, key: str, q: float) -> float:
        return float(100 * np.quantile([one[key] for one in samples_of[name]], q))

    def beyond(name: str) -> float:
        return float(100 * np.mean([one["near_far_bias"] > 0.1 for one in samples_of[name]]))

    yield "A1 20 % outliers: median bias p95, %", 2.0, of("A1_20", "median_bias", 0.95)
    yield "A1 20 %: near/far bias p95, %", 3.5, of("A1_20", "near_far_bias", 0.95)
    yield "A1 30 % outliers: median bias p95, %", 3.0, of("A1_30", "median_bias", 0.95)
    yield "A1 30 %: near/far bias p95, %", 5.0, of("A1_30", "near_far_bias", 0.95)
    yield "A1 30 %: frames beyond 10 %, %", 0.0, beyond("A1_30")
    yield "A1 30 %: scale error median, %", 4.0, of("A1_30", "scale_error", 0.5)
    yield "A1 30 %: scale error p95, %", 10.0, of("A1_30", "scale_error", 0.95)
    yield "A2 30 % ghosts + 10 % new: median bias p95, %", 2.0, of("A2", "median_bias", 0.95)
    yield "A2: frames beyond 10 %, %", 0.0, beyond("A2")
    yield "A3 prior, 50 % outliers: near/far bias p95, %", 8.0, of("A3", "near_far_bias", 0.95)
    yield "A3: frames beyond 10 %, %", 0.0, beyond("A3")


def rows_cost(times: dict[str, list[float]]) -> Iterator[tuple[str, float | None, float]]:
    """(figure, target, measured) of A4, in ms and percent."""
    if "batch_wall" in times:
        yield "A4 eight cameras: wall ms, median", None, float(np.median(times["batch_wall"]))
        return
    yield "A4 RANSAC, 5000 pixels: CPU ms, median", 6.0, float(np.median(times["ransac_cpu"]))
    yield "A4 prior, 5000 pixels: CPU ms, median", 1.5, float(np.median(times["prior_cpu"]))
    yield "A4 reruns that differ, %", 0.0, float(100 * (1 - np.mean(times["same"])))


def rows_stream(poor: list[dict[str, list[float]]], good: list[dict[str, list[float]]]) -> Iterator[Any]:
    """(figure, target, measured) of A5 (coverage 12 %) and A6 (the whole view), in percent."""

    def mean(streams: list[dict[str, list[float]]], name: str) -> float:
        return float(np.mean(np.concatenate([one[name] for one in streams])))

    yield "A5 coverage 12 %: raw AbsRel, %", None, mean(poor, "raw")
    yield "A5 coverage 12 %: frames accepted, %", None, 100 * mean(poor, "accepted")
    yield "A5 coverage 12 %, constant: AbsRel, %", 6.0, mean(poor, "constant")
    for name in ("drift", "jitter", "jump"):
        yield f"A5 coverage 12 %, {name}: AbsRel, %", None, mean(poor, name)
    yield "A6 good view: raw AbsRel, %", None, mean(good, "raw")
    for name in ("constant", "drift", "jitter", "jump"):
        yield f"A6 good view, {name}: AbsRel over raw, points", 0.1, mean(good, name) - mean(good, "raw")


def measure(data: Data, frames: int = 250, device: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows (figure, target, measured, passed) and the raw samples behind them. device: see the module; empty: host."""
    fitter = batched(device) if device else fit
    raw: dict[str, Any] = {
        "A1_20": single_frames(data, 0.2, fitter=fitter),
        "A1_30": single_frames(data, 0.3, fitter=fitter),
        "A2": single_frames(data, 0.1, ghosts=0.3, fitter=fitter),
        "A3": single_frames(data, 0.5, prior=True, fitter=fitter),
        "A4": cost_of_batch(data, device) if device else cost(data),
        "A5": [stream(data, frames, seed, 0.12, STREAM_GATES, device) for seed in (0, 1)],
        "A6": [stream(data, frames, seed, None, Align(), device) for seed in (0, 1)],
    }
    figures = [*rows_single(raw), *rows_cost(raw["A4"]), *rows_stream(raw["A5"], raw["A6"])]
    rows = [
        {"figure": name, "target": most, "measured": value, "passed": None if most is None else value <= most + 1e-9}
        for name, most, value in figures
    ]
    return rows, raw


def main() -> int:
    """Measure, print the table, write the raw samples; 1 on a miss."""
    parser = argparse.ArgumentParser(description="Alignment against its acceptance figures A1 to A6")
    parser.add_argument("--data", type=Path, required=True, help="folder with views.npz and simulate.py")
    parser.add_argument("--out", type=Path, help="JSON with the rows and the raw samples")
    parser.add_argument("--frames", type=int, default=250, help="frames of each stream of A5 and A6")
    parser.add_argument("--device", default="", help="cpu or cuda: the batched fits there instead of the host's")
    options = parser.parse_args()
    rows, raw = measure(load(options.data), options.frames, options.device)
    for row in rows:
        target = "" if row["target"] is None else f"<= {row['target']:g}"
        verdict = {None: "", True: "pass", False: "FAIL"}[row["passed"]]
        print(f"{row['figure']:<52} {target:>8} {row['measured']:>8.2f}  {verdict}")
    if options.out:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
        options.out.write_text(json.dumps({"rows": rows, "samples": raw, "environment": machine}) + "\n")
    return 0 if all(row["passed"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
