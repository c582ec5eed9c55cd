"""No tracker: the run folder is the record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recon.tracking import Record, Tracking


@dataclass
class NoTracking(Tracking):
    """Records nothing beyond the run folder; needs no package."""

    def open(self, experiment: str, run: str, output: Path, tags: dict[str, str]) -> None:
        pass

    def close(self, record: Record, status: str) -> list[str]:
        return []
