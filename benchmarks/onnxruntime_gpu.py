"""ONNX Runtime's CUDA provider: the numbers of its CPU provider, no copies through the host, refusals, latency.

    python benchmarks/onnxruntime_gpu.py --work DIR --prepare        # anywhere: graphs, and what the CPU makes of them
    python benchmarks/onnxruntime_gpu.py --work DIR --out F.json     # on the GPU
    ... --asked bf16 int8-bf16                                       # with either: these formats alone

Networks: the twins of VGGT and Depth Anything and da-mini, in FP32, FP16 and INT8 Q/DQ, both twins in BF16, and the
Depth Anything twin in every other mode. BF16 is compared with FP32, as the CPU provider has no kernels for it. One
timing contract (recon.benchmark.contract): CUDA events, 20 warm-up, 200 samples, inputs on the GPU, raw samples kept.
The GPU host needs torch, onnx, psutil and onnxruntime-gpu; --prepare what recon exports with.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import check, host, say
from onnxruntime_gpu_checks import Graph, checks, engine_of, errors_of, label, opened

from recon.benchmark.contract import BenchmarkOptions, benchmark

OPTIONS = BenchmarkOptions(iterations=200, warmup=20)
FORMATS = ("fp32", "fp16", "int8")
MODES = ("bf16", "int8-bf16", "fp8", "torch-int8-dynamic", "bitsandbytes-8bit", "bitsandbytes-nf4", "bitsandbytes-fp4",
         "modelopt-fp8")  # fmt: skip
NETWORKS = ("da2-twin", "da-mini", "vggt-twin")
FURTHER = {"da2-twin": MODES, "vggt-twin": ("bf16",)}
SEEDS = (100, 101)
EIGHT_BITS = ("int8", "int8-bf16", "fp8", "torch-int8-dynamic", "modelopt-fp8")
LIMITS = {"fp32": 5e-3, "fp16": 2e-2} | dict.fromkeys(EIGHT_BITS, 1e-1)
"""Relative L2 against the CPU provider: TF32 and FP16 sums in another order; a code to either side in 8 bits."""


def main() -> None:
    """Check, measure, write the JSON; exit 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--provider", default="cuda", help="cpu: to try the script out where there is no GPU")
    parser.add_argument("--iterations", type=int, default=OPTIONS.iterations)
    parser.add_argument("--asked", nargs="+", choices=(*FORMATS, *MODES), default=(*FORMATS, *MODES))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.prepare:
        arguments.work.mkdir(parents=True, exist_ok=True)
        return prepare(arguments.work, arguments.asked)
    if arguments.out is None:
        parser.error("--out is needed")
    options = BenchmarkOptions(iterations=arguments.iterations, warmup=OPTIONS.warmup)
    graphs = [graph for graph in prepared(arguments.work) if graph.asked in arguments.asked]
    if arguments.provider == "cpu":
        graphs = [graph for graph in graphs if "bf16" not in graph.asked]
    record: dict[str, Any] = machine(arguments.provider) | {"latency": [], "checks": []}
    for graph in graphs:
        run = lambda graph=graph: measured(graph, arguments, options, record["latency"])  # noqa: E731
        record["checks"].append(check(f"{label(graph)}: built, numbers of the CPU provider", run))
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")  # should a check end the process
    record["checks"] += checks(graphs, arguments.provider, arguments.work)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    report(record)
    sys.exit(any(not entry["passed"] for entry in record["checks"]))


def prepare(work: Path, wanted: Sequence[str]) -> None:
    """Export, calibrate on examples, write every graph, and keep inputs and the CPU provider's outputs."""
    from recon.depth.depth_anything import DepthAnything
    from recon.export import ExportOptions, export
    from recon.models.vggt import VGGT
    from recon.observe import graph_maxima, layer_inputs

    twin = {"weights": "seeded:0", "architecture": "twin", "input_size": 112}
    mini = {"weights": "packaged:da-mini", "architecture": "mini", "input_size": 168, "image_size": [320, 240]}
    networks = {
        "da2-twin": DepthAnything(name="da2-twin", **twin).network(),
        "da-mini": DepthAnything(name="da-mini", **mini).network(),
        "vggt-twin": VGGT(name="vggt-twin", preset="vggt-twin", weights="seeded:0", height=112, width=112).network(2),
    }
    for name, network in networks.items():
        formats = [form for form in (*FORMATS, *FURTHER.get(name, ())) if form in wanted]
        if not formats:
            continue
        base = work / f"{name}_fp32.onnx"
        export(network, base, ExportOptions())
        fed = [network.example(seed) for seed in range(4)]
        inputs = {path: seen.largest for path, seen in layer_inputs(network, fed, 0, (0, 0)).items()}
        for asked in formats:
            write_graph(network, base, asked, (inputs, graph_maxima(base, fed)), work)


def write_graph(network: Any, base: Path, asked: str, seen: tuple[Any, Any], work: Path) -> None:
    """One graph in the work folder, with two inputs and what the CPU provider makes of them beside it.

    seen: largest absolute inputs by layer, and by value of the graph.
    """
    from recon.config import option
    from recon.engines.onnxruntime import OnnxRuntime
    from recon.formats import Ranges
    from recon.precision import NAMES
    from recon.quantise import make_recipe, write

    name, _, rest = asked.partition("-") if asked == "int8-bf16" else (asked, "", "")
    mode: Any = option("quant_mode", "none" if name in NAMES else name)
    precision: Any = option("precision", name if name in NAMES else "fp16")
    precision.rest = rest or precision.rest
    graph = work / f"{network.name.partition('-1x')[0].partition('-2x')[0]}_{asked}.onnx"
    if asked != "fp32":
        recipe = make_recipe(network, mode, precision, Ranges(*seen, "max", "examples", 4, "network.example"))
        write(network, base, recipe, graph)
    feeds = [network.example(seed) for seed in SEEDS]
    known = base if "bf16" in asked else graph  # of which the CPU provider has no kernels
    with OnnxRuntime(name="onnxruntime").open(known, "basic") as session:
        expected = [session.infer(feed) for feed in feeds]
    torch.save({"feeds": feeds, "expected": expected}, graph.with_suffix(".pt"))
    logging.info("%s: %.1f MB", graph.name, sum(part.stat().st_size for part in work.glob(f"{graph.stem}.*")) / 1e6)


def prepared(work: Path) -> list[Graph]:
    """Graphs of the work folder, with inputs and expected outputs."""
    found = []
    for file in sorted(work.glob("*.pt")):
        network, _, asked = file.stem.rpartition("_")
        data = torch.load(file, weights_only=True)
        found.append(Graph(network, asked, file.with_suffix(".onnx"), data["feeds"], data["expected"]))
    if not found:
        sys.exit(f"{work}: no graphs; run with --prepare first")
    order = {name: index for index, name in enumerate((*FORMATS, *MODES))}
    return sorted(found, key=lambda graph: (NETWORKS.index(graph.network), order[graph.asked]))


def machine(provider: str) -> dict[str, Any]:
    """Card, provider, versions, date."""
    import onnxruntime

    cuda = torch.cuda.is_available()
    return {
        **host("cuda" if cuda else "cpu"),
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
        "onnxruntime": onnxruntime.__version__, "provider": provider,
        "providers": onnxruntime.get_available_providers(),
    }  # fmt: skip


def measured(graph: Graph, arguments: argparse.Namespace, options: BenchmarkOptions, rows: list[dict[str, Any]]) -> str:
    """Build, open, compare, time; a row of latency, memory, errors, and what the optimised graph holds."""
    engine = engine_of(arguments.provider)
    out = arguments.work / f"{graph.network}_{graph.asked}.{arguments.provider}.engine"
    facts = engine.optimise(graph.onnx, out)
    with opened(engine, out) as session:
        errors = errors_of(graph, session)
        found = benchmark(session, graph.feeds[0], options)
    products = [f"{layer.op} {layer.compute} {layer.weight}".strip() for layer in engine.inspect(out).layers]
    rows.append(
        {
            "network": graph.network,
            "asked": graph.asked,
            "p50_ms": found.percentile_ms(50),
            "p99_ms": found.percentile_ms(99),
            "end_to_end_ms": found.summary().get("end_to_end_ms_p50"),
            "memory_mib": found.session_memory_mib,
            "cv": found.coefficient_of_variation,
            "rel_l2": errors,
            "products": {product: products.count(product) for product in sorted(set(products))},
            "ops": facts["ops"],
            "held_back": facts["held_back"],
            "samples_ms": found.latency_samples_ms,
        }
    )
    limit = LIMITS.get(graph.asked, 5e-2)
    assert max(errors.values()) < limit, f"beyond {limit}: {errors}"
    return str({name: f"{error:.1e}" for name, error in errors.items()})


def report(record: dict[str, Any]) -> None:
    """The rows and the checks in a line or two each."""
    for row in record["latency"]:
        times = f"p50 {row['p50_ms']:7.3f}  p99 {row['p99_ms']:7.3f} ms  {row['memory_mib']:6.0f} MiB"
        print(f"{row['network']:10s} {row['asked']:20s} {times}  rel L2 {max(row['rel_l2'].values()):.1e}")
        print("           ", ", ".join(f"{count} x {product}" for product, count in row["products"].items()))
    say(record["checks"])


if __name__ == "__main__":
    main()
