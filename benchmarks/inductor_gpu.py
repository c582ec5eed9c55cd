"""engine=inductor engine.kernels=inductor on a GPU: packages of every format built, certified, compared with FP32 and
timed. Needs torch alone. Packages of recon's own kernels are measured by `vggt_gpu` and `depth_gpu`.

    python benchmarks/inductor_gpu.py --out inductor_gpu.json [--networks da-small vggt-mini vggt-twin] [--modes ...]
                                      [--jobs 6] [--autotune] [--samples 50] [--device cuda]

Packages are built at once in `--jobs` processes (compiling keeps CPU cores busy, hardly the GPU), then opened and timed
one after another: inputs on the device before the clock starts, CUDA events, warm-up 10, raw samples in the JSON, which
is written after every row. Errors are relative L2 against eager FP32 without TF32 on the same device, on inputs that
calibration did not see. `da-small` is the published architecture of Depth Anything V2 Small with seeded weights: its
times are those of the model, its errors are not. Weight-only formats are rounded by the script itself, in the layouts
of bitsandbytes, which need not be there. Eager PyTorch is timed beside each network, as it comes (`torch-fp32`) and
under autocast in a CUDA graph (`torch-<format>-graph`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import call_ms, host, largest_inputs
from torch import Tensor

from recon.artifact import obtain
from recon.compare import compare
from recon.engines import Build, Session
from recon.engines.inductor import Inductor
from recon.engines.torch import Torch
from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight, Ranges, Recipe
from recon.lowbit.support import full_fp32
from recon.network import Network
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quant.none import NoQuant
from recon.quant.torch_dynamic import TorchDynamic
from recon.quantise import make_recipe

WARMUP = 10
CALIBRATION_SEEDS, ERROR_SEEDS = range(100, 104), range(200, 203)
NF4 = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@dataclass
class Rounded(QuantMode):
    """Weight-only INT8 per channel and NF4 in blocks of 64, rounded to nearest."""

    format: str = "int8"

    def layer_format(self) -> LayerFormat:
        return LayerFormat("int8") if self.format == "int8" else LayerFormat("nf4", block=64)

    def why_not(self, layer: LayerInfo) -> str:
        return "not whole blocks" if self.format == "nf4" and layer.in_features % 64 else ""

    def quantise(self, weight: Tensor, layer: LayerInfo) -> QuantizedWeight:
        if self.format == "int8":
            scale = weight.abs().amax(1).clamp_min(1e-12) / 127
            return QuantizedWeight(self.layer_format(), (weight / scale[:, None]).round().to(torch.int8), scale)
        book, blocks = torch.tensor(NF4), weight.reshape(weight.shape[0], -1, 64)
        scale = blocks.abs().amax(-1).clamp_min(1e-12)
        codes = torch.bucketize(blocks / scale[..., None], (book[1:] + book[:-1]) / 2).to(torch.uint8)
        return QuantizedWeight(self.layer_format(), codes.reshape(weight.shape), scale, codebook=book)


MODES: dict[str, tuple[QuantMode, Precision]] = {
    "fp32": (NoQuant(name="none"), Precision(name="fp32")),
    "bf16": (NoQuant(name="none"), Precision(name="bf16")),
    "fp16": (NoQuant(name="none"), Precision(name="fp16")),
    "fp8": (NoQuant(name="none"), Precision(name="fp8", rest="fp16")),
    "int8": (NoQuant(name="none"), Precision(name="int8", rest="fp16")),
    "int8-dynamic": (TorchDynamic(name="torch-int8-dynamic"), Precision(name="fp16")),
    "int8-stored": (Rounded(name="int8"), Precision(name="fp16")),
    "nf4-stored": (Rounded(name="nf4", format="nf4"), Precision(name="fp16")),
}
Job = tuple[str, str]  # network, mode


def main() -> None:
    """Build, check, time; print a row and write the JSON as each is done."""
    arguments = parser().parse_args()
    if arguments.worker:
        name, mode, folder = arguments.worker
        return build_one(name, mode, Path(folder), arguments.device, arguments.autotune)
    record = host(arguments.device) | {"autotune": arguments.autotune, "latency": [], "failed": {}, "checks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        start = time.perf_counter()
        said = build_all(arguments, folder)
        record["build_all_seconds"] = time.perf_counter() - start
        for name in arguments.networks:
            measure_all(name, said, folder, record, arguments)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--networks", nargs="*", default=["da-small", "vggt-mini", "vggt-twin"])
    found.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    found.add_argument("--jobs", type=int, default=6)
    found.add_argument("--samples", type=int, default=50)
    found.add_argument("--autotune", action="store_true")
    found.add_argument("--device", default="cuda")
    found.add_argument("--folder", type=Path, help="keep packages here")
    found.add_argument("--worker", nargs=3, metavar=("NETWORK", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    return found


def measure_all(
    name: str, said: dict[Job, str], folder: Path, record: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Eager PyTorch, every package and the checks of one network; a package that fails is an entry of its own."""
    for mode in ("fp32", "fp16", "bf16") if arguments.device != "cpu" else ("fp32",):
        note(record, eager(name, mode, arguments), arguments.out)
    for mode in arguments.modes:
        path, failed = package(folder, name, mode, arguments.autotune), said[(name, mode)]
        if not failed:
            try:
                note(record, measure(path, name, mode, arguments), arguments.out)
            except (ReconError, RuntimeError) as error:
                failed = f"{type(error).__name__}: {error}"
        if failed:
            record["failed"][f"{name} {mode}"] = failed
            print(f"{name:10s} {mode:16s} FAILED: {failed[-600:]}", flush=True)
    good = next((mode for mode in arguments.modes if not said[(name, mode)]), None)
    if good is not None:
        record["checks"][name] = checks(package(folder, name, good, arguments.autotune), name, arguments.device)
        print(name, "checks", json.dumps(record["checks"][name], indent=1), flush=True)


def note(record: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    """Keep a row, write the file, print the line."""
    record["latency"].append(found)
    out.write_text(json.dumps(record, indent=1) + "\n")
    errors = "  ".join(f"{key} {value:.1e}" for key, value in found.get("rel_l2", {}).items())
    lost = f"  LACKING {len(found['lacking'])}" if found.get("lacking") else ""
    built = "package_mib" in found
    sizes = f"{found['package_mib']:7.1f} MiB  built {found['build_seconds']:4.0f} s" if built else ""
    times = f"p50 {found['p50_ms']:8.3f} ms"
    print(f"{found['network']:10s} {found['mode']:16s} {times}  {sizes}  {errors}{lost}", flush=True)


def network(name: str) -> Network:
    """One of the networks by the names of the command line."""
    from recon.depth.depth_anything import DepthAnything
    from recon.models.vggt import VGGT

    if name == "da-small":
        found = DepthAnything(name=name, weights="seeded:0", architecture="small", input_size=518).network()
    elif name == "vggt-mini":
        weights = "packaged:vggt-mini.safetensors"
        found = VGGT(name=name, preset="vggt-mini", weights=weights, height=168, width=224).network(8)
    elif name == "vggt-twin":
        found = VGGT(name=name, preset="vggt-twin", weights="seeded:0", height=112, width=112).network(4)
    elif name == "vggt-1b":
        found = VGGT(name=name, preset="vggt-1b", weights="seeded:0", height=518, width=518).network(8)
    else:
        raise ReconError(f"--networks {name}: not known", "da-small, vggt-mini, vggt-twin, vggt-1b")
    return found


def recipe(found: Network, mode: str, device: str) -> Recipe:
    """The mode's recipe with ranges of the FP32 module over the calibration seeds; torch does it all."""
    quant, precision = MODES[mode]
    if mode == "fp32":
        return Recipe()
    seen = largest_inputs(found.load().to(device), map(found.example, CALIBRATION_SEEDS), device)
    ranges = Ranges(seen, {}, "max", "seeds", len(CALIBRATION_SEEDS), "example inputs")
    return make_recipe(found, quant, precision, ranges)


def build_one(name: str, mode: str, folder: Path, device: str, autotune: bool) -> None:
    """Build one package with its manifest: what a worker process does."""
    found = network(name)
    engine = Inductor(name="inductor", device=device, max_autotune=autotune, kernels="inductor")
    path = package(folder, name, mode, autotune)
    asked = recipe(found, mode, device)
    obtain(path, "engine", "benchmark", lambda at: engine.build(Build(found, None, lambda: asked), at / path.name))


def package(folder: Path, name: str, mode: str, autotune: bool) -> Path:
    """Where the package of a network and a mode lies."""
    return folder / f"{name}_{mode}{'_autotuned' if autotune else ''}.pt2"


def build_all(arguments: argparse.Namespace, folder: Path) -> dict[Job, str]:
    """Every package, several at once; what the worker said where one failed."""

    def work(job: Job) -> str:
        command = [sys.executable, __file__, "--out", "-", "--worker", *job, str(folder), "--device", arguments.device]
        command += ["--autotune"] if arguments.autotune else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"built {' '.join(job)}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        return "" if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())[-4000:]

    jobs = [(name, mode) for name in arguments.networks for mode in arguments.modes]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return dict(zip(jobs, pool.map(work, jobs), strict=True))


def timed(call: Callable[[], object], device: str, samples: int) -> list[float]:
    """Milliseconds of each call, by CUDA events (on the CPU by the clock)."""
    for _ in range(WARMUP):
        call()
    found = []
    for _ in range(samples):
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(call_ms(call, device))
    return found


def row(name: str, mode: str, samples: list[float], **more: Any) -> dict[str, Any]:
    """A row of the JSON: median and 99th percentile as elements of the sorted samples, and all samples."""
    ordered = sorted(samples)
    figures = {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[int(0.99 * (len(ordered) - 1))]}
    return {"network": name, "mode": mode, **figures, **more, "samples_ms": samples}


def measure(path: Path, name: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A package: its formats, its error, its time with and without CUDA graph, its memory."""
    found, device = network(name), arguments.device
    seen = [asdict(layer) for layer in Inductor(name="inductor").inspect(path).layers]
    facts = json.loads(path.with_name(path.name + ".json").read_text())["facts"]
    missing = lacking(facts, seen)
    feeds = {key: value.to(device) for key, value in found.example(0).items()}
    extra: dict[str, Any] = {}
    if device != "cpu":
        with Inductor(name="inductor", device=device, cuda_graph=False).load(path) as plain:
            extra["no_graph_p50_ms"] = sorted(timed(lambda: plain.infer(feeds), device, 20))[10]
            loose = plain.infer(feeds)
    with Inductor(name="inductor", device=device).load(path) as session:
        samples = timed(lambda: session.infer(feeds), device, arguments.samples)
        memory = session.memory_mib()
        with Torch(name="torch", device=device).session(found, None) as reference:
            errors = compare(reference, session, [found.example(seed) for seed in ERROR_SEEDS])
        if device != "cpu":
            same = session.infer(feeds)
            extra["graph_equals_no_graph"] = all(bool(torch.equal(loose[key], same[key])) for key in same)
    return row(
        name,
        mode,
        samples,
        rel_l2={key: error.rel_l2 for key, error in errors.items()},
        memory_mib=memory,
        package_mib=facts["bytes"] / 2**20,
        weights_mib=facts["weights_mib"],
        build_seconds=facts["build_seconds"],
        kept_fp32=facts["kept_fp32"],
        formats=dict(Counter(f"{layer['op']} {layer['compute']} weight {layer['weight'] or '-'}" for layer in seen)),
        kernels=dict(Counter(layer["kernel"] for layer in seen)),
        lacking=missing,
        **extra,
    )


def lacking(facts: dict[str, Any], seen: list[dict[str, Any]]) -> list[str]:
    """Layers that the package does not compute and store as asked."""
    by_module: dict[str, list[dict[str, Any]]] = {}
    for layer in seen:
        for module in layer["modules"]:
            by_module.setdefault(module, []).append(layer)
    wrong = []
    for path, asked in facts["layers"].items():
        compute = asked["activation"].removesuffix("-dynamic") or facts["rest"]
        found = by_module.get(path, [])
        if not found or any(layer["compute"] != compute or layer["weight"] != asked["weight"] for layer in found):
            wrong.append(path)
    return wrong


def eager(name: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Eager PyTorch: FP32 as it comes, or autocast in a CUDA graph."""
    found, device = network(name), arguments.device
    module = found.load().to(device)
    inputs = [value.to(device) for value in found.example(0).values()]
    if mode == "fp32":
        with torch.inference_mode(), full_fp32(device):
            return row(name, "torch-fp32", timed(lambda: module(*inputs), device, arguments.samples))
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[mode]
    with torch.inference_mode(), torch.autocast(torch.device(device).type, dtype):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(*inputs)
    return row(name, f"torch-{mode}-graph", timed(graph.replay, device, arguments.samples))


def checks(path: Path, name: str, device: str) -> dict[str, str]:
    """What must hold beside numbers: wrong inputs, closed sessions, other devices, two sessions in two threads."""
    found, engine, told = network(name), Inductor(name="inductor", device=device), dict[str, str]()
    first = next(iter(found.inputs))

    def expect(what: str, act: Callable[[], object]) -> None:
        try:
            act()
            told[what] = "NO ERROR"
        except ReconError as error:
            told[what] = f"ok: {error.problem}"

    session = engine.load(path)
    expect("wrong shape", lambda: session.infer({first: torch.zeros(1, 1)}))
    expect("wrong dtype", lambda: session.infer({key: value.double() for key, value in found.example(0).items()}))
    session.close()
    expect("closed", lambda: session.infer(found.example(0)))
    if device != "cpu":
        expect("other device", lambda: Inductor(name="inductor").load(path))
    strange = path.with_name("strange.pt2")
    strange.write_bytes(path.read_bytes())
    expect("no manifest", lambda: engine.load(strange))
    strange.unlink()
    told["two threads"] = two_threads(engine, path, found)
    return told


def two_threads(engine: Inductor, path: Path, found: Network) -> str:
    """Two sessions at once, each with inputs of its own, against the same one after the other."""

    def outputs(session: Session, seed: int) -> list[Tensor]:
        return [value.cpu() for _ in range(20) for value in session.infer(found.example(seed)).values()]

    with engine.load(path) as a, engine.load(path) as b:
        want = {seed: outputs(session, seed) for session, seed in ((a, 1), (b, 2))}
        got: dict[int, list[Tensor]] = {}
        work = [
            threading.Thread(target=lambda s=s, n=n: got.__setitem__(n, outputs(s, n))) for s, n in ((a, 1), (b, 2))
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    same = all(torch.equal(x, y) for seed in want for x, y in zip(want[seed], got.get(seed, []), strict=True))
    return "ok: the same numbers" if same else "DIFFERENT NUMBERS"


if __name__ == "__main__":
    main()
