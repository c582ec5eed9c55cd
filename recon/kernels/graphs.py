"""A module as a CUDA graph: one launch instead of hundreds, at fixed shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor

ONE_AT_A_TIME = RLock()
"""Held while a network is made ready: rebuilt, compiled, captured. Of what that needs, transformers' patches of torch
and of its own classes, torch.compile's caches and the allocator's pools belong to the process and not to a thread."""


class Captured:
    """A call captured once and replayed. Outputs are the same tensors every time: copy what must outlive the next."""

    def __init__(self, call: Callable[[Tensor], tuple[Tensor, ...]], example: Tensor, warmup: int = 3) -> None:
        self.call, self.input = call, example.clone()  # the graph reads what the call owns: it must not be freed
        with ONE_AT_A_TIME:
            self._capture(warmup)

    def _capture(self, warmup: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(warmup):  # compiles kernels and creates handles, neither of which can be captured
                self.call(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # on the stream that is warm: the libraries' workspaces belong to a stream, and those of torch's own stream for
        # captures would be shared with every other graph, which may be replayed at the same time
        with torch.inference_mode(), torch.cuda.graph(self.graph, stream=stream):
            self.outputs = self.call(self.input)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Same shape, dtype and device as the example."""
        self.input.copy_(images)
        self.graph.replay()
        return self.outputs


class Streams:
    """Second streams by name: work beside the current stream, which `join` waits for.

    A tensor that is read on a second stream has to be kept alive by the caller until after `join`. Each run begins with
    `begin` and joins every stream that it went to: a capture ends with an error when one is left behind, and when it
    waits for one that took no part in it.
    """

    def __init__(self) -> None:
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._forked: set[str] = set()

    def begin(self) -> None:
        """Forget what a run that ended with an error has left."""
        self._forked.clear()

    def beside(self, name: str, on: bool) -> AbstractContextManager[Any]:
        """A second stream that goes on from where the current one is; nothing where `on` is false."""
        if not on:
            return nullcontext()
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._forked.add(name)
        side = self._streams[name]
        side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(side)

    def join(self, name: str) -> None:
        """The current stream waits for that one, if `beside` went there in this run."""
        if name in self._forked:
            self._forked.remove(name)
            torch.cuda.current_stream().wait_stream(self._streams[name])


def allow_variants() -> None:
    """Let torch.compile keep a variant for every level and every count of frames; its limit is 8 a function."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
