"""TensorRT on a CUDA GPU: latency with and without CUDA graphs, the numbers of ONNX Runtime, threads, wrong input.

    python benchmarks/tensorrt_gpu.py --out F.json --work DIR
    python benchmarks/tensorrt_gpu.py --out F.json --work DIR --flavour tensorrt_dispatch --builder PROGRAM

Networks: Depth Anything V2 Small at 384x384 and 518x518 with seeded weights (timing does not depend on their values)
and the VGGT twin; FP16, and INT8 Q/DQ from our own writer with ranges of eight example images. Without `--builder` the
plans come from `engine=tensorrt` itself. With it they come from a program of an older TensorRT, run as `PROGRAM
MODEL.onnx PLAN [--fp16] [--int8] [--profiles JSON]`, which must write version-compatible plans; graphs are lowered to
ONNX opset 17 for it. One timing contract (recon.benchmark.contract): CUDA events, 20 warm-up, 200 samples, inputs on
the GPU, raw samples kept. Needs torch, onnx, onnxruntime, onnxscript and transformers; neither hydra nor onnxsim.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import check, host, say
from tensorrt_gpu_checks import attempt, checks, dynamic_checks, worst
from tensorrt_gpu_plans import built, engine_of, prepared, prepared_dynamic

from recon.benchmark.contract import BenchmarkOptions, benchmark
from recon.compare import compare
from recon.engines import Session
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.trt import targets
from recon.engines.trt.library import library
from recon.network import Network

OPTIONS = BenchmarkOptions(iterations=200, warmup=20)


def main() -> None:
    """Build, measure, check; write the JSON; exit 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--flavour", default="tensorrt")
    parser.add_argument("--builder")
    parser.add_argument("--built-by", default="8.6.0")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=["da2-384", "da2-518", "vggt-twin"])
    parser.add_argument("--try", dest="attempt", type=Path, help="only open this plan: run in a process of its own")
    parser.add_argument("--prepare", action="store_true", help="stop before anything needs a GPU")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.attempt:
        return attempt(arguments.attempt, arguments.flavour)
    arguments.work.mkdir(parents=True, exist_ok=True)
    graphs = [graph for name in arguments.networks for graph in prepared(name, arguments)]
    dynamic = prepared_dynamic(arguments)
    if arguments.prepare:
        return None
    record: dict[str, Any] = machine(arguments) | {"latency": [], "checks": []}
    every = [*graphs, dynamic]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda graph: check(f"build {label(graph)}", lambda: str(built(graph, arguments))), every))
    record["checks"] += done
    plans = [(graph, Path(entry["detail"])) for graph, entry in zip(every, done, strict=True) if entry["passed"]]
    static = [(graph, plan) for graph, plan in plans if not graph["profiles"]]
    for graph, plan in static:
        record["checks"].append(
            check(f"measure {label(graph)}", lambda g=graph, p=plan: measured(g, p, arguments, record["latency"]))
        )
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")  # should a check end the process
    record["checks"] += checks(static, arguments)
    for graph, plan in plans[len(static) :]:
        record["checks"] += dynamic_checks(graph, plan, arguments)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    report(record["latency"], record["checks"])
    sys.exit(any(not entry["passed"] for entry in record["checks"]))


def label(graph: dict[str, Any]) -> str:
    """A graph's name in the checks."""
    return f"{graph['name']} {graph['precision']}"


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Card, version of the runtime, where the plans come from, date."""
    found = library(arguments.flavour)
    return {
        **host(),
        "capability": targets.here(),
        "runtime": f"{found.flavour} {found.version}",
        "built_by": arguments.built_by if arguments.builder else "itself",
    }


def measured(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Rows of latency with and without CUDA graph, memory, and errors; with FP16 also PyTorch on the same card."""
    network = graph["network"]
    feeds, seen = network.example(100), [network.example(seed) for seed in (100, 101)]
    fp32 = OnnxRuntime(name="onnxruntime").open(graph["base"], "basic")
    same = OnnxRuntime(name="onnxruntime").open(graph["onnx"], "basic")
    between = worst(compare(fp32, same, seen))
    for graphs in (True, False):
        with engine_of(arguments, cuda_graph=graphs).load(plan) as session:
            found = benchmark(session, feeds, OPTIONS)
            errors = {
                "to_onnxruntime_fp32": worst(compare(fp32, session, seen)),
                "to_onnxruntime_same_graph": worst(compare(same, session, seen)),
                "of_onnxruntime_same_graph_to_fp32": between,
            }
        rows.append(row_of(graph, f"TensorRT {'CUDA graph' if graphs else 'plain'}", found, errors, plan))
    for half in (False, True) if graph["precision"] == "fp16" else ():
        module = network.load().cuda()
        session = Eager(network, module)
        with torch.autocast("cuda", torch.float16, enabled=half), torch.inference_mode():
            found = benchmark(session, feeds, OPTIONS)
        rows.append(row_of(graph, f"PyTorch eager {'FP16 autocast' if half else 'FP32'}", found, {}, None))
    return "done"


class Eager(Session):
    """The module itself on the GPU."""

    def __init__(self, network: Network, module: torch.nn.Module) -> None:
        self.inputs, self.outputs, self.device, self.module = dict(network.inputs), {}, "cuda", module

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {str(index): tensor for index, tensor in enumerate(self.module(*feeds.values()))}

    def memory_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20

    def close(self) -> None:
        del self.module


def row_of(graph: dict[str, Any], how: str, found: Any, errors: dict[str, float], plan: Path | None) -> dict[str, Any]:
    """A row of the JSON; plan: None where PyTorch ran the network itself."""
    return {
        "network": graph["name"], "precision": graph["precision"] if plan else how.split(" ", 2)[2].lower(), "how": how,
        "p50_ms": found.percentile_ms(50), "p99_ms": found.percentile_ms(99), "memory_mib": found.session_memory_mib,
        "plan_mib": plan.stat().st_size / 2**20 if plan else None, "rel_l2": errors,
        "cv": found.coefficient_of_variation,
        "samples_ms": found.latency_samples_ms,
    }  # fmt: skip


def report(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """The rows and the checks in a line each."""
    for row in rows:
        errors = "  ".join(f"{name} {value:.1e}" for name, value in row["rel_l2"].items())
        times = f"p50 {row['p50_ms']:7.3f}  p99 {row['p99_ms']:7.3f} ms  {row['memory_mib']:6.0f} MiB"
        print(f"{row['network']:10s} {row['precision']:14s} {row['how']:28s} {times}  {errors}")
    say(found)


if __name__ == "__main__":
    main()
