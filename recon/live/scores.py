"""Depth errors gathered while the stream runs, because its frames are not kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from recon.geometry.metrics import depth_metrics
from recon.geometry.views import Scale
from recon.live.stream import FrameResult


@dataclass
class DepthScores:
    """Depth errors of the fused frames against recorded depth, gathered while the stream runs.

    Recorded depth is judged in the map's unit, so it counts only where the map is metric.
    """

    scale: Scale
    count: int = 0
    _sums: dict[str, float] = field(default_factory=dict, init=False)

    def add(self, frame: FrameResult) -> None:
        """Score one frame, where it was fused and has recorded depth."""
        truth = frame.view.depth
        if frame.depth is None or truth is None or self.scale.unit != "m":
            return
        mask = (frame.depth > 0) & (truth > 0)
        if mask.any():
            self.count += 1
            for name, value in depth_metrics(frame.depth, truth, mask).items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def mean(self) -> dict[str, float]:
        """Mean over frames of every metric, prefixed `depth_`; empty where nothing was scored."""
        return {f"depth_{name}": total / self.count for name, total in self._sums.items()}
