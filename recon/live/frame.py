"""What the stream hands on of every frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from recon.geometry.views import DepthImage, View
from recon.live.align import AlignResult

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FrameResult:
    """One frame of one camera after the stream dealt with it.

    kept: the aligned depth where the stream has it, [H,W] NumPy or a tensor of the map's device; None when rejected.
    anchored: share of the reference that is the bootstrap's. moving: share of the image that was not fused because it
    moves; None where that was not judged. ms: time in each part; `read` and `latency` (arrival to fused) are those of
    the frame's batch, and with a map on a device so is every part, since all cameras go through it together.
    """

    view: View
    align: AlignResult
    kept: DepthImage | torch.Tensor | None
    anchored: float
    ms: dict[str, float]
    moving: float | None = None

    @cached_property
    def depth(self) -> DepthImage | None:
        """[H,W] float32 aligned, 0 = none; None when rejected. Copied from the device when first asked for."""
        if self.kept is None or not hasattr(self.kept, "cpu"):
            return self.kept
        found: DepthImage = self.kept.cpu().numpy()
        return found

    def row(self) -> dict[str, Any]:
        """The frame as it stands in metrics.json."""
        ms = {f"ms_{part}": round(value, 3) for part, value in self.ms.items()}
        who = {"camera": self.view.camera, "frame": self.view.frame}
        return {**who, **self.align.row(), "anchored": self.anchored, "moving": self.moving, **ms}
