"""Tracking: where parameters, metrics, series and artifacts of a run are recorded."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recon.component import Component


@dataclass
class Record:
    """What one run leaves for a tracker: plain data, no tracker types.

    metrics: name -> value, `section/name_unit`. series: name -> values by step. tables: name -> rows.
    """

    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Tracking(Component):
    """A tracker. `open` comes before the first stage and `close` after the last, whatever happens in between."""

    def check(self) -> None:
        """Raise ReconError when the tracker's own packages are missing."""
        super().check()

    @abstractmethod
    def open(self, experiment: str, run: str, output: Path, tags: dict[str, str]) -> None:
        """Begin a run."""

    @abstractmethod
    def close(self, record: Record, status: str) -> list[str]:
        """Write the record and end the run as FINISHED, FAILED or KILLED; returns lines for the person, e.g. links."""
