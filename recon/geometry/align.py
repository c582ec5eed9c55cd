"""Scale and shift of a depth prediction against the map: `1/z = s*d + t` by consensus, not by least squares.

`d` is affine-invariant disparity, `z` the map's depth along the same ray. The residual is `r = (s*d + t) * z - 1`:
dimensionless, about the relative depth error, positive where the prediction is nearer than the map. One nearer object
that the map has not seen yet has so much leverage that M-estimators and scales estimated from the residuals (MAD)
break at 10 to 20 % of such pixels. Here hypotheses from two points compete (RANSAC, Fischler and Bolles 1981) under a
truncated quadratic cost summed over several widths, slightly one-sided, and the best are refined by Tukey's biweight
with a cut-off that is *fixed*. In a stream the last fit takes the place of the hypotheses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recon.geometry.views import Array, DepthImage

FINALIST_ROUNDS = 3
"""Rounds of refinement before the finalists are compared: what is left moves their cost little."""


@dataclass(frozen=True)
class AlignOptions:
    """Knobs of `fit`. Chosen on simulated disparity from real sensor depth: benchmarks/alignment.py measures them."""

    hypotheses: int = 300
    """Two-point hypotheses of RANSAC."""
    score_pixels: int = 2000
    """Pixels on which hypotheses compete; the refinement uses all."""
    pair_gap: float = 0.15
    """Least distance of a hypothesis's two points, as a share of the 5-95 % range of disparity."""
    widths: tuple[float, ...] = (0.03, 0.06, 0.12)
    """Residuals beyond a width cost the same; the costs of all widths are summed."""
    behind: float = 1.15
    """Cost of a pixel beyond a width *behind* the map, where one in front costs 1. New objects stand in front, things
    that have left the scene leave pixels behind: more is safer against the former and fails on a stale map."""
    finalists: int = 3
    """Distinct best hypotheses that are refined before the final choice, which leaves out the narrowest width."""
    cut_off: float = 0.20
    """Residual beyond which a pixel has no weight in the refinement."""
    rounds: int = 10
    """Rounds of the refinement at most."""
    keep_prior: float = 0.5
    """Share of pixels within 10 % below which the fit from the prior is contested by RANSAC."""
    confirmed: float = 0.15
    """A fit from the prior that gives depths further than this from the prior's own is contested, too."""
    takeover: float = 0.2
    """RANSAC replaces a contested fit near its prior only if it has this much more of the pixels within 10 %: at 50 %
    new objects both explain about half. Away from its prior a fit has no such bonus."""
    min_pixels: int = 500
    """Fewer valid pixels are no basis for a fit."""


@dataclass(frozen=True)
class Fit:
    """A fit with what is needed to judge it. Lengths are in map units; s and t are NaN where there was no fit at all.

    s: 1/(map unit * unit of d). t: 1/(map unit). Shares are of the `n_used` pixels. `inv_depth_span`: 5-95 % range of
    1/z over its median, among pixels within 10 %: the best single predictor of a bad fit. `cond`: condition number of
    the 2x2 normal matrix with d at unit rms. `z_d10`, `z_d90`: aligned depth at the 10 % and 90 % quantile of d.
    """

    s: float
    t: float
    source: str
    """`prior`, `ransac`, `ratio` (scale only), `identity` or `none`."""
    reason: str
    """Why the fit failed; empty when it did not."""
    n_used: int
    d10: float = np.nan
    d90: float = np.nan
    inlier_5pct: float = np.nan
    inlier_10pct: float = np.nan
    resid_med_pct: float = np.nan
    resid_p90_pct: float = np.nan
    bias_med_pct: float = np.nan
    resid_med: float = np.nan
    inv_depth_span: float = np.nan
    cond: float = np.nan
    z_d10: float = np.nan
    z_d90: float = np.nan
    ms: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.reason


def fit(
    disparity: Array,
    inverse_depth_map: Array,
    prior: tuple[float, float] | None,
    rng: np.random.Generator,
    options: AlignOptions = AlignOptions(),
) -> Fit:
    """Fit `1/z = s*d + t`.

    Args:
        disparity, inverse_depth_map: [N] float64, finite; the second positive, in 1/(map unit). See `samples`.
        prior: (s, t) of the last frame, tried first; RANSAC runs when it explains too few pixels, or when None.
        rng: the same state gives the same result.

    Returns:
        The fit; `reason` says why it must not be used (too few pixels, s <= 0, not finite, no disparity range).
    """
    start = time.perf_counter()
    if len(disparity) < options.min_pixels:
        return Fit(np.nan, np.nan, "none", f"fewer than {options.min_pixels} valid pixels", len(disparity))
    d, y = np.asarray(disparity, np.float64), np.asarray(inverse_depth_map, np.float64)
    z = 1 / y
    found, source = _prior_or_ransac(d, y, z, prior, rng, options)
    if found is None:
        return Fit(np.nan, np.nan, "none", "no range of disparity to fit a scale and a shift", len(d))
    return _judged(d, y, z, *found, source, start)


def fit_scale(prediction: Array, inverse_depth_map: Array, options: AlignOptions = AlignOptions()) -> Fit:
    """Fit the scale of depth that is right up to a factor: `1/z = s / prediction`, t = 0.

    prediction: [N] float64 positive depth. The median ratio, refined with the fixed cut-off of `fit`.
    """
    start = time.perf_counter()
    if len(prediction) < options.min_pixels:
        return Fit(np.nan, np.nan, "none", f"fewer than {options.min_pixels} valid pixels", len(prediction))
    d, y = 1 / np.asarray(prediction, np.float64), np.asarray(inverse_depth_map, np.float64)
    x = d / y
    s = 1 / float(np.median(x))
    for _ in range(options.rounds):
        weight = np.maximum(1 - ((s * x - 1) / options.cut_off) ** 2, 0) ** 2
        last, s = s, float(weight @ x / (weight @ (x * x)))
        if abs(s - last) <= 1e-9 * abs(s):
            break
    return _judged(d, y, 1 / y, s, 0.0, "ratio", start)


def identity(prediction: Array, inverse_depth_map: Array) -> Fit:
    """Depth that is already in map units: s = 1 and t = 0 on 1/prediction, with the residuals against the map."""
    if not len(prediction):
        return Fit(1.0, 0.0, "identity", "", 0)
    d, y = 1 / np.asarray(prediction, np.float64), np.asarray(inverse_depth_map, np.float64)
    return _judged(d, y, 1 / y, 1.0, 0.0, "identity", time.perf_counter())


def samples(
    prediction: DepthImage, map_depth: DepthImage, rng: np.random.Generator, limit: int, positive: bool = False
) -> tuple[Array, Array, float]:
    """Random pixels where both the prediction and the map have a value.

    Args:
        prediction: [H,W] float32, NaN where there is none. Sampled bilinearly at the ray of each map pixel.
        map_depth: [h,w] float32, the map rendered into the same view at any resolution; 0 = none.
        limit: pixels at most.
        positive: leave out predictions <= 0 (depth rather than disparity).

    Returns:
        prediction [N] and 1/map depth [N], float64, and the overlap: the share of the [h,w] pixels with map depth.
    """
    covered = np.flatnonzero((map_depth > 0) & np.isfinite(map_depth))
    overlap = len(covered) / map_depth.size
    values = at_map_pixels(prediction, covered, map_depth.shape)
    valid = np.isfinite(values) & (values > 0) if positive else np.isfinite(values)
    chosen = np.flatnonzero(valid)
    if len(chosen) > limit:
        chosen = rng.choice(chosen, limit, replace=False)
    return values[chosen], 1 / map_depth.ravel()[covered[chosen]].astype(np.float64), overlap


def at_map_pixels(image: DepthImage, pixels: NDArray[np.intp], shape: tuple[int, ...]) -> Array:
    """Values [N] float64 of `image` along the rays of flat pixel indices of a [h,w] image of the same view.

    Pixel centres at integers: u = (u_map + 0.5) * W / w - 0.5, bilinear; NaN next to NaN.
    """
    (height, width), (h, w) = image.shape, shape
    if (height, width) == (h, w):
        return image.ravel()[pixels].astype(np.float64)
    v = np.clip((pixels // w + 0.5) * (height / h) - 0.5, 0, height - 1)
    u = np.clip((pixels % w + 0.5) * (width / w) - 0.5, 0, width - 1)
    v0, u0 = np.minimum(v.astype(np.intp), max(height - 2, 0)), np.minimum(u.astype(np.intp), max(width - 2, 0))
    fv, fu = v - v0, u - u0
    corner, down, right = v0 * width + u0, width * (height > 1), int(width > 1)
    flat = image.ravel()
    top = flat[corner] * (1 - fu) + flat[corner + right] * fu
    bottom = flat[corner + down] * (1 - fu) + flat[corner + down + right] * fu
    mixed: Array = top * (1 - fv) + bottom * fv
    return mixed


def to_depth(disparity: DepthImage, s: float, t: float, far: float) -> DepthImage:
    """[H,W] float32 depth `1/(s*d + t)` in map units; 0 where it is not positive, beyond `far`, or not predicted."""
    inverse = np.float32(s) * disparity + np.float32(t)
    good = inverse >= 1 / far  # false for NaN
    depth: DepthImage = np.divide(1, inverse, out=np.zeros(disparity.shape, np.float32), where=good)
    return depth


def _prior_or_ransac(
    d: Array, y: Array, z: Array, prior: tuple[float, float] | None, rng: np.random.Generator, options: AlignOptions
) -> tuple[tuple[float, float] | None, str]:
    kept, kept_share, margin = None, 0.0, 0.0
    if prior is not None:
        kept = _refine(d, y, z, *prior, options.cut_off, options.rounds)
        kept_share = _within(d, z, *kept, 0.10)
        confirmed = _apart(d, prior, kept) <= options.confirmed
        if confirmed and kept_share >= options.keep_prior:
            return kept, "prior"
        margin = options.takeover if confirmed else 0.0
    best = _ransac(d, y, z, rng, options)
    if best is not None:
        best = _refine(d, y, z, *best, options.cut_off, options.rounds)
        if kept is None or _within(d, z, *best, 0.10) >= kept_share + margin:
            return best, "ransac"
    return kept, "prior"


def _ransac(
    d: Array, y: Array, z: Array, rng: np.random.Generator, options: AlignOptions
) -> tuple[float, float] | None:
    """The best (s, t) through two points, or None where no pair of pixels is far enough apart in disparity."""
    low, high = np.quantile(d, (0.05, 0.95))
    first, second = rng.integers(len(d), size=(2, 4 * options.hypotheses))
    gap = d[second] - d[first]
    with np.errstate(divide="ignore", invalid="ignore"):
        s = (y[second] - y[first]) / gap
    usable = np.flatnonzero((np.abs(gap) >= options.pair_gap * (high - low)) & (s > 0) & np.isfinite(s))
    if not len(usable):
        return None
    kept = usable[: options.hypotheses]
    s, t = s[kept], y[first[kept]] - s[kept] * d[first[kept]]
    scored = rng.permutation(len(d))[: options.score_pixels]
    order = np.argsort(_cost(d[scored], z[scored], s, t, options.widths, options.behind), kind="stable")
    refined = [
        _refine(d[scored], y[scored], z[scored], float(s[i]), float(t[i]), options.cut_off, FINALIST_ROUNDS)
        for i in _distinct(d[scored], s, t, order, options)
    ]
    ends = np.array(refined).T
    return refined[int(np.argmin(_cost(d, z, ends[0], ends[1], options.widths[1:], options.behind)))]


def _distinct(d: Array, s: Array, t: Array, order: NDArray[np.intp], options: AlignOptions) -> list[int]:
    """The best hypotheses that are not the same one again: their depths differ by 10 % at a quantile of d."""
    levels = np.maximum(s[:, None] * np.quantile(d, (0.1, 0.9)) + t[:, None], 1e-12)
    found: list[int] = []
    for i in order:
        if all(np.abs(levels[i] / levels[k] - 1).max() > 0.10 for k in found):
            found.append(int(i))
        if len(found) == options.finalists:
            break
    return found


def _cost(d: Array, z: Array, s: Array, t: Array, widths: tuple[float, ...], behind: float) -> Array:
    """Cost [M] of hypotheses (s, t): per width min((r/w)^2, 1), times `behind` where r < -w, summed over pixels.

    Single precision, in blocks that stay in the processor's cache: only the ranking matters here.
    """
    terms = np.stack([d * z, z]).astype(np.float32)
    lines = np.stack([s, t], axis=1).astype(np.float32)
    total = np.zeros(len(s))
    for start in range(0, len(d), 128):
        r = lines @ terms[:, start : start + 128] - np.float32(1)
        square = r * r
        for width in widths:
            total += np.minimum(square * np.float32(width**-2), np.float32(1)).sum(axis=1)
            total += (behind - 1) * np.count_nonzero(r < -width, axis=1)
    return total


def _refine(d: Array, y: Array, z: Array, s: float, t: float, cut_off: float, rounds: int) -> tuple[float, float]:
    """Reweighted least squares: Tukey's weight of r with the fixed cut-off, times 1/y^2 as errors are relative in z."""
    a, zz = d * z, z * z
    for _ in range(rounds):
        r = s * a
        r += t * z
        r -= 1
        r *= 1 / cut_off
        r *= r
        weight = np.maximum(1 - r, 0)
        weight *= weight
        weight *= zz
        solved = _weighted_line(d, y, weight)
        if solved is None:
            break
        moved = max(abs(solved[0] / s - 1), abs(solved[1] - t) * float(z[0])) if s else np.inf
        s, t = solved
        if moved < 1e-6:
            break
    return s, t


def _weighted_line(d: Array, y: Array, weight: Array) -> tuple[float, float] | None:
    total = float(weight.sum())
    if total <= 0:
        return None
    centre, level = float(weight @ d) / total, float(weight @ y) / total
    off = d - centre
    weighted = weight * off
    spread = float(weighted @ off)
    if not spread > 1e-12 * total * max(centre * centre, 1e-30):
        return None
    s = float(weighted @ y) / spread
    return s, level - s * centre


def _apart(d: Array, one: tuple[float, float], other: tuple[float, float]) -> float:
    """Largest relative difference of the depths that two fits give to the 10 % and 90 % quantile of d."""
    levels = np.quantile(d, (0.1, 0.9))
    a, b = one[0] * levels + one[1], other[0] * levels + other[1]
    return float(np.max(np.abs(a / b - 1))) if (a > 0).all() and (b > 0).all() else np.inf


def _within(d: Array, z: Array, s: float, t: float, width: float) -> float:
    return float(np.mean(np.abs((s * d + t) * z - 1) < width))


def _judged(d: Array, y: Array, z: Array, s: float, t: float, source: str, start: float) -> Fit:
    """The fit with its diagnostics and verdict."""
    d10, d90 = (float(q) for q in np.quantile(d, (0.1, 0.9)))
    predicted = s * d + t
    r = predicted * z - 1
    size = np.abs(r)
    near = size < 0.10
    low, middle, high = np.quantile(y[near], (0.05, 0.5, 0.95)) if near.any() else (np.nan, np.nan, np.nan)
    median, p90 = np.quantile(size, (0.5, 0.9))
    with np.errstate(divide="ignore"):
        apart = np.where(predicted > 0, np.abs(1 / predicted - z), np.inf)  # never nearer to the map than this
    aligned = [1 / level if level > 0 else np.inf for level in (s * d10 + t, s * d90 + t)]
    reason = "" if s > 0 and np.isfinite(t) else "scale not positive" if np.isfinite(s) else "fit not finite"
    return Fit(
        s, t, source, reason, len(d), d10, d90,
        inlier_5pct=float(np.mean(size < 0.05)), inlier_10pct=float(np.mean(near)),
        resid_med_pct=100 * float(median), resid_p90_pct=100 * float(p90), bias_med_pct=100 * float(np.median(r)),
        resid_med=float(np.median(apart)), inv_depth_span=float((high - low) / middle), cond=_condition(d, z, near),
        z_d10=aligned[0], z_d90=aligned[1], ms=(time.perf_counter() - start) * 1e3,
    )  # fmt: skip


def _condition(d: Array, z: Array, near: NDArray[np.bool_]) -> float:
    """Condition number of the normal matrix of (s, t) over the inliers, with d scaled to unit rms."""
    if not near.any():
        return np.nan
    d, weight = d[near] / max(float(np.sqrt(np.mean(d[near] ** 2))), 1e-300), z[near] ** 2
    cross = float(weight @ d)
    return float(np.linalg.cond(np.array([[float(weight @ (d * d)), cross], [cross, float(weight.sum())]])))
