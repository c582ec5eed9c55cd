"""A module as a CUDA graph: one launch instead of hundreds, at fixed shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """A call captured once and replayed. Outputs are the same tensors every time: copy what must outlive the next call."""

    def __init__(self, call: Callable[[Tensor], tuple[Tensor, ...]], example: Tensor, warmup: int = 3) -> None:
        self.input = example.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(warmup):  # compiles kernels and creates handles, neither of which can be captured
                call(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.outputs = call(self.input)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Same shape, dtype and device as the example."""
        self.input.copy_(images)
        self.graph.replay()
        return self.outputs
