"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
LINE_EVERY_S = 10.0  # where there is no terminal: enough for a log file


def console() -> Console:
    """The console for people. Results for programs go to files."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140  # in a file nobody has set one
    return Console(highlight=False, width=width)


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Pass items on while showing how far the stage is; `total` 0 = unknown."""
    with steps(title, total) as tick:
        for item in items:
            yield item
            tick()


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; call what it gives after every step. `total` 0 = unknown."""
    out = console()
    if not out.is_terminal:
        yield _lines(title, total, out)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda: bar.advance(task)


@contextmanager
def busy(title: str) -> Iterator[None]:
    """A spinner with the elapsed time around work that has no steps of its own."""
    out = console()
    if not out.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        bar.add_task(title, total=None)
        yield


def _lines(title: str, total: int, out: Console) -> Callable[[], None]:
    last, done = time.monotonic(), 0

    def tick() -> None:
        nonlocal last, done
        done += 1
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            out.print(f"{title}: {done}/{total or '?'}")

    return tick
