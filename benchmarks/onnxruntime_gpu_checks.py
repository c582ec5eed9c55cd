"""What onnxruntime_gpu.py checks beside numbers and latency: copies, streams, threads, refusals."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import check, refused

from recon.compare import compare_outputs
from recon.engines import Session
from recon.engines.onnxruntime import OnnxRuntime

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Graph:
    """A written graph with inputs and what the CPU provider makes of them."""

    network: str
    asked: str
    onnx: Path
    feeds: list[Tensors]
    expected: list[Tensors]


def label(graph: Graph) -> str:
    """A graph's name in the checks."""
    return f"{graph.network} {graph.asked}"


def engine_of(provider: str, **knobs: Any) -> OnnxRuntime:
    """The engine on a provider."""
    return OnnxRuntime(name="onnxruntime", provider=provider, **knobs)


def opened(engine: OnnxRuntime, path: Path) -> Session:
    """A session of an optimised graph."""
    return engine.load(path)


def errors_of(graph: Graph, session: Session) -> dict[str, float]:
    """Relative L2 of every output against the CPU provider on the same graph."""
    pairs = ((expected, session.infer(feeds)) for feeds, expected in zip(graph.feeds, graph.expected, strict=True))
    host = ((expected, {name: value.cpu() for name, value in got.items()}) for expected, got in pairs)
    return {name: error.rel_l2 for name, error in compare_outputs(host).items()}


def checks(graphs: list[Graph], provider: str, work: Path) -> list[dict[str, Any]]:
    """All checks that the provider can be put to, on the first graph."""
    graph = graphs[0]
    path = work / f"{graph.network}_{graph.asked}.{provider}.engine"
    engine = engine_of(provider)
    found = [
        check("wrong name, shape and dtype; a closed session", lambda: wrong_input(graph, opened(engine, path))),
        check("outputs stay when the next inference runs", lambda: outputs_stay(graph, opened(engine, path))),
        check("two sessions in two threads", lambda: threads(graph, opened(engine, path), opened(engine, path))),
        check("a damaged file", lambda: damaged(engine, path, work)),
    ]
    if provider != "cpu":
        found += [
            check("no copy through the host", lambda: no_copies(graph, opened(engine, path))),
            check("work is ordered after the caller's stream", lambda: ordered(graph, opened(engine, path))),
            check("closing gives the memory back", lambda: memory_back(graph, engine, path)),
            check("an operator that the provider lacks", lambda: fallback(provider, work)),
            check("TensorRT's provider without TensorRT", lambda: without_tensorrt(graph, work)),
        ]
    if provider == "cuda" and graph.asked == "fp32":
        found.append(check("true FP32 is an option", lambda: true_fp32(graph, path)))
    return found


def refusal(run: Callable[[], object], *words: str) -> str:
    """The first line of what `run` is refused with."""
    return refused(run, *words).partition("\n")[0]


def wrong_input(graph: Graph, session: Session) -> str:
    """What `infer` says to another name, shape and dtype, and what a closed session says."""
    name, tensor = next(iter(graph.feeds[0].items()))
    said = [
        refusal(lambda: session.infer({"other": tensor}), "other"),
        refusal(lambda: session.infer({name: tensor[..., 1:]}), name),
        refusal(lambda: session.infer({name: tensor.double()}), "float64"),
    ]
    session.close()
    return "; ".join([*said, refusal(lambda: session.infer(graph.feeds[0]), "closed")])


def outputs_stay(graph: Graph, session: Session) -> str:
    """The first inference's outputs are the same, bit for bit, after the second."""
    with session:
        first = session.infer(graph.feeds[0])
        kept = {name: value.clone() for name, value in first.items()}
        session.infer(graph.feeds[1])
        assert all(torch.equal(first[name], kept[name]) for name in kept)
    return "bit for bit"


def threads(graph: Graph, one: Session, other: Session) -> str:
    """Each thread's outputs are, bit for bit, those of its session alone."""

    def repeat(session: Session, feeds: Tensors, count: int) -> list[Tensors]:
        return [{k: v.cpu() for k, v in session.infer(feeds).items()} for _ in range(count)]

    with one, other, ThreadPoolExecutor(2) as pool:
        alone = [repeat(session, feeds, 1)[0] for session, feeds in zip((one, other), graph.feeds, strict=True)]
        done = list(pool.map(repeat, (one, other), graph.feeds, (100, 100)))
    for known, got in zip(alone, done, strict=True):
        assert all(torch.equal(known[name], item[name]) for item in got for name in known)
    return "100 inferences each, bit for bit"


def no_copies(graph: Graph, session: Session) -> str:
    """CUDA's own list of what an inference on the device did holds no copy from or to the host."""
    from torch.profiler import ProfilerActivity, profile

    with session:
        feeds = {name: value.cuda() for name, value in graph.feeds[0].items()}
        outputs = session.infer(feeds)
        assert all(value.is_cuda for value in outputs.values())
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(10):
                session.infer(feeds)
            torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    kernels = [name for name in names if not name.startswith(("Mem", "cuda", "Activity"))]
    assert kernels, f"nothing was seen: {names}"
    crossing = [name for name in names if "HtoD" in name or "DtoH" in name]
    assert not crossing, crossing
    return f"{len(kernels)} kernels, no copy across; {[name for name in names if name.startswith('Mem')]}"


def ordered(graph: Graph, session: Session) -> str:
    """An input that the caller's stream is still making is waited for on the GPU, while the host goes on."""
    with session:
        name, value = next(iter(graph.feeds[0].items()))
        ready = value.cuda()
        expected = {key: out.clone() for key, out in session.infer({name: ready}).items()}
        late, busy = torch.zeros_like(ready), torch.randn(8192, 8192, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            busy = busy @ busy / 100
        late.copy_(ready)
        got = session.infer({name: late})
        back = time.perf_counter() - start
        total = {key: out.clone() for key, out in got.items()}  # on the caller's stream
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
    assert all(torch.allclose(total[key], expected[key], rtol=1e-3, atol=1e-5) for key in expected), "came too early"
    return f"the host was back after {1e3 * back:.1f} of {1e3 * whole:.1f} ms"


def memory_back(graph: Graph, engine: OnnxRuntime, path: Path) -> str:
    """GPU memory that is still taken after three sessions: less than one of them holds, or 64 MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        with opened(engine, path) as session:
            session.infer(graph.feeds[0])
            held = session.memory_mib()
    torch.cuda.synchronize()
    left = (before - torch.cuda.mem_get_info()[0]) / 2**20
    assert left < max(64.0, held), f"{left:.0f} MiB stay after three sessions of {held:.0f} MiB"
    return f"{left:.0f} MiB stay, a session states {held:.0f} MiB"


def true_fp32(graph: Graph, path: Path) -> str:
    """Relative L2 against the CPU provider with TF32 and without, which must be FP32's own."""
    errors = {}
    for tf32 in (True, False):
        with opened(engine_of("cuda", tf32=tf32), path) as session:
            errors[tf32] = max(errors_of(graph, session).values())
    assert errors[False] < 1e-4, errors
    return f"relative L2 {errors[True]:.1e} with TF32, {errors[False]:.1e} without"


def fallback(provider: str, work: Path) -> str:
    """A graph with one operator that CUDA has no kernel of: it would run on the CPU, unsaid."""
    from onnx import TensorProto, helper, save

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])]
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Det", ["r"], ["y"])]
    graph = helper.make_graph(nodes, "lacking", inputs, outputs)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(work / "det.onnx"))
    return refusal(lambda: engine_of(provider).open(work / "det.onnx", "basic"), "fall")


def without_tensorrt(graph: Graph, work: Path) -> str:
    """What provider=tensorrt says where TensorRT is not installed."""
    try:
        import tensorrt
    except ImportError:
        run = lambda: opened(engine_of("tensorrt"), graph.onnx)  # noqa: E731
        return refusal(run, "provider=tensorrt")
    return f"not checked: TensorRT {tensorrt.__version__} is there"


def damaged(engine: OnnxRuntime, path: Path, work: Path) -> str:
    """What `load` says to the first half of an engine file."""
    half = work / "half.engine"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return refusal(lambda: opened(engine, half), "half.engine")
