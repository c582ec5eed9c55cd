"""Alignment of one camera over time: a fit per frame, gates, hold, and smoothing as strong as the view is poor."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recon.errors import ReconError
from recon.geometry.align import AlignOptions, Fit, fit, fit_scale, identity, samples, to_depth
from recon.geometry.views import DepthImage, DepthType

Plain = dict[str, float | int | str | None]

FULL_COVERAGE = 0.5
"""From this share of covered pixels on, a frame's own fit is taken as it is."""
LIMITS: dict[str, tuple[float, float]] = {
    "smooth_scale": (1e-6, 1), "min_coverage": (0, 1), "min_span": (0, math.inf), "min_inlier": (0, 1),
    "max_far": (0, 1), "max_jump": (0, math.inf), "far": (1e-9, math.inf), "pixels": (500, math.inf),
    "render_width": (32, math.inf), "behind": (1, math.inf), "moving_frames": (0, math.inf),
    "moving_tolerance": (1e-6, 1), "seed": (0, math.inf),
}  # fmt: skip
JUMP_COVERAGE = 0.4
"""A frame that covers less cannot tell a jump of the scale from a bad fit."""


@dataclass
class Align:
    """How streamed depth gets the map's scale. A frame that fails a gate is not fused; the last fit is held."""

    smooth_scale: float = 0.1
    """Weight of the *new* scale and shift, 1 = no smoothing: the floor for poor views. The weight rises with the share
    of the image that the map covers, as (coverage / 0.5)^2, up to 1."""
    min_coverage: float = 0.15
    """Gate: least share of the image that the map covers."""
    min_span: float = 0.6
    """Gate: least 5-95 % range of inverse depth over its median, among agreeing pixels. Lower accepts flat views,
    where scale and shift cannot be told apart. Not used where only a scale is fitted."""
    min_inlier: float = 0.4
    """Gate: least share of pixels within 5 % of the map after the fit."""
    max_far: float = 0.02
    """Gate: largest share of the image whose aligned depth is not positive or beyond `far`. Raise it for open sky."""
    max_jump: float = 0.1
    """A relative change of depth beyond this replaces the smoothed fit at once, where the map covers 0.4 or more."""
    far: float = 10.0
    """Aligned depth beyond this is dropped; map units."""
    pixels: int = 5000
    """Random pixels that a fit uses at most."""
    render_width: int = 160
    """Width at which the map is rendered for the fit, pixels."""
    behind: float = 1.15
    """Cost of pixels behind the map against those in front. Higher is safer against new objects, and mistakes more what
    has left the scene (where that is 30 % of the image, 1.5 fails on 15 % of the frames and 2 on 70 %)."""
    moving_frames: int = 5
    """Depth that the map does not know is fused once it has been the same for so many frames, so what moves does not
    smear; 0 fuses everything. For cameras that stand still."""
    moving_tolerance: float = 0.04
    """Depths that differ by less than this, relative, are the same; twice the frame's own residual if that is more."""
    seed: int = 0
    per_camera_calib: str | None = None
    """calibration.json of an earlier run to start from; refused unless network, lenses, sizes and unit are the same."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ReconError: a knob outside its range.
        """
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                default = type(self).__dataclass_fields__[name].default
                raise ReconError(
                    f"align.{name}={value}: must lie in [{least:g}, {most:g}]", f"the default is {default}"
                )

    def aligner(
        self, camera: str, depth_type: DepthType, metric: bool, start: Mapping[str, Any] | None = None
    ) -> CameraAligner:
        """An aligner for one camera. `metric`: the map's unit is the metre. `start`: its entry of a calibration."""
        start = start or {}
        return CameraAligner(camera, self, depth_type, metric, start.get("s"), start.get("t"))

    def thinning(self, pixels: int) -> int:
        """Every so-manieth row and column of an image of so many pixels is looked at for depth that is too far."""
        return max(1, math.isqrt(pixels // self.pixels))


@dataclass(frozen=True)
class AlignResult:
    """What became of one frame. s, t: the pair in use after it, smoothed or held; None before the first accepted frame.

    diagnostics: figures of this frame's own fit, names ending in their unit; None where there is no such figure.
    """

    accepted: bool
    s: float | None
    t: float | None
    reason: str
    diagnostics: Plain

    def row(self) -> dict[str, Any]:
        """Everything as plain data, for metrics.json."""
        return {
            "accepted": self.accepted, "reason": self.reason, "s": self.s, "t": self.t, **self.diagnostics
        }  # fmt: skip


@dataclass
class CameraAligner:
    """The state of one camera. Frames must come in time order; the same frames give the same results."""

    camera: str
    options: Align
    depth_type: DepthType
    metric: bool
    s: float | None = None
    t: float | None = None
    last_accepted_frame: int | None = None
    frames: int = 0
    accepted: int = 0
    _fit_options: AlignOptions = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._fit_options = AlignOptions(behind=self.options.behind)

    def update(self, prediction: DepthImage, map_depth: DepthImage, frame: int) -> AlignResult:
        """Fit one frame, judge the fit, and take it up or hold the last.

        Args:
            prediction: [H,W] float32 of the aligner's depth type, NaN where there is none.
            map_depth: [h,w] float32, the map rendered into the same view at any resolution, 0 = none.
        """
        found, overlap = self._fit(prediction, map_depth, frame)
        return self.judge(found, overlap, lambda: self._far_share(found, prediction), frame)

    def judge(self, found: Fit, overlap: float, far_share: Callable[[], float], frame: int) -> AlignResult:
        """Judge the fit of a frame, and take it up or hold the last.

        overlap: share of the image that the map covers. far_share: gives the share of the predicted depth that is not
        positive or beyond `far` by this fit; asked last.
        """
        reason = self._refusal(found, overlap, far_share)
        self.frames += 1
        weight = 0.0
        if not reason:
            weight = self._take_up(found, overlap)
            self.last_accepted_frame, self.accepted = frame, self.accepted + 1
        return AlignResult(not reason, self.s, self.t, reason, self._diagnostics(found, overlap, weight, reason))

    def skip(self, reason: str) -> AlignResult:
        """A frame that has no depth to align: the pair in use is held."""
        self.frames += 1
        return AlignResult(False, self.s, self.t, reason, {})

    def to_depth(self, prediction: DepthImage) -> DepthImage:
        """[H,W] float32 depth in map units by the pair in use; 0 where not positive, beyond `far`, or not predicted.

        Raises:
            ValueError: no frame has been accepted yet, so there is no pair.
        """
        if self.s is None or self.t is None:
            raise ValueError(f"camera {self.camera}: no frame was accepted yet, so there is no scale")
        return to_depth(self._as_disparity(prediction), self.s, self.t, self.options.far)

    def state(self) -> dict[str, Any]:
        """The state as plain data, for calibration.json."""
        return {
            "depth_type": self.depth_type, "model": "1/z = s*d + t" if self.affine else "1/z = s/prediction",
            "s": self.s, "t": self.t, "unit": "m" if self.metric else "arbitrary",
            "last_accepted_frame": self.last_accepted_frame, "frames": self.frames, "frames_accepted": self.accepted,
        }  # fmt: skip

    @property
    def affine(self) -> bool:
        """Whether scale and shift of a disparity are fitted; else a scale of depth, if any."""
        return self.depth_type == "disparity"

    @property
    def fixed(self) -> bool:
        """Whether nothing is fitted: metric depth on a metric map."""
        return self.depth_type == "metric" and self.metric

    @property
    def fit_options(self) -> AlignOptions:
        return self._fit_options

    def _fit(self, prediction: DepthImage, map_depth: DepthImage, frame: int) -> tuple[Fit, float]:
        # the generator depends on camera and frame alone, not on how many frames came before
        rng = np.random.default_rng([self.options.seed, zlib.crc32(self.camera.encode()), frame])
        values, inverse, overlap = samples(prediction, map_depth, rng, self.options.pixels, positive=not self.affine)
        if self.fixed:
            return identity(values, inverse), overlap
        if not self.affine:
            return fit_scale(values, inverse, self._fit_options), overlap
        prior = (self.s, self.t) if self.s is not None and self.t is not None else None
        return fit(values, inverse, prior, rng, self._fit_options), overlap

    def _refusal(self, found: Fit, overlap: float, far_share: Callable[[], float]) -> str:
        """Why the frame is not fused; empty when it is. Constant sentences, so that reports can count them."""
        gates = self.options
        if self.fixed:
            return ""  # nothing was fitted: metric depth on a metric map stands on its own
        if overlap < gates.min_coverage:
            return f"the map covers less than {gates.min_coverage:g} of the image"
        if found.reason:
            return found.reason
        if not found.inlier_5pct >= gates.min_inlier:
            return f"less than {gates.min_inlier:g} of the pixels agree with the map within 5 %"
        if self.affine and not found.inv_depth_span >= gates.min_span:
            return f"inverse depth spans less than {gates.min_span:g} of its median"
        if far_share() > gates.max_far:
            return f"over {gates.max_far:g} of the aligned depth is not positive or beyond {gates.far:g}"
        return ""

    def _far_share(self, found: Fit, prediction: DepthImage) -> float:
        step = self.options.thinning(prediction.size)
        thinned = prediction[step // 2 :: step, step // 2 :: step]
        predicted = thinned[np.isfinite(thinned)]
        if not predicted.size:
            return 1.0
        return float(np.mean(to_depth(self._as_disparity(predicted), found.s, found.t, self.options.far) == 0))

    def _take_up(self, found: Fit, overlap: float) -> float:
        """Blend the fit into the state; returns the weight that it got."""
        weight = float(np.clip((overlap / FULL_COVERAGE) ** 2, self.options.smooth_scale, 1))
        if self.s is None or self.t is None or self.fixed:
            weight, self.s, self.t = 1.0, found.s, found.t
        elif overlap >= JUMP_COVERAGE and self._jump(found) > self.options.max_jump:
            weight = 1.0
        self.s += weight * (found.s - self.s)
        self.t += weight * (found.t - self.t)
        return weight

    def _jump(self, found: Fit) -> float:
        """Largest relative change of depth from the state to the fit, at the 10 % and 90 % quantile of disparity."""
        assert self.s is not None
        assert self.t is not None
        ratios = [(found.s * d + found.t) / (self.s * d + self.t) for d in (found.d10, found.d90)]
        return max(abs(ratio - 1) for ratio in ratios)

    def _as_disparity(self, prediction: DepthImage) -> DepthImage:
        if self.affine:
            return prediction
        missing = np.full(prediction.shape, np.nan, np.float32)
        return np.divide(1, prediction, out=missing, where=prediction > 0)

    def _diagnostics(self, found: Fit, overlap: float, weight: float, reason: str) -> Plain:
        unit = "m" if self.metric else "units"
        resid = ("resid_med_mm", 1000 * found.resid_med) if self.metric else ("resid_med_units", found.resid_med)
        figures = {
            "overlap": overlap, "s_fit": found.s, "t_fit": found.t,
            "inlier_5pct": found.inlier_5pct, "inlier_10pct": found.inlier_10pct,
            "resid_med_pct": found.resid_med_pct, "resid_p90_pct": found.resid_p90_pct,
            "bias_med_pct": found.bias_med_pct, resid[0]: resid[1],
            "inv_depth_span": found.inv_depth_span, "cond": found.cond,
            f"z_at_d10_{unit}": found.z_d10, f"z_at_d90_{unit}": found.z_d90, "alpha_used": weight,
        }  # fmt: skip
        plain = {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
        source = "held" if reason and self.s is not None else found.source
        return {"n_used": found.n_used, "source": source, "fit_ms": found.ms, **plain}
