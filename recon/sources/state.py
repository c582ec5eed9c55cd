"""What happens to cameras while they are read: counted and kept, so that a run can say what it lost."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from recon.geometry.views import Image

log = logging.getLogger(__name__)

MAX_EVENTS = 50
DARK = 20
"""A frame is black when 99 % of its samples are at or below this grey value of 255."""
_STRIDE = 7  # every n-th row and column is looked at


@dataclass
class CameraState:
    """One camera of a source. lost: frames that could not be used, by reason. dropped: those a newer one replaced."""

    name: str
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    frozen: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def lose(self, reason: str, at: float | int | None, count: int = 1) -> None:
        """Count frames that are not delivered; the first of a kind is said at once."""
        with self._lock:
            first = not self.lost[reason]
            self.lost[reason] += count
        if first:
            self.event(f"first frame lost: {reason}", at)

    def event(self, what: str, at: float | int | None) -> None:
        """Keep and log a turn in the camera's fate. at: frame number or time in seconds, whichever the source has."""
        with self._lock:
            if len(self.events) < MAX_EVENTS:
                self.events.append({"what": what, "at": at})
        log.warning("camera %s: %s (at %s)", self.name, what, at)

    def report(self) -> dict[str, Any]:
        """The camera as it stands in metrics.json."""
        with self._lock:
            row: dict[str, Any] = {"delivered": self.delivered, "lost": dict(self.lost), "dropped": self.dropped}
            if self.frozen:
                row["frozen"] = self.frozen
            return {**row, **self.facts, "events": list(self.events)}


def totals(report: dict[str, Any]) -> dict[str, float]:
    """Sums over the cameras of a source's report, for trackers: frames delivered, lost and dropped, and the skew."""
    rows = report.get("cameras", {}).values()
    if not rows:
        return {}
    found = {name: float(sum(row[name] for row in rows)) for name in ("delivered", "dropped")}
    found["lost"] = float(sum(sum(row["lost"].values()) for row in rows))
    skew = report.get("skew_ms", {})
    return found | {f"skew_ms_{name}": float(skew[name]) for name in ("p50", "p95", "max") if name in skew}


class Watch:
    """Looks at the frames of one camera for those that carry no picture: black ones, and the same one repeated."""

    def __init__(self) -> None:
        self._last: bytes = b""
        self.repeats = 0

    def look(self, image: Image) -> str:
        """`black`, `frozen` (equal to the frame before, to the last bit of every sample) or an empty string."""
        samples = np.ascontiguousarray(image[::_STRIDE, ::_STRIDE])
        if np.percentile(samples.max(axis=2), 99) <= DARK:
            return "black"
        data = samples.tobytes()
        same, self._last = data == self._last, data
        self.repeats = self.repeats + 1 if same else 0
        return "frozen" if same else ""
