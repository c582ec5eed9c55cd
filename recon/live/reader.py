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

PATIENCE_S = 10.0


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
        self._leave, self._over = threading.Event(), threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

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
        try:
            self._thread.start()
        except KeyboardInterrupt:  # while it is waited for: it runs, or will, and nobody calls `__exit__`
            self._leave.set()
            self._wait(PATIENCE_S)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Ends the thread, so that the source has closed its files when this returns.

        Ctrl-C in here breaks off no sooner than the batch in hand is read, or PATIENCE_S later: a thread that is in
        native code when the interpreter ends aborts the process.
        """
        self._leave.set()
        try:
            self._wait(float("inf"))
        except KeyboardInterrupt:
            self._wait(PATIENCE_S)
            raise

    def _wait(self, limit_s: float) -> None:
        """By an event: Python before 3.13 takes a thread for ended when Ctrl-C interrupts `join`."""
        end = time.monotonic() + limit_s
        while not self._over.wait(0.01) and time.monotonic() < end:
            with suppress(queue.Empty):
                self._queue.get_nowait()

    def _run(self) -> None:
        try:
            if not self._leave.is_set():
                self._read()
        finally:
            self._over.set()

    def _read(self) -> None:
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
