"""Depth errors gathered while the stream runs, because its frames are not kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recon.geometry.metrics import depth_metrics
from recon.geometry.views import Bootstrap
from recon.geometry.world import to_source
from recon.live.stream import FrameResult

PER_FRAME = "median scale of every frame"


@dataclass
class DepthScores:
    """Depth errors of the fused frames against recorded depth, in the unit of the source.

    Where the map is in the source's frame its depth is judged as it is, elsewhere with the one scale that aligns the
    bootstrap cameras to the source's poses; without such poses every frame gets its own median scale. `how` says which.
    """

    bootstrap: Bootstrap
    count: int = 0
    how: str = field(default="", init=False)
    _scale: float | None = field(default=None, init=False)
    _sums: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        found = to_source(self.bootstrap)
        if found is not None:
            self._scale, self.how = found.similarity.scale, found.how
        elif self.bootstrap.scale.unit == "m":
            self._scale, self.how = 1.0, f"none: metres from {self.bootstrap.scale.source}"
        else:
            self.how = PER_FRAME

    def add(self, frame: FrameResult) -> None:
        """Score one frame, where it was fused and has recorded depth."""
        truth = frame.view.depth
        if truth is None or frame.depth is None:
            return
        mask = (frame.depth > 0) & (truth > 0)
        if mask.any():
            scale = self._scale or float(np.median(truth[mask] / frame.depth[mask]))
            self.count += 1
            for name, value in depth_metrics(scale * frame.depth, truth, mask).items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def mean(self) -> dict[str, float]:
        """Mean over frames of every metric, prefixed `depth_`; empty where nothing was scored."""
        return {f"depth_{name}": total / self.count for name, total in self._sums.items()}
