"""Reading ahead: a source's batches come from a thread of their own, through a queue that bounds them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from recon.geometry.views import View
from recon.threads import Worker, start_all, wait_for


@dataclass(frozen=True)
class Batch:
    """The views of one time step, from 1. read_ms: time that the source took. arrived: perf_counter at its end."""

    step: int
    views: list[View]
    read_ms: float
    arrived: float

    def age_ms(self) -> float:
        """Time since the batch arrived."""
        return (time.perf_counter() - self.arrived) * 1e3


class Reader:
    """Runs `batches()` in a thread, at most `ahead` batches before whoever takes them. A context manager."""

    def __init__(self, batches: Callable[[], Iterator[list[View]]], ahead: int) -> None:
        self._batches = batches
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
        self._leave = threading.Event()
        self._ended = False
        self._thread = Worker("reader", self._run)

    def get(self, *, wait: bool) -> Batch | None:
        """The next batch; None at the end, or where `wait` is off and none is there yet.

        Raises:
            Exception: whatever the source raised, after the batches that it gave before.
        """
        if self._ended:
            return None
        try:
            found = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(found, Batch):
            return found
        self._ended = True
        if found is not None:
            raise found
        return None

    def __enter__(self) -> Reader:
        start_all([self._thread], self._leave.set, self._drop)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Ends the thread, so that the source has closed its files when this returns."""
        self._leave.set()
        wait_for([self._thread], meanwhile=self._drop)

    def _drop(self) -> None:
        with suppress(queue.Empty):
            self._queue.get_nowait()

    def _run(self) -> None:
        if self._leave.is_set():
            return
        end: BaseException | None = None
        step, start, source = 0, time.perf_counter(), self._batches()
        try:
            for views in source:
                step, now = step + 1, time.perf_counter()
                self._queue.put(Batch(step, views, (now - start) * 1e3, now))
                if self._leave.is_set():
                    break
                start = time.perf_counter()
        except BaseException as error:  # handed to the thread that asked
            end = error
        finally:
            if (close := getattr(source, "close", None)) is not None:
                close()
        self._queue.put(end)
