"""A function of fixed shapes as one launch instead of a thousand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recon.errors import ReconError

KEPT = 8
"""Recordings that are kept, one per set of shapes: batches may lack cameras."""


class Replayed:
    """Calls `function`; with `graphs`, on CUDA, records its second call of every set of shapes and replays it from then
    on. The function must wait for nothing, and read nothing but its arguments and what it always reads.

    What a replay returns is overwritten by the next one of the same shapes.

    Raises:
        ReconError: at the second call, where the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], graphs: bool) -> None:
        self.function, self.graphs = function, graphs
        self._known: OrderedDict[tuple[Any, ...], _Recording | None] = OrderedDict()

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not (self.graphs and tensors[0].is_cuda):
            return self.function(*tensors)
        key = tuple(tuple(tensor.shape) for tensor in tensors)
        if key not in self._known:  # the first call loads kernels and fills caches, neither of which can be recorded
            self._known[key] = None
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self.function(*tensors)
        found = self._known[key]
        if found is None:
            found = self._known[key] = _recorded(self.function, tensors)
        self._known.move_to_end(key)
        return found(tensors)


def _recorded(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> _Recording:
    try:
        return _Recording(function, tensors)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReconError(
            f"the fits of a batch cannot be recorded as a CUDA graph by PyTorch {torch.__version__}: {reason}",
            "stream.cuda_graph=false launches them one by one",
        ) from error


class _Recording:
    def __init__(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        self.held = [tensor.clone() for tensor in tensors]
        device = tensors[0].device
        current: Any = torch.cuda.current_stream(device)
        side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            function(*self.held)
            self.graph.capture_begin(capture_error_mode="thread_local")  # other threads go on allocating and launching
            try:
                self.out = function(*self.held)
            finally:
                self.graph.capture_end()
        current.wait_stream(side)

    def __call__(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for buffer, tensor in zip(self.held, tensors, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return self.out
