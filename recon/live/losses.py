"""Files that a run can do without: one that cannot be written is told, given up, and the stream goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from recon.errors import Unwritable

log = logging.getLogger(__name__)
T = TypeVar("T")


class Losses:
    """What could not be written, by the name of the file or folder, with the reason. `told` is for metrics.json."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}

    def attempt(self, name: str, write: Callable[[], T]) -> T | None:
        """What `write` returns; None where this or an earlier attempt under the name found that it cannot be written.

        A later attempt might fit a smaller file: that would leave a gap in the middle, so there is none.
        """
        if name in self.told:
            return None
        try:
            return write()
        except Unwritable as error:
            self.add(name, error.problem)
            return None

    def add(self, name: str, reason: str) -> None:
        """Record a loss that was found elsewhere."""
        self.told[name] = reason
        log.warning("%s is given up, the run goes on: %s", name, reason)
