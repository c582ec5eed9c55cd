"""What tensorrt_gpu.py checks beside latency: numbers, threads, streams, shapes, and everything that is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import check, refused
from tensorrt_gpu_plans import engine_of, plan_facts

from recon.artifact import obtain
from recon.compare import compare
from recon.engines import Session
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.tensorrt import TensorRT
from recon.errors import ReconError

Built = tuple[dict[str, Any], Path]
Case = tuple[str, Callable[[], object], str]  # name, what is refused, words of the refusal
REFUSED = 3  # exit code of a process that ended with our error
TOLERANCE = {"fp16": 2e-2, "int8": 1e-1}  # relative L2 against ONNX Runtime on the same graph


def checks(built: list[Built], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All checks on plans of fixed shapes; most on the first plan, those with two plans on the first two."""
    found = [
        check(
            f"{graph['name']} {graph['precision']}: numbers of ONNX Runtime",
            lambda g=graph, p=plan: numbers(g, p, arguments),
        )
        for graph, plan in built
    ]
    graph, plan = built[0]
    for cuda_graph in (True, False):
        how = "CUDA graphs" if cuda_graph else "no graphs"
        found.append(
            check(f"two contexts in two threads, {how}", lambda c=cuda_graph: threads(built[0], built[0], c, arguments))
        )
        found.append(
            check(f"two plans in two threads, {how}", lambda c=cuda_graph: threads(built[0], built[1], c, arguments))
        )
    found.append(check("outputs stay when the next inference runs", lambda: outputs_stay(graph, plan, arguments)))
    found.append(check("work is ordered after the caller's stream", lambda: ordered(graph, plan, arguments)))
    found.append(check("closing one session leaves the other running", lambda: shared(graph, plan, arguments)))
    found.append(check("what the inspector says", lambda: elsewhere(plan, arguments, 0)))
    return found + refusals(graph, plan, arguments)


def numbers(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> str:
    """Relative L2 of every output against ONNX Runtime on the same graph, within `TOLERANCE`."""
    network = graph["network"]
    reference = OnnxRuntime(name="onnxruntime").open(graph["onnx"], "basic")
    with engine_of(arguments).load(plan) as session:
        errors = compare(reference, session, [network.example(seed) for seed in (200, 201)])
    assert worst(errors) < TOLERANCE[graph["precision"]], {name: error.rel_l2 for name, error in errors.items()}
    return str({name: f"{error.rel_l2:.2e}" for name, error in errors.items()})


def threads(first: Built, second: Built, cuda_graph: bool, arguments: argparse.Namespace) -> str:
    """Each thread's outputs are, bit for bit, those of its session alone."""
    feeds = [
        {name: tensor.cuda() for name, tensor in graph["network"].example(seed).items()}
        for seed, (graph, _) in enumerate((first, second))
    ]

    def repeat(session: Session, feed: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [session.infer(feed) for _ in range(count)]
            torch.cuda.current_stream().synchronize()
        return found

    with ExitStack() as stack:
        load = engine_of(arguments, cuda_graph=cuda_graph).load
        with ThreadPoolExecutor(2) as pool:  # contexts are made, and graphs captured, at once too
            sessions = [stack.enter_context(item) for item in pool.map(load, (first[1], second[1]))]
            torch.cuda.synchronize()
            alone = [repeat(session, feed, 1)[0] for session, feed in zip(sessions, feeds, strict=True)]
            start = time.perf_counter()
            both = list(pool.map(repeat, sessions, feeds, (200, 200)))
            seconds = time.perf_counter() - start
    for expected, outputs in zip(alone, both, strict=True):
        for output in outputs:
            assert all(torch.equal(output[name], tensor) for name, tensor in expected.items())
    return f"2 x 200 inferences in {seconds:.2f} s, all bit for bit as alone"


def outputs_stay(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> str:
    """The first inference's outputs are the same, bit for bit, after the second."""
    with engine_of(arguments).load(plan) as session:
        first = session.infer(graph["network"].example(1))
        kept = {name: tensor.clone() for name, tensor in first.items()}
        session.infer(graph["network"].example(2))
        torch.cuda.synchronize()
        assert all(torch.equal(first[name], tensor) for name, tensor in kept.items())
    return "unchanged"


def ordered(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> str:
    """The feed is written late by the caller's stream; the result is read by it at once."""
    with engine_of(arguments).load(plan) as session:
        late = {name: tensor.cuda() for name, tensor in graph["network"].example(2).items()}
        expected = {name: tensor.clone() for name, tensor in session.infer(late).items()}
        feed = {name: torch.zeros_like(tensor) for name, tensor in late.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            for name, tensor in late.items():
                feed[name].copy_(tensor)
            start = time.perf_counter()
            outputs = {name: tensor * 1 for name, tensor in session.infer(feed).items()}
            host = time.perf_counter() - start
            torch.cuda.current_stream().synchronize()
        assert all(torch.equal(outputs[name], tensor) for name, tensor in expected.items())
    return f"infer returned to the host after {host * 1e3:.1f} ms, while the GPU was still busy"


def shared(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> str:
    """Two sessions of one plan: the second goes on when the first is closed. Free memory before, with both, after."""
    feeds = graph["network"].example(1)
    free = [torch.cuda.mem_get_info()[0]]
    first, second = (engine_of(arguments).load(plan) for _ in range(2))
    free.append(torch.cuda.mem_get_info()[0])
    expected = first.infer(feeds)
    first.close()
    again = second.infer(feeds)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    memory = second.memory_mib()
    second.close()
    free.append(torch.cuda.mem_get_info()[0])
    return f"free GPU memory, MiB: {[round(value / 2**20) for value in free]}; a session states {memory:.0f}"


def refusals(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every wrong use is a ReconError that says what is wrong; none ends the process."""
    with engine_of(arguments).load(plan) as session:  # open throughout: plans are shared within a process
        cases = [*misuse(graph, plan, session, arguments), *wrong_plans(graph, plan, arguments)]
        found = [check(f"refused: {label}", lambda r=run, w=words: refused(r, w)) for label, run, words in cases]
    data = plan.read_bytes()
    for label, content in (
        ("truncated, with a manifest that agrees", data[: len(data) // 2]),
        ("not a plan", b"plan" * 4096),
    ):
        path = forged(graph, arguments, label.split(",")[0].replace(" ", "-"), content)
        found.append(check(f"refused by TensorRT: {label}", lambda p=path: elsewhere(p, arguments)))
    return found


def misuse(graph: dict[str, Any], plan: Path, session: Session, arguments: argparse.Namespace) -> list[Case]:
    """Wrong feeds to a session, and a closed one."""
    closed = engine_of(arguments).load(plan)
    closed.close()
    good = graph["network"].example(0)
    name = next(iter(graph["network"].inputs))
    return [
        ("wrong shape", lambda: session.infer({name: torch.zeros(1, 3, 14, 14)}), "the engine takes"),
        ("wrong dtype", lambda: session.infer({name: good[name].half()}), "the engine takes"),
        ("wrong name", lambda: session.infer({"images_": good[name]}), "do not match"),
        ("closed session", lambda: closed.infer(good), "closed"),
    ]


def wrong_plans(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> list[Case]:
    """Plans that are refused before TensorRT sees them: by their manifest, their hash, or the engine's settings."""
    engine, data = engine_of(arguments), plan.read_bytes()
    bare = arguments.work / "wrong-bare.engine"
    bare.write_bytes(data)
    cut = forged(graph, arguments, "cut", data)
    cut.write_bytes(data[: len(data) // 2])
    careless = replace(engine, allow_host_code=False)

    def load(label: str, **facts: Any) -> Callable[[], object]:
        return lambda: engine.load(forged(graph, arguments, label, data, **facts))

    return [
        ("no manifest", lambda: engine.load(bare), "no manifest"),
        ("truncated plan", lambda: engine.load(cut), "damaged"),
        ("plan of another GPU", load("gpu", targets=["sm86"], gpu="NVIDIA A10"), "this GPU"),
        ("plan of a sister GPU", load("sister", gpu="NVIDIA H100 80GB HBM3"), "tuned for it alone"),
        ("plan of a newer version", load("newer", version="99.1.0"), "newer than"),
        ("plan of one version only", load("exact", version_compatible=False), "version_compatible"),
        ("plan of TensorRT for RTX", load("rtx", flavour="tensorrt_rtx"), "cannot read its format"),
        ("host code not allowed", lambda: careless.load(plan), "allow_host_code"),
    ]


def forged(graph: dict[str, Any], arguments: argparse.Namespace, label: str, content: bytes, **facts: Any) -> Path:
    """A file of this content with the manifest of a good plan, in which these facts are other ones."""
    path = arguments.work / f"wrong-{label}.engine"

    def make(folder: Path) -> dict[str, Any]:
        (folder / path.name).write_bytes(content)
        return {"plan": plan_facts(graph, arguments, **facts)}

    return obtain(path, "engine", label, make).path


def elsewhere(path: Path, arguments: argparse.Namespace, code: int = REFUSED) -> str:
    """Open a plan in another process, which must end by itself: with our error, or with what the inspector said."""
    script = Path(__file__).with_name("tensorrt_gpu.py")
    command = [sys.executable, str(script), "--try", str(path), "--flavour", arguments.flavour]
    command += ["--out", "-", "--work", "-"]  # required, and not used
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"exit code {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    return done.stdout.strip()


def attempt(path: Path, flavour: str) -> None:
    """Open a plan and say what is in it."""
    engine = TensorRT(name="tensorrt", flavour=flavour, allow_host_code=True)
    try:
        engine.load(path).close()
        found = engine.inspect(path)
    except ReconError as error:
        print(error)
        sys.exit(REFUSED)
    print(f"{len(found.layers)} layers; unseen: {found.unseen}; {[asdict(layer) for layer in found.layers[:5]]}")


def dynamic_checks(graph: dict[str, Any], plan: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The checks on the plan with profiles, with CUDA graphs and without."""
    reference = graph["network"].load().cuda()

    def runs(cuda_graph: bool) -> str:
        """Twice over all shapes, in both profiles, more shapes than contexts are kept."""
        said = []
        with engine_of(arguments, cuda_graph=cuda_graph).load(plan) as session:
            for shape in [(1, 64, 64), (2, 64, 64), (4, 96, 32), (8, 64, 64), (5, 128, 128), (6, 32, 64)] * 2:
                images = torch.rand(shape[0], 3, *shape[1:], device="cuda")
                with torch.inference_mode():
                    wanted = reference(images)
                got = session.infer({"images": images})["pooled"]
                error = float((got - wanted).norm() / wanted.norm())
                assert got.shape == wanted.shape
                assert error < 5e-3, (shape, error)
                said.append(f"{shape}: {error:.0e}")
            refused(lambda: session.infer({"images": torch.zeros(9, 3, 64, 64)}), "none of the plan's profiles")
        return "; ".join(said)

    return [
        check(f"dynamic shapes in two profiles, {how}", lambda c=c: runs(c))
        for c, how in ((True, "graphs"), (False, "plain"))
    ]


def worst(errors: dict[str, Any]) -> float:
    """The largest relative L2 of all outputs."""
    return max(error.rel_l2 for error in errors.values())
