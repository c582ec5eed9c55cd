"""Moving things: depth in front of the map that does not stay where it is, is kept out of the map.

A pixel whose depth lies in front of the reference, or where the reference knows nothing, shows something that the
bootstrap did not see. If it is there to stay, its depth is the same from frame to frame; if it moves, it is not. So
such a pixel is fused only once its depth has been the same for some frames. Depth behind the reference is always fused:
that is how a map forgets what has left. But where the reference comes from the live map, a moving thing may have got
into it, and if it draws back, all its depth lies behind: there only what agrees with the map is fused at once. Judged
at the resolution of the rendered reference, per pixel, so only for cameras that stand still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.geometry.views import Array, DepthImage

Mask = NDArray[np.bool_]

P90_OF_MEDIAN = 3.0
"""The 90 % quantile of an error is at most about so many medians (normal 2.4, Laplace 3.3)."""


def residual(diagnostics: Mapping[str, Any]) -> float:
    """90 % quantile of a fit's relative residual, as far as it is error of the depth; 0 where there was no fit.

    A thing in front of the map is in the residuals too. Where it covers a tenth of the pixels, the quantile is its
    distance from the map, and a mask that tolerates that finds nothing. The median is not moved by it.
    """
    p90, median = (float(diagnostics.get(f"resid_{name}_pct") or 0.0) / 100 for name in ("p90", "med"))
    return min(p90, P90_OF_MEDIAN * median)


@dataclass
class MoverMask:
    """The memory of one camera. frames: equal frames before something new is fused; 0 = everything is.

    tolerance: relative difference of depth below which two depths are the same; it has to exceed the depth network's
    error, and grows with the residual of the frame's own fit.
    """

    frames: int
    tolerance: float
    _pose: bytes = b""
    _last: DepthImage = field(default_factory=lambda: np.zeros((0, 0), np.float32), init=False)
    _stable: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32), init=False)

    def apply(
        self,
        depth: DepthImage,
        reference: DepthImage,
        T_world_cam: Array,
        residual: float = 0.0,
        anchored: Mask | None = None,
    ) -> tuple[DepthImage, float | None]:
        """(depth with 0 where something moves, share of the image that was taken out).

        depth: [H,W] aligned, 0 = none. reference: [h,w] map as the camera sees it, 0 = none. residual: of the frame's
        fit, from `residual`. anchored: [h,w] where the reference is the bootstrap's; None: everywhere. The share is
        None where nothing was judged: switched off, or the camera moved.
        """
        moved = self._pose != T_world_cam.tobytes()
        self._pose = T_world_cam.tobytes()
        if not self.frames:
            return depth, None
        small = _shrink(depth, reference.shape)
        if moved or self._last.shape != small.shape:
            first = self._last.size == 0
            self._last, self._stable = small, np.zeros(small.shape, np.int32)
            if not first:
                return depth, None
        tolerance = max(self.tolerance, 2 * residual)
        out = self._judge(small, reference, tolerance, reference > 0 if anchored is None else anchored)
        if not out.any():
            return depth, 0.0
        return np.where(_enlarge(out, depth.shape), np.float32(0), depth), float(np.mean(out))

    def _judge(self, small: DepthImage, reference: DepthImage, tolerance: float, anchored: Mask) -> Mask:
        """Which pixels, at the reference's resolution, are not to be fused; updates the memory."""
        new: Mask = (small > 0) & ~_explained(small, reference, tolerance, anchored)
        same = np.abs(small - self._last) <= tolerance * small
        self._stable = np.where(new, np.where(same, self._stable + 1, 1), 0).astype(np.int32)
        self._last = small
        return _grown(new & (self._stable < self.frames)) & ~_explained(small, reference, tolerance / 2, anchored)


def _explained(small: DepthImage, reference: DepthImage, tolerance: float, anchored: Mask) -> Mask:
    """Where the depth is not in front of the bootstrap's surface, or on that of the live map."""
    known = (small > 0) & (reference > 0)
    return known & (small >= reference * (1 - tolerance)) & (anchored | (small <= reference * (1 + tolerance)))


def _shrink(depth: DepthImage, shape: tuple[int, ...]) -> DepthImage:
    """The depth at the middle of every pixel of the smaller image."""
    rows, columns = (_middles(large, small) for large, small in zip(depth.shape, shape, strict=True))
    found: DepthImage = depth[np.ix_(rows, columns)]
    return found


def _enlarge(mask: Mask, shape: tuple[int, ...]) -> Mask:
    rows, columns = (np.arange(large) * small // large for large, small in zip(shape, mask.shape, strict=True))
    found: Mask = mask[np.ix_(rows, columns)]
    return found


def _middles(large: int, small: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = ((np.arange(small) + 0.5) * large / small).astype(np.int64)
    return found


def _grown(mask: Mask) -> Mask:
    """One pixel wider: the edge of a moving thing is blurred into what is behind it."""
    wide = np.pad(mask, 1)
    rows = wide[:-2] | wide[1:-1] | wide[2:]
    found: Mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return found
