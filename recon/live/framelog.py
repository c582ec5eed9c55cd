"""What became of every frame: all rows on disk, figures and counts in memory, so that a long run stays small."""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from recon.live.stream import FrameResult

log = logging.getLogger(__name__)
KEPT = 2000
"""Rows that metrics.json holds at most; frames.jsonl has all of them."""
SERIES_POINTS = 1000
"""Points per series for a tracker; longer ones are thinned evenly."""
FIGURES = ("s", "t", "inlier_5pct", "resid_med_pct", "ms_depth", "ms_render", "ms_align", "ms_fuse", "ms_latency")
PARTS = ("read", "wait", "depth", "render", "align", "fuse", "latency")


class RowFile:
    """Writes one JSON line per frame to `path`, which exists under that name only once `close` has been called.

    seen: rows so far. rows: the first of them. lost: why there is no such file, where it could not be written; counts
    go on without it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self.seen = 0
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(path.name + ".part")
        self._file: IO[str] | None = self._partial.open("w")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a full disk costs the rows on disk, not the run."""
        self.seen += 1
        if len(self.rows) < KEPT:
            self.rows.append(row)
        assert self._file is not None or self.lost, "the log is closed"
        if self._file is not None:
            try:
                self._file.write(json.dumps(row) + "\n")
            except OSError as error:
                self._give_up(error)

    def close(self) -> Path | None:
        """Finish the file and give it its name; None where it was lost."""
        if self._file is not None:
            try:
                self._file.close()
                self._file = None
                self._partial.replace(self.path)
            except OSError as error:
                self._give_up(error)
        return None if self.lost else self.path

    def metrics(self) -> dict[str, Any]:
        """Where the rows are, and the first of them."""
        return {
            "frames_file": None if self.lost else self.path.name,
            "frames_listed": len(self.rows),
            "frames": self.rows,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Leave no partial file behind after an error."""
        if self._file is not None:
            self._discard()

    def _give_up(self, error: OSError) -> None:
        self.lost = f"{error.strerror or error} after {self.seen} frames"
        log.warning("%s is given up, the run goes on: %s", self.path.name, self.lost)
        self._discard()

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what it still holds does not fit either
                self._file.close()
        self._file = None
        self._partial.unlink(missing_ok=True)


class FrameLog(RowFile):
    """Rows of the stream's frames, with counts of what became of them and figures for percentiles and series."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self._figures: dict[tuple[str, str], array[float]] = {}

    def add(self, frame: FrameResult) -> dict[str, Any]:
        """Record one frame; returns its row."""
        row = frame.row()
        self.write(row)
        self.accepted += frame.align.accepted
        if not frame.align.accepted:
            self.rejected[frame.align.reason] += 1
        for name in (*FIGURES, *(f"ms_{part}" for part in PARTS if f"ms_{part}" not in FIGURES)):
            if isinstance(value := row.get(name), (int, float)) and np.isfinite(value):
                self._figures.setdefault((frame.view.camera, name), array("f")).append(value)
        return row

    def metrics(self) -> dict[str, Any]:
        """Counts, times and rows for metrics.json."""
        return {
            "frames_seen": self.seen,
            "frames_fused": self.accepted,
            "frames_rejected": dict(self.rejected),
            "ms": {part: percentiles(values) for part in PARTS if (values := self._all(f"ms_{part}")).size},
            **super().metrics(),
        }

    def series(self) -> dict[str, list[float]]:
        """Values by frame for a tracker, one series per camera and quantity, thinned where they are long."""
        found = {}
        for (camera, name), values in self._figures.items():
            if name in FIGURES:
                step = -(-len(values) // SERIES_POINTS)
                found[f"align/{camera}_{name}"] = [float(value) for value in values[::step]]
        return found

    def _all(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        found = [np.frombuffer(values, np.float32) for (_, key), values in self._figures.items() if key == name]
        return np.concatenate(found) if found else np.empty(0, np.float32)


def percentiles(values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, float]:
    """p50, p95 and max, for metrics.json."""
    p50, p95 = np.percentile(values, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "max": float(values.max())}
