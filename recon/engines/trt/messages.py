"""Everything TensorRT says: one logger for the process, as it wants, and listeners that keep what they need."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from recon.engines.trt.library import Library

log = logging.getLogger(__name__)

LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG,
}
KEPT_ERRORS = 8


@dataclass
class Heard:
    """What was said while one listener listened. `errors`: the last ones, oldest first."""

    file: TextIO | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, severity: str, text: str) -> None:
        """Keep one message; severity: a key of LEVELS."""
        if self.file is not None:
            self.file.write(f"{severity} {text}\n")
        if LEVELS[severity] >= logging.ERROR:
            self.errors = [*self.errors, text][-KEPT_ERRORS:]
        elif severity == "WARNING" and text not in self.warnings:
            self.warnings.append(text)

    @property
    def reason(self) -> str:
        """The last errors in one line; what to say when TensorRT gave none."""
        return " | ".join(dict.fromkeys(error.strip() for error in self.errors)) or "it gave no reason"


class Messages:
    """The logger and its listeners. Errors reach Python's logging only where nobody listens: a listener raises them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Heard] = []

    def said(self, severity: str, text: str) -> None:
        """Called by TensorRT from any thread."""
        with self._lock:
            for heard in self._listeners:
                heard.take(severity, text)
            heeded = bool(self._listeners)
        level = LEVELS[severity]
        if level < logging.ERROR or not heeded:
            log.log(level, "TensorRT: %s", text)

    @contextmanager
    def listen(self, file: Path | None = None) -> Iterator[Heard]:
        """Hear everything said in the block, VERBOSE included; `file` gets it all, one message a paragraph."""
        with file.open("w", errors="replace") if file is not None else nullcontext() as handle:
            heard = Heard(handle)
            with self._lock:
                self._listeners.append(heard)
            try:
                yield heard
            finally:
                with self._lock:
                    self._listeners.remove(heard)


MESSAGES = Messages()


@cache
def logger(library: Library) -> Any:
    """The process's only `ILogger` of a library: TensorRT ignores any later one."""

    class Logger(library.trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            library.trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            MESSAGES.said(str(severity).rpartition(".")[2], str(text))

    return Logger()
