"""A loaded package."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from recon.engines import Session
from recon.engines.aoti import form
from recon.engines.aoti.package import Identity
from recon.errors import ReconError
from recon.lowbit.support import current, full_fp32
from recon.machine import MIB, rss_mib

WARM_UP = 2  # runs before a capture: kernels are loaded in the first


class InductorSession(Session):
    """A package's code and weights, or recon's kernels and the package's weights.

    Feeds may lie on any device; outputs are new tensors on `device`.

    With `cuda_graph` the first inference records the work and later ones replay it.
    """

    def __init__(self, path: Path, identity: Identity, device: str, cuda_graph: bool) -> None:
        self.device, self.threads = device, identity.threads
        self.inputs, self.outputs = identity.inputs, identity.outputs
        self._graphs, self._lock = cuda_graph, Lock()
        self._exact = identity.rest == "fp32"
        self._first_run_mib: float | None = None
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]] | None = None
        before = self._held_mib()
        self._model: Any = form.opened(path, identity, device) if identity.form else _opened(path, device, cuda_graph)
        self._loaded_mib = max(path.stat().st_size / MIB if device == "cpu" else 0.0, self._held_mib() - before)

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._model is None:
            raise self.closed_error()
        tensors = [feeds[name] for name in self.inputs]
        before = self._held_mib() if self._first_run_mib is None else 0.0
        with (
            torch.inference_mode(),
            self._lock,
            current(self.device),
            full_fp32(self.device if self._exact else "cpu"),
        ):
            outputs = self._replayed(tensors) if self._graphs else self._called(tensors)
        if self._first_run_mib is None:
            self._first_run_mib = max(0.0, self._held_mib() - before)
        return dict(zip(self.outputs, outputs, strict=True))

    def buffers(self) -> dict[str, Tensor]:
        """What the CUDA graph reads, zeros at first. Empty without a graph."""
        if not self._graphs:
            return {}
        if self._captured is None:
            zeros = {
                name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
                for name, spec in self.inputs.items()
            }
            self._run(zeros)
        assert self._captured is not None
        return dict(zip(self.inputs, self._captured[1], strict=True))

    def memory_mib(self) -> float:
        """Weights as loaded, plus by how much the first inference made the process (on CUDA: the device) grow."""
        return self._loaded_mib + (self._first_run_mib or 0.0)

    def close(self) -> None:
        self._captured = None
        self._model = None

    def _called(self, tensors: list[Tensor]) -> list[Tensor]:
        found = self._model(*(tensor.to(self.device).contiguous() for tensor in tensors))
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def _replayed(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._captured is None:
            self._captured = self._capture(tensors)
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
            size = path.stat().st_size / MIB
            raise ReconError(
                f"{path.name}: not enough memory on {device} to load it; its weights and code take {size:.0f} MiB",
                "free memory on the device, or choose a smaller network or precision",
            ) from error
        raise ReconError(
            f"{path}: PyTorch {torch.__version__} cannot load it: {reason}",
            "the file is damaged or of another version: delete it and run stages=[build] again",
        ) from error
