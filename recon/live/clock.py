"""Moments on a device's stream, read once the work is done, so that measuring never waits."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Moments:
    """CUDA events on the current stream; on other devices the host's clock, whose work is done when calls return."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def wait(self) -> None:
        """Let the current stream wait for the last moment, wherever it was noted; the host does not."""
        if self._marks and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._marks[-1])

    def synchronise(self) -> None:
        """Let the host wait for the last moment."""
        if self._marks and self._device.type == "cuda":
            self._marks[-1].synchronize()

    def ms(self) -> list[float]:
        """Milliseconds between neighbouring moments, which have all passed."""
        if self._device.type != "cuda":
            return [(after - before) * 1e3 for before, after in pairwise(self._marks)]
        return [before.elapsed_time(after) for before, after in pairwise(self._marks)]
