"""Threads whose end can be waited for, whatever Ctrl-C does meanwhile.

Python before 3.13 takes a thread for ended when Ctrl-C interrupts `join`, and nobody waits for one whose `start` was
interrupted. A thread that is in native code when the interpreter ends aborts the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

PATIENCE_S = 10.0
"""So long Ctrl-C waits for threads that have been asked to end."""


class Worker(threading.Thread):
    """A daemon thread. over: set once it has ended."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        super().__init__(name=name, target=target, args=arguments, daemon=True)
        self.over = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.over.set()


def nothing() -> None:
    """What is done between two looks, where nothing has to be."""


def start_all(workers: Sequence[Worker], stop: Callable[[], None], meanwhile: Callable[[], None] = nothing) -> None:
    """Start all. Ctrl-C in here: those that run are asked to end, by one `stop` for each, and are waited for."""
    begun: list[Worker] = []
    try:
        for worker in workers:
            begun.append(worker)
            worker.start()
    except KeyboardInterrupt:
        for _ in begun:
            stop()
        _wait(begun, PATIENCE_S, meanwhile)
        raise


def wait_for(workers: Sequence[Worker], limit_s: float = float("inf"), meanwhile: Callable[[], None] = nothing) -> None:
    """Wait until all that were started have ended. Ctrl-C in here is raised when they have, or PATIENCE_S later.

    meanwhile: called again and again, to take away what a worker cannot get rid of.
    """
    try:
        _wait(workers, limit_s, meanwhile)
    except KeyboardInterrupt:
        _wait(workers, PATIENCE_S, meanwhile)
        raise


def _wait(workers: Sequence[Worker], limit_s: float, meanwhile: Callable[[], None]) -> None:
    end = time.monotonic() + limit_s
    for worker in workers:
        while not worker.over.wait(0.01) and time.monotonic() < end:
            meanwhile()
