"""Pictures of depth: colours that hold still over time, and panels with a caption."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recon.geometry.views import DepthImage, DepthType, Image

HEADER = 24
"""Height of the caption strip, pixels."""
STRIP, INK, UNKNOWN = (24, 28, 34), (225, 229, 234), (52, 56, 62)
SAMPLE = 20_000
"""Pixels from which percentiles are taken."""


@dataclass
class RunningRange:
    """Two percentiles of the values, followed in time with an exponential mean, so that colours do not flicker.

    A single frame moves the range by `smooth` of what it differs; the first frame sets it.
    """

    low_percentile: float
    high_percentile: float
    smooth: float
    span: tuple[float, float] | None = field(default=None, init=False)

    def update(self, values: DepthImage) -> dict[str, float]:
        """Follow one frame; returns its own percentiles and the range to show it in, in the unit of the values."""
        flat = values[np.isfinite(values)]
        flat = flat[:: max(1, len(flat) // SAMPLE)]
        low, high = (float(value) for value in np.percentile(flat, (self.low_percentile, self.high_percentile)))
        if self.span is None:
            self.span = low, high
        else:
            self.span = tuple(old + self.smooth * (new - old) for old, new in zip(self.span, (low, high), strict=True))  # type: ignore[assignment]
        return {"low": low, "high": high, "shown_low": self.span[0], "shown_high": self.span[1]}  # type: ignore[index]


def colourise(values: DepthImage, span: tuple[float, float], kind: DepthType) -> Image:
    """[H,W,3] uint8 RGB, warm = near, in the turbo colours (Mikhailov 2019); grey where there is no value.

    Disparity grows towards the camera and is coloured as it is; depth (relative, metric) is coloured from far to near.
    """
    import cv2

    low, high = span
    share = (np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)
    near = share if kind == "disparity" else 1 - share
    levels = np.clip(near * 255, 0, 255).astype(np.uint8)
    colours: Image = np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[..., ::-1])
    colours[~np.isfinite(values)] = UNKNOWN
    return colours


def side_by_side(image: Image, depth: Image | None, width: int, captions: tuple[str, str]) -> Image:
    """[HEADER + h, 2*width, 3]: the image and its depth at `width` across under a strip with a caption each."""
    import cv2

    height = even(width * image.shape[0] / image.shape[1])
    out = np.empty((HEADER + height, 2 * width, 3), np.uint8)
    out[:HEADER] = STRIP
    for column, (picture, caption) in enumerate(zip((image, depth), captions, strict=True)):
        left = column * width
        if picture is None:
            out[HEADER:, left : left + width] = UNKNOWN
        else:
            way = cv2.INTER_AREA if picture.shape[1] > width else cv2.INTER_LINEAR
            out[HEADER:, left : left + width] = cv2.resize(picture, (width, height), interpolation=way)
        place = (left + 8, HEADER - 8)
        cv2.putText(out, _fitting(caption, width), place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    return out


def columns_of(count: int, aspect: float) -> int:
    """Columns in which `count` pictures of this width / height come closest to 16:9."""
    choices = range(1, count + 1)
    return min(choices, key=lambda columns: abs(np.log(aspect * columns / -(-count // columns) / (16 / 9))))


def even(value: float) -> int:
    """The nearest even number, at least 2: what video encoders take."""
    return max(2, 2 * round(value / 2))


def _fitting(caption: str, width: int) -> str:
    plain = caption.encode("ascii", "replace").decode()
    return plain[: max(1, (width - 12) // 8)]
