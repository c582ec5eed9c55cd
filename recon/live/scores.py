"""Depth errors gathered while the stream runs, because its frames are not kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recon.geometry.metrics import depth_metrics
from recon.geometry.views import Scale
from recon.live.stream import FrameResult


@dataclass
class DepthScores:
    """Depth errors of the fused frames against recorded depth, gathered while the stream runs.

    Recorded depth is judged in the map's unit, so it counts only where the map is metric.
    """

    scale: Scale
    frames: list[dict[str, float]] = field(default_factory=list)

    def add(self, frame: FrameResult) -> None:
        """Score one frame, where it was fused and has recorded depth."""
        truth = frame.view.depth
        if frame.depth is None or truth is None or self.scale.unit != "m":
            return
        mask = (frame.depth > 0) & (truth > 0)
        if mask.any():
            self.frames.append(depth_metrics(frame.depth, truth, mask))

    def mean(self) -> dict[str, float]:
        """Mean over frames of every metric, prefixed `depth_`; empty where nothing was scored."""
        if not self.frames:
            return {}
        return {f"depth_{name}": float(np.mean([frame[name] for frame in self.frames])) for name in self.frames[0]}
