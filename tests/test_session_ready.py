"""A session of engine=inductor is ready when it is there: nothing is left to compile for the first frame of a live run."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Barrier, current_thread

import pytest
import torch
from fast_networks import NETWORKS, depth, depth_mini, engine, made, mini, recipe

from recon.engines import Session
from recon.engines.aoti import form
from recon.engines.aoti import session as aoti_session
from recon.engines.aoti.session import InductorSession
from recon.errors import ReconError
from recon.network import Network

Compiled = list[str]
"""Names of the threads that compiled a graph, in order."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: made(of(), recipe(of(), "bf16"), tmp_path_factory.mktemp(name))[0]
        for name, of in NETWORKS.items()
    }  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """The dense heads go through torch.compile on the CPU, too, by a backend that takes a while and keeps count."""
    threads: Compiled = []
    real, opened = torch.compile, form.opened

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        threads.append(current_thread().name)
        time.sleep(0.02)
        return graph.forward

    def compiling(*arguments: object) -> torch.nn.Module:
        network = opened(*arguments)  # type: ignore[arg-type]
        network.compile_dense()
        return network

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    monkeypatch.setattr(form, "opened", compiling)
    monkeypatch.setattr(aoti_session, "starts_slowly", lambda _: True)
    yield threads
    torch._dynamo.reset()


def in_thread(session: Session, of: Network) -> dict[str, torch.Tensor]:
    """The first inference where live runs have it: in another thread than the one that opened the session."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(session.infer, of.example(5)).result()


@pytest.mark.parametrize("which", ["vggt", "depth"])
def test_the_first_inference_compiles_nothing(which: str, packages: dict[str, Path], compiled: Compiled) -> None:
    of = NETWORKS[which]()
    with engine().load(packages[which]) as session:
        assert len(compiled) >= 5, "four levels and what fuses them"
        assert set(compiled) == {current_thread().name}
        before, held = list(compiled), session.memory_mib()
        found = in_thread(session, of)
        assert compiled == before
        assert session.memory_mib() == held, "what getting ready took is part of it from the start"
    fast = of.load().to_inference(torch.bfloat16, compile=False)  # type: ignore[operator]
    with torch.inference_mode():
        for name, like in zip(of.outputs, fast(*of.example(5).values()), strict=True):
            assert torch.equal(found[name], like)


def test_sessions_that_are_opened_at_once_are_compiled_one_after_the_other(
    packages: dict[str, Path], compiled: Compiled
) -> None:
    together = Barrier(2)

    def opened(path: Path) -> Session:
        together.wait()
        return engine().load(path)

    with ThreadPoolExecutor(2) as pool:
        sessions = list(pool.map(opened, packages.values()))
    assert len(compiled) >= 10
    assert len(list(groupby(compiled))) == 2, compiled
    for session, of in zip(sessions, NETWORKS.values(), strict=True):
        before = list(compiled)
        assert all(bool(value.isfinite().all()) for value in session.infer(of().example(5)).values())
        assert compiled == before
        session.close()


def test_opening_on_the_cpu_infers_nothing(packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InductorSession, "_called", lambda *_: pytest.fail("an inference nobody asked for"))
    with engine().load(packages["depth"]) as session:
        assert session.buffers() == {}


@pytest.mark.parametrize(
    ("failure", "message", "remedy"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            r"net\.pt2: not enough memory on cpu to run it.* MiB",
            "smaller",
        ),
        (
            RuntimeError("no kernel image\nmore"),
            r"net\.pt2.*cannot run it on cpu: no kernel image\n  remedy",
            "kernels=inductor",
        ),
        (ReconError("heads of 7", "another"), "heads of 7", "another"),
    ],
)
def test_what_fails_in_the_first_inference_is_an_error_of_opening(
    failure: Exception, message: str, remedy: str, packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise failure

    monkeypatch.setattr(aoti_session, "starts_slowly", lambda _: True)
    monkeypatch.setattr(InductorSession, "_called", failing)
    with pytest.raises(ReconError, match=message) as caught:
        engine().load(packages["depth"])
    assert remedy in caught.value.remedy
    monkeypatch.undo()
    with engine().load(packages["depth"]) as session:  # the next one is not locked out
        assert session.infer(depth().example(5))["disparity"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("which", ["vggt", "depth"])
def test_ready_on_cuda(which: str, graph: bool, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    of = mini(2) if which == "vggt" else depth_mini()
    path, _ = made(of, recipe(of, "bf16"), tmp_path, device="cuda")
    of.load().cpu()
    torch._dynamo.reset()
    with engine(device="cuda", cuda_graph=graph).load(path) as session:
        graphs, held = counters["stats"]["unique_graphs"], session.memory_mib()
        assert bool(session.buffers()) == graph
        start = time.perf_counter()
        found = in_thread(session, of)
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 1, "nothing is compiled"
        assert counters["stats"]["unique_graphs"] == graphs
        assert session.memory_mib() == held
        again = session.infer(of.example(5))
        assert all(torch.equal(found[name], again[name]) for name in found)
