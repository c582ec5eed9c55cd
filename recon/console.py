"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


def console() -> Console:
    """The console for people. Results for programs go to files."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Pass items on while showing how far the stage is; `total` 0 = unknown."""
    out = console()
    if not out.is_terminal:
        yield from _lines(items, title, total, out)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=total or None)
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def busy(title: str) -> Iterator[None]:
    """A spinner with the elapsed time around work that has no steps of its own."""
    out = console()
    if not out.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=out, transient=True
    ) as bar:
        bar.add_task(title, total=None)
        yield


def _lines(items: Iterable[Item], title: str, total: int, out: Console) -> Iterator[Item]:
    """A line every ten seconds: enough for a log file."""
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > 10:
            last = time.monotonic()
            out.print(f"{title}: {done}/{total or '?'}")
