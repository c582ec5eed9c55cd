"""No network: recorded depth, spoilt the way a relative depth network spoils it, with the answer known."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from recon.depth import Depth
from recon.errors import ReconError
from recon.geometry.views import Array, DepthImage, View

if TYPE_CHECKING:
    from recon.engines import Session


@dataclass
class Recorded(Depth):
    """Affine-invariant disparity d with 1/z = s*d + t: unknown s and t per frame, and a network's usual errors.

    The gain 1/s is drawn per camera, drifts slowly and jitters from frame to frame. The disparity carries a smooth
    multiplicative error (partly constant per camera), blurred edges, noise, and coherent blobs nearer than the scene.
    Everything follows from seed, camera name and frame number. With every error at 0, 1/z = s*d + t is exact.
    """

    has_network: ClassVar[bool] = False

    seed: int = 0
    gain_low: float = 0.2
    """Lowest gain; the gain is log-uniform."""
    gain_high: float = 50.0
    """Highest gain."""
    shift_low: float = -0.1
    """Lowest offset of 1/z, in 1/(map unit)."""
    shift_high: float = 0.3
    """Highest offset of 1/z."""
    drift: float = 0.05
    """Amplitude of the slow, sinusoidal drift (period 80 to 160 frames) of log gain and of offset / offset range."""
    jitter: float = 0.01
    """Standard deviation per frame of log gain and of offset / offset range."""
    distortion: float = 0.03
    """Root mean square of the smooth multiplicative error; four fifths of it are constant per camera."""
    noise: float = 0.01
    """Standard deviation of the multiplicative noise per pixel."""
    bleed: float = 0.004
    """Standard deviation of the blur over edges, as a share of the image width (2.5 pixels of 640)."""
    outliers: float = 0.05
    """Share of the image covered by blobs that are nearer than the scene."""

    def check(self) -> None:
        super().check()
        for key in ("drift", "jitter", "distortion", "noise", "bleed", "outliers"):
            if not 0 <= getattr(self, key) <= 0.5:
                raise ReconError(
                    f"depth.{key}={getattr(self, key)}: must lie between 0 and 0.5", "0 switches this error off"
                )
        if not 0 < self.gain_low <= self.gain_high:
            raise ReconError(
                f"depth.gain_low={self.gain_low}, gain_high={self.gain_high}: 0 < low <= high", "0.2 and 50"
            )
        if self.shift_low > self.shift_high:
            raise ReconError(
                f"depth.shift_low={self.shift_low}, shift_high={self.shift_high}: low <= high", "-0.1 and 0.3"
            )
        if self.seed < 0:
            raise ReconError(f"depth.seed={self.seed}: must not be negative", "any whole number from 0 on")

    def predict(self, view: View, session: Session | None) -> DepthImage:
        """[H,W] float32 disparity of arbitrary gain and offset; NaN where nothing was recorded."""
        if view.depth is None:
            raise ReconError(
                f"depth=recorded: camera {view.camera}, frame {view.frame} has no recorded depth",
                "give source.depth for every frame of the stream, or choose a depth network",
            )
        hole = ~(np.isfinite(view.depth) & (view.depth > 0))
        if hole.all():
            return np.full(view.depth.shape, np.nan, np.float32)
        rng = self._rng(view.camera, view.frame)
        disparity: DepthImage = np.float32(1) / _filled(view.depth, hole)
        disparity = _with_blobs(disparity, self.outliers, rng)
        disparity = self._distorted(disparity, view.camera, rng)
        disparity = _blurred(disparity, self.bleed)
        disparity *= np.float32(1) + np.float32(self.noise) * rng.standard_normal(disparity.shape, np.float32)
        s, t = self.scale_shift(view.camera, view.frame)
        spoilt = (disparity - t) / s
        spoilt[hole] = np.nan
        return spoilt.astype(np.float32)

    def scale_shift(self, camera: str, frame: int) -> tuple[float, float]:
        """The true (s, t) of 1/z = s*d + t for a frame: the answer that an alignment should find."""
        fixed, moment = self._rng(camera, None), self._rng(camera, frame, salt=1)
        log_gain = fixed.uniform(np.log(self.gain_low), np.log(self.gain_high))
        shift = fixed.uniform(self.shift_low, self.shift_high)
        period, phases = fixed.uniform(80, 160), fixed.uniform(0, 2 * np.pi, 2)
        change = self.drift * np.sin(2 * np.pi * frame / period + phases) + self.jitter * moment.standard_normal(2)
        gain = np.exp(log_gain + change[0])
        return float(1 / gain), float(-(shift + change[1] * (self.shift_high - self.shift_low)))

    def _distorted(self, disparity: DepthImage, camera: str, rng: np.random.Generator) -> DepthImage:
        fixed = _field(self._rng(camera, None, salt=2), disparity.shape)
        own = _field(rng, disparity.shape)
        error = np.float32(self.distortion) * (np.float32(0.8) * fixed + np.float32(0.6) * own)
        return disparity * (np.float32(1) + error)

    def _rng(self, camera: str, frame: int | None, salt: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(camera.encode()), 0 if frame is None else frame + 1, salt])


def _filled(depth: DepthImage, hole: NDArray[np.bool_]) -> DepthImage:
    """Depth with every hole given the value of the nearest measured pixel, for the blur to work on."""
    import cv2

    if not hole.any():
        return depth
    _, label = cv2.distanceTransformWithLabels(hole.astype(np.uint8), cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    values = np.zeros(int(label.max()) + 1, np.float32)
    values[label[~hole]] = depth[~hole]
    filled: DepthImage = values[label]
    return filled


def _with_blobs(disparity: DepthImage, share: float, rng: np.random.Generator) -> DepthImage:
    """One or two ellipses of the given total area, each standing in front of all that it hides."""
    import cv2

    height, width = disparity.shape
    blobs = int(rng.integers(1, 3))
    out = disparity.copy()
    if share <= 0:
        return out
    for _ in range(blobs):
        aspect = rng.uniform(0.5, 2.0)
        down = np.sqrt(share / blobs * height * width / np.pi * aspect)
        axes = (max(int(down / aspect), 1), max(int(down), 1))
        centre = (int(rng.uniform(0.1, 0.9) * width), int(rng.uniform(0.1, 0.9) * height))
        mask = cv2.ellipse(np.zeros(disparity.shape, np.uint8), centre, axes, rng.uniform(0, 180), 0, 360, 1, -1) > 0
        nearest = np.quantile(out[mask], 0.95) / rng.uniform(0.5, 0.85)
        out[mask] = np.maximum(out[mask], nearest * (1 + 0.04 * _field(rng, disparity.shape)[mask]))
    return out


def _field(rng: np.random.Generator, shape: tuple[int, ...]) -> DepthImage:
    """[H,W] float32: smooth random field of zero mean and unit rms, from a coarse grid."""
    import cv2

    coarse = rng.standard_normal((4, 5)).astype(np.float32)
    field: Array = cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    field = field - field.mean()
    return (field / max(float(field.std()), 1e-6)).astype(np.float32)


def _blurred(disparity: DepthImage, share: float) -> DepthImage:
    import cv2

    sigma = share * disparity.shape[1]
    return disparity if sigma <= 0 else np.asarray(cv2.GaussianBlur(disparity, (0, 0), sigma), np.float32)
