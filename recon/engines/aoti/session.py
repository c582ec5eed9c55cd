"""A loaded package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from recon.engines import Session
from recon.engines.aoti import form
from recon.engines.aoti.package import Identity
from recon.errors import ReconError
from recon.kernels.graphs import ONE_AT_A_TIME
from recon.lowbit.support import current, full_fp32
from recon.machine import MIB, rss_mib

WARM_UP = 2  # runs before a capture: kernels are loaded in the first


class InductorSession(Session):
    """A package's code and weights, or recon's kernels and the package's weights.

    Feeds may lie on any device; outputs are new tensors on `device`.

    On CUDA it is ready once it is there: kernels are compiled and loaded, and with `cuda_graph` the work is recorded,
    so that an inference does nothing but infer. One session of the process at a time is made.

    Raises:
        ReconError: the file is damaged, there is not enough memory, or the network cannot be run here.
    """

    def __init__(self, path: Path, identity: Identity, device: str, cuda_graph: bool) -> None:
        self.device, self.threads = device, identity.threads
        self.inputs, self.outputs = identity.inputs, identity.outputs
        self._graphs, self._lock = cuda_graph, Lock()
        self._exact = identity.rest == "fp32"
        self._first_run_mib: float | None = None
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]] | None = None
        with ONE_AT_A_TIME:
            before = self._held_mib()
            self._model: Any = (
                form.opened(path, identity, device) if identity.form else _opened(path, device, cuda_graph)
            )
            size = path.stat().st_size / MIB if device == "cpu" else 0.0
            self._loaded_mib = max(size, self._held_mib() - before)
            if starts_slowly(device):
                with _told(path, device, bool(identity.form)):
                    self._make_ready()

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._model is None:
            raise self.closed_error()
        tensors = [feeds[name] for name in self.inputs]
        before = self._held_mib() if self._first_run_mib is None else 0.0
        with self._lock, self._computing():
            outputs = self._replayed(tensors) if self._graphs else self._called(tensors)
        if self._first_run_mib is None:
            self._first_run_mib = max(0.0, self._held_mib() - before)
        return dict(zip(self.outputs, outputs, strict=True))

    def buffers(self) -> dict[str, Tensor]:
        """What the CUDA graph reads, zeros at first. Empty without a graph."""
        if not self._graphs:
            return {}
        if self._captured is None:
            raise self.closed_error()
        return dict(zip(self.inputs, self._captured[1], strict=True))

    def memory_mib(self) -> float:
        """Weights as loaded, plus by how much the first inference made the process (on CUDA: getting ready made the
        device's use) grow."""
        return self._loaded_mib + (self._first_run_mib or 0.0)

    def close(self) -> None:
        self._captured = None
        self._model = None

    def _make_ready(self) -> None:
        """What the first inference needs beside inferring, on zeros."""
        before = self._held_mib()
        with self._computing():
            zeros = [
                torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
                for spec in self.inputs.values()
            ]
            if self._graphs:
                self._captured = self._capture(zeros)
            else:
                self._called(zeros)
            if self.device != "cpu":
                torch.cuda.synchronize(self.device)  # what a kernel reports late is an error of opening, too
        self._first_run_mib = max(0.0, self._held_mib() - before)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The state of torch in which inferences run, the one in which they are compiled included: a change of it
        would make torch.compile begin anew."""
        with torch.inference_mode(), current(self.device), full_fp32(self.device if self._exact else "cpu"):
            yield

    def _called(self, tensors: list[Tensor]) -> list[Tensor]:
        found = self._model(*(tensor.to(self.device).contiguous() for tensor in tensors))
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def _replayed(self, tensors: list[Tensor]) -> list[Tensor]:
        assert self._captured is not None, "made when the session was"
        graph, inputs, outputs = self._captured
        for buffer, tensor in zip(inputs, tensors, strict=True):
            if tensor is not buffer:  # one of `buffers`
                buffer.copy_(tensor)
        graph.replay()
        return [output.clone() for output in outputs]  # the next replay writes into the same memory

    def _capture(self, tensors: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        inputs = [own(tensor, self.device) for tensor in tensors]
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._called(inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # the stream is warm, and no other session's: see `Captured`; other threads may go on using the device
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self._called(inputs)
        return graph, inputs, outputs

    def _held_mib(self) -> float:
        if self.device == "cpu":
            return rss_mib()
        free, total = torch.cuda.mem_get_info(self.device)
        return float(total - free) / MIB


def starts_slowly(device: str) -> bool:
    """Whether a first inference does more than infer: on CUDA it compiles the dense heads and loads kernels."""
    return device != "cpu"


@contextmanager
def _told(path: Path, device: str, fast: bool) -> Iterator[None]:
    """Failures of the first inference as errors of opening. fast: it runs recon's kernels."""
    try:
        yield
    except ReconError:
        raise
    except torch.OutOfMemoryError as error:
        raise _starved(path, device, "run it") from error
    except Exception as error:  # Triton's, Inductor's and the driver's have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ReconError(
            f"{path.name}: PyTorch {torch.__version__} opens it, but cannot run it on {device}: {reason[:300]}",
            "engine.kernels=inductor builds a package without recon's kernels" if fast else "run stages=[build] again",
        ) from error


def _starved(path: Path, device: str, to: str) -> ReconError:
    size = path.stat().st_size / MIB
    return ReconError(
        f"{path.name}: not enough memory on {device} to {to}; its weights and code take {size:.0f} MiB",
        "free memory on the device, or choose a smaller network or precision",
    )


def own(tensor: Tensor, device: str) -> Tensor:
    """A contiguous copy on a device that anyone may write to: no tensor of inference mode, in which it is made."""
    with torch.inference_mode(False):
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return made.copy_(tensor)


def _opened(path: Path, device: str, cuda_graph: bool) -> Any:
    from torch._inductor import aoti_load_package

    index = -1 if device in ("cpu", "cuda") else int(device.partition(":")[2])
    try:
        return aoti_load_package(str(path), run_single_threaded=cuda_graph, device_index=index)
    except Exception as error:  # the loader's have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "out of memory" in str(error).lower():
            raise _starved(path, device, "load it") from error
        raise ReconError(
            f"{path}: PyTorch {torch.__version__} cannot load it: {reason}",
            "the file is damaged or of another version: delete it and run stages=[build] again",
        ) from error
