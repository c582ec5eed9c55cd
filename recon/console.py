"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

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
    with _display(out) as bar:
        task = bar.add_task(title, total=total or None)
        try:
            yield lambda: bar.advance(task)
        finally:
            bar.remove_task(task)


@contextmanager
def busy(title: str) -> Iterator[None]:
    """A spinner with the elapsed time around work that has no steps of its own."""
    out = console()
    if not out.is_terminal:
        yield
        return
    with _display(out) as bar:
        task = bar.add_task(title, total=None)
        try:
            yield
        finally:
            bar.remove_task(task)


class Phases:
    """Phases of a foreign tool, nested and perhaps from several threads: one bar each while it lasts."""

    def __init__(self, title: str, bar: Progress | None, out: Console) -> None:
        self._title, self._bar, self._out = title, bar, out
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}
        self._last = time.monotonic()

    def start(self, name: str, total: int) -> None:
        self._totals[name] = total
        if self._bar is not None:
            self._tasks[name] = self._bar.add_task(name, total=total or None)

    def step(self, name: str, done: int) -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.update(self._tasks[name], completed=done)
        elif time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            self._out.print(f"{self._title}: {name} {done}/{self._totals.get(name) or '?'}")

    def finish(self, name: str) -> None:
        if self._bar is not None and (task := self._tasks.pop(name, None)) is not None:
            self._bar.remove_task(task)


@contextmanager
def phases(title: str) -> Iterator[Phases]:
    """Show the phases that a tool reports: bars on a terminal, now and then a line elsewhere."""
    out = console()
    if not out.is_terminal:
        yield Phases(title, None, out)
        return
    with _display(out) as bar:
        yield Phases(title, bar, out)


_shown: list[Progress] = []  # a terminal holds one live display: what is shown inside another joins it


@contextmanager
def _display(out: Console) -> Iterator[Progress]:
    if _shown:
        yield _shown[-1]
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    said = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=out, transient=True) as bar:
        _shown.append(bar)
        try:
            yield bar
        finally:
            _shown.remove(bar)


def _lines(title: str, total: int, out: Console) -> Callable[[], None]:
    last, done = time.monotonic(), 0

    def tick() -> None:
        nonlocal last, done
        done += 1
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            out.print(f"{title}: {done}/{total or '?'}")

    return tick
