"""`recon.geometry.align` for all cameras of a time step at once, in torch operations of fixed shapes.

The same algorithm and constants, batched over C cameras: nothing here depends on values, so nothing waits for the
device, and all figures leave it in one [C,K] tensor. Random draws are hashes of a seed per camera and frame: the same
on every device, whatever ran before. Where `align` stops early or takes a branch, here both are computed and one is
chosen. RANSAC runs for every camera, which costs less than asking whether it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from recon.geometry.align import FINALIST_ROUNDS, AlignOptions, Fit
from recon.geometry.views import Array

SOURCES = ("none", "prior", "ransac", "ratio", "identity")
NONE, PRIOR, RANSAC, RATIO, IDENTITY = range(len(SOURCES))
COLUMNS = (
    "s", "t", "source", "count", "overlap", "far_share", "d10", "d90", "inlier_5pct", "inlier_10pct", "resid_med_pct",
    "resid_p90_pct", "bias_med_pct", "resid_med", "inv_depth_span", "cond", "z_d10", "z_d90",
)  # fmt: skip
"""Columns of the figures."""
INDEX = {name: i for i, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Samples:
    """d, y, z [C,N] float64: prediction (or its inverse), inverse map depth and map depth of the first `count` [C]
    entries of each row, which `valid` [C,N] bool marks; the rest is 0, 1 and 1. overlap [C] float64."""

    d: Tensor
    y: Tensor
    z: Tensor
    valid: Tensor
    count: Tensor
    overlap: Tensor

    @cached_property
    def ascending(self) -> Tensor:
        """d [C,N] sorted, with what is not valid at the end."""
        return _ascending(self.d, self.valid)


@dataclass(frozen=True)
class Draws:
    """Random choices of RANSAC: both points of each pair [C,P], and the pixels that hypotheses compete on [C,M]."""

    first: Tensor
    second: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Found:
    """s, t [C] float64 (NaN where there is no fit) and source [C] int64, an index into SOURCES."""

    s: Tensor
    t: Tensor
    source: Tensor


def samples(prediction: Tensor, map_depth: Tensor, seeds: Tensor, limit: int, positive: bool = False) -> Samples:
    """As `align.samples`: at most `limit` random pixels of each camera, in random order.

    prediction [C,H,W] float32, NaN where there is none; map_depth [C,h,w] float32, 0 = none; seeds [C] int64.
    """
    cameras = len(prediction)
    known = ((map_depth > 0) & torch.isfinite(map_depth)).reshape(cameras, -1)
    values = at_map_pixels(prediction, tuple(map_depth.shape[1:]))
    good = known & torch.isfinite(values)
    good = good & (values > 0) if positive else good
    priority = torch.where(good, hashed(seeds, values.shape[1], 0), _LAST)
    chosen = priority.sort(dim=1).indices[:, :limit]
    count = good.sum(1).clamp(max=chosen.shape[1])
    valid = torch.arange(chosen.shape[1], device=prediction.device) < count[:, None]
    z = torch.where(valid, map_depth.reshape(cameras, -1).gather(1, chosen).to(torch.float64), 1.0)
    d = torch.where(valid, values.gather(1, chosen), 0.0)
    return Samples(d, 1 / z, z, valid, count, known.to(torch.float64).mean(1))


def at_map_pixels(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[C,h*w] float64 values of `image` [C,H,W] along the rays of all pixels of an [h,w] image of the same view."""
    flat = image.reshape(len(image), -1)
    if tuple(image.shape[1:]) == shape:
        return flat.to(torch.float64)
    corner, down, right, fu, fv = _between(tuple(image.shape[1:]), shape, image.device)
    top = flat[:, corner] * (1 - fu) + flat[:, corner + right] * fu
    bottom = flat[:, corner + down] * (1 - fu) + flat[:, corner + down + right] * fu
    return top * (1 - fv) + bottom * fv


def draw(seeds: Tensor, found: Samples, options: AlignOptions) -> Draws:
    """Pairs from hashes; the samples are in random order already, so the first ones compete."""
    pairs, count = 4 * options.hypotheses, found.count.clamp(min=1)[:, None]
    first, second = (hashed(seeds, pairs, salt) % count for salt in (1, 2))
    scored = torch.arange(min(options.score_pixels, found.d.shape[1]), device=seeds.device)
    return Draws(first, second, scored.expand(len(seeds), -1))


def fit(found: Samples, prior: Tensor, draws: Draws, options: AlignOptions) -> Found:
    """As `align.fit`. prior: [C,2] float64 (s, t) of the last frame, NaN where there is none."""
    d, y, z, valid = found.d, found.y, found.z, found.valid
    ends = _quantiles(found.ascending, found.count, (0.1, 0.9))
    best = _ransac(found, draws, options)
    starts = torch.stack([prior, torch.stack([best.s, best.t], 1)], 1)
    s, t = _refine(d, y, z, valid, starts[..., 0], starts[..., 1], options.cut_off, options.rounds)
    size = ((s[..., None] * d[:, None] + t[..., None]) * z[:, None] - 1).abs()
    share = ((size < 0.10) & valid[:, None]).sum(-1) / found.count.clamp(min=1)[:, None]
    has = torch.isfinite(prior[:, 0])
    confirmed = _apart(ends, prior, torch.stack([s[:, 0], t[:, 0]], 1)) <= options.confirmed
    at_once = has & confirmed & (share[:, 0] >= options.keep_prior)
    margin = torch.where(confirmed, options.takeover, 0.0)
    wins = (best.source == RANSAC) & (~has | (share[:, 1] >= share[:, 0] + margin)) & ~at_once
    enough = found.count >= options.min_pixels
    source = torch.where(wins, RANSAC, torch.where(has, PRIOR, NONE)) * enough
    s, t = (torch.where(wins, pair[:, 1], pair[:, 0]) for pair in (s, t))
    return Found(torch.where(source > 0, s, torch.nan), torch.where(source > 0, t, torch.nan), source)


def fit_scale(found: Samples, options: AlignOptions) -> Found:
    """As `align.fit_scale`, on samples of positive depth: `d` is its inverse."""
    x, valid = found.d * found.z, found.valid
    s = 1 / _quantiles(_ascending(x, valid), found.count, (0.5,))[0]
    active = torch.ones_like(s, dtype=torch.bool)
    for _ in range(options.rounds):
        weight = (1 - ((s[:, None] * x - 1) / options.cut_off) ** 2).clamp(min=0) ** 2 * valid
        better = (weight * x).sum(1) / (weight * x * x).sum(1)
        last, s = s, torch.where(active, better, s)
        active = active & ((s - last).abs() > 1e-9 * s.abs())
    source = torch.where(found.count >= options.min_pixels, RATIO, NONE)
    none = source == NONE
    return Found(torch.where(none, torch.nan, s), torch.where(none, torch.nan, 0.0), source)


def identity(found: Samples) -> Found:
    """As `align.identity`: s = 1, t = 0."""
    s = torch.ones_like(found.overlap)
    return Found(s, torch.zeros_like(s), torch.full_like(found.count, IDENTITY))


def figures(found: Samples, fitted: Found, far: Tensor) -> Tensor:
    """[C,K] float64 with the columns of COLUMNS: all that is needed to judge fits. far: [C] from `far_share`."""
    d, y, z, valid, count = found.d, found.y, found.z, found.valid, found.count
    s, t = fitted.s[:, None], fitted.t[:, None]
    predicted = s * d + t
    r = predicted * z - 1
    size = r.abs()
    near = (size < 0.10) & valid
    apart = torch.where(predicted > 0, (1 / predicted - z).abs(), torch.inf)
    sizes, signed, distances, inverse = _ascending(
        torch.stack([size, r, apart, y]), torch.stack([valid, valid, valid, near])
    )
    d10, d90 = _quantiles(found.ascending, count, (0.1, 0.9))
    middle, p90 = _quantiles(sizes, count, (0.5, 0.9))
    (bias,), (resid,) = (_quantiles(values, count, (0.5,)) for values in (signed, distances))
    low, mid, high = _quantiles(inverse, near.sum(1), (0.05, 0.5, 0.95))
    ends = [fitted.s * level + fitted.t for level in (d10, d90)]
    z10, z90 = (torch.where(level > 0, 1 / level, torch.inf) for level in ends)
    inliers = [((size < width) & valid).sum(1) / count for width in (0.05, 0.10)]
    columns = [
        fitted.s, fitted.t, fitted.source, count, found.overlap, far, d10, d90, *inliers, 100 * middle, 100 * p90,
        100 * bias, resid, (high - low) / mid, _condition(d, z, near), z10, z90,
    ]  # fmt: skip
    return torch.stack([column.to(torch.float64) for column in columns], 1)


def fits(rows: Array, options: AlignOptions, ms: float) -> list[Fit]:
    """`figures` on the host as fits with their verdicts. ms: time that all of them took together."""
    return [_judged(row, options, ms) for row in rows]


def to_depth(disparity: Tensor, s: Tensor, t: Tensor, far: float) -> Tensor:
    """As `align.to_depth`: disparity [C,...] float32, s and t [C] -> depth of the same shape, 0 where there is none."""
    shape = (-1, *(1,) * (disparity.ndim - 1))
    inverse = s.to(torch.float32).reshape(shape) * disparity + t.to(torch.float32).reshape(shape)
    return torch.where(inverse >= 1 / far, 1 / inverse, 0.0)


def as_disparity(prediction: Tensor, affine: bool) -> Tensor:
    """What `to_depth` takes: the prediction itself, or the inverse of positive depth; NaN where there is none."""
    return prediction if affine else torch.where(prediction > 0, 1 / prediction, torch.nan)


def far_share(prediction: Tensor, fitted: Found, far: float, step: int, affine: bool) -> Tensor:
    """[C] share of the predicted pixels, every `step`-th, whose depth is not positive or beyond `far`; 1 of none."""
    thinned = prediction[:, step // 2 :: step, step // 2 :: step]
    predicted = torch.isfinite(thinned)
    lost = (to_depth(as_disparity(thinned, affine), fitted.s, fitted.t, far) == 0) & predicted
    count = predicted.sum((1, 2))
    return torch.where(count > 0, lost.sum((1, 2)) / count.clamp(min=1), 1.0)


def hashed(seeds: Tensor, count: int, salt: int) -> Tensor:
    """[C,count] int64 in [0, 2^63): splitmix64 of seed, position and salt."""
    x = torch.arange(count, device=seeds.device) * _signed(0x9E3779B97F4A7C15) + (seeds[:, None] * 4 + salt)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shifted(x, 31)) & _LAST


_LAST = (1 << 63) - 1


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _ransac(found: Samples, draws: Draws, options: AlignOptions) -> Found:
    """The best pair through two points of each camera; source RANSAC where there is one."""
    d, y, valid = found.d, found.y, found.valid
    low, high = _quantiles(found.ascending, found.count, (0.05, 0.95))
    d1, y1, d2, y2 = (part.gather(1, at) for at in (draws.first, draws.second) for part in (d, y))
    gap = d2 - d1
    s = (y2 - y1) / gap
    usable = (gap.abs() >= options.pair_gap * (high - low)[:, None]) & (s > 0) & torch.isfinite(s)
    order = torch.arange(s.shape[1], device=d.device) + torch.where(usable, 0, s.shape[1])
    kept = order.sort(dim=1).indices[:, : options.hypotheses]
    s, usable = s.gather(1, kept), usable.gather(1, kept)
    t = y1.gather(1, kept) - s * d1.gather(1, kept)
    d_some, y_some, z_some, valid_some = (values.gather(1, draws.scored) for values in (d, y, found.z, valid))
    cost = torch.where(usable, _cost(d_some, z_some, valid_some, s, t, options.widths, options.behind), torch.inf)
    s, t, real = _finalists(d_some, valid_some, s, t, cost, options.finalists)
    s, t = _refine(d_some, y_some, z_some, valid_some, s, t, options.cut_off, FINALIST_ROUNDS)
    cost = torch.where(real, _cost(d, found.z, valid, s, t, options.widths[1:], options.behind), torch.inf)
    best = cost.argmin(1, keepdim=True)
    source = torch.where(usable.any(1), RANSAC, NONE)
    return Found(s.gather(1, best)[:, 0], t.gather(1, best)[:, 0], source)


def _finalists(
    d: Tensor, valid: Tensor, s: Tensor, t: Tensor, cost: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best hypotheses that are not the same one again, [C,count] each, and which of them are real."""
    ends = _quantiles(_ascending(d, valid), valid.sum(1), (0.1, 0.9))
    levels = torch.stack([(s * end[:, None] + t).clamp(min=1e-12) for end in ends], 2)
    picked, real = [], []
    left = cost
    for _ in range(count):
        best = left.argmin(1, keepdim=True)
        picked.append(best)
        real.append(torch.isfinite(left.gather(1, best)))
        own = levels.gather(1, best[..., None].expand(-1, -1, 2))
        left = torch.where((levels / own - 1).abs().amax(2) > 0.10, left, torch.inf)
    chosen = torch.cat(picked, 1)
    return s.gather(1, chosen), t.gather(1, chosen), torch.cat(real, 1)


def _cost(
    d: Tensor, z: Tensor, valid: Tensor, s: Tensor, t: Tensor, widths: tuple[float, ...], behind: float
) -> Tensor:
    """Cost [C,M] of hypotheses s, t [C,M]; see `align._cost`. Single precision: only the ranking matters."""
    single = torch.float32
    a, z, mask = (part.to(single)[:, None] for part in (d * z, z, valid))
    r = s.to(single)[..., None] * a
    r += t.to(single)[..., None] * z
    r -= 1
    square = r * r
    total = torch.zeros_like(s)
    for width in widths:
        each = (square * width**-2).clamp_(max=1)
        each += (behind - 1) * (r < -width)
        total += (each * mask).sum(-1)
    return total


def _refine(
    d: Tensor, y: Tensor, z: Tensor, valid: Tensor, s: Tensor, t: Tensor, cut_off: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """As `align._refine` for pairs s, t [C,M] on samples [C,N]. A pair that has settled stays as it is."""
    d, y, z, valid = d[:, None], y[:, None], z[:, None], valid[:, None]
    a, zz, first = d * z, z * z * valid, z[..., 0]
    active = torch.ones_like(s, dtype=torch.bool)
    for _ in range(rounds):
        r = (s[..., None] * a + t[..., None] * z - 1) * (1 / cut_off)
        weight = (1 - r * r).clamp_(min=0)
        weight = weight * weight * zz
        total = weight.sum(-1)
        centre, level = (weight * d).sum(-1) / total, (weight * y).sum(-1) / total
        off = d - centre[..., None]
        weighted = weight * off
        spread = (weighted * off).sum(-1)
        solved = active & (total > 0) & (spread > 1e-12 * total * (centre * centre).clamp(min=1e-30))
        better = (weighted * y).sum(-1) / spread
        shift = level - better * centre
        moved = torch.maximum((better / s - 1).abs(), (shift - t).abs() * first)
        s, t = torch.where(solved, better, s), torch.where(solved, shift, t)
        active = solved & ~(moved < 1e-6)
    return s, t


def _apart(ends: tuple[Tensor, ...], one: Tensor, other: Tensor) -> Tensor:
    """Largest relative difference [C] of the depths that two pairs [C,2] give; infinite where one is not positive."""
    levels = torch.stack(ends, 1)
    a, b = (pair[:, :1] * levels + pair[:, 1:] for pair in (one, other))
    return torch.where(((a > 0) & (b > 0)).all(1), (a / b - 1).abs().amax(1), torch.inf)


def _ascending(values: Tensor, valid: Tensor) -> Tensor:
    """Sorted along the last axis, what is not valid at the end."""
    return torch.where(valid, values, torch.inf).sort(dim=-1).values


def _quantiles(ascending: Tensor, count: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Quantiles [C] of the first `count` values of each row, linear between neighbours; NaN of none."""
    last = (count - 1).clamp(min=0)
    at = torch.stack([share * last for share in shares], 1)
    low = at.floor().to(torch.int64)
    a, b = ascending.gather(1, low), ascending.gather(1, torch.minimum(low + 1, last[:, None]))
    mixed = torch.where(a == b, a, a + (b - a) * (at - low))
    return tuple(torch.where(count[:, None] > 0, mixed, torch.nan).unbind(1))


def _condition(d: Tensor, z: Tensor, near: Tensor) -> Tensor:
    """As `align._condition`: from the eigenvalues of the symmetric 2x2 matrix."""
    rms = ((d * d * near).sum(1) / near.sum(1)).sqrt().clamp(min=1e-300)
    d, weight = d / rms[:, None], z * z * near
    a, b, c = (weight * d * d).sum(1), (weight * d).sum(1), weight.sum(1)
    largest = (a + c + ((a - c) ** 2 + 4 * b * b).sqrt()) / 2
    return largest * largest / (a * c - b * b)


@cache  # never dropped: recorded graphs read what it returned
def _between(
    image: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, int, int, Tensor, Tensor]:
    """Where the pixels of an [h,w] image fall in a larger or smaller one: see `align.at_map_pixels`."""
    (height, width), (h, w) = image, shape
    pixels = torch.arange(h * w, device=device)
    v = ((pixels // w + 0.5).to(torch.float64) * (height / h) - 0.5).clamp(0, height - 1)
    u = ((pixels % w + 0.5).to(torch.float64) * (width / w) - 0.5).clamp(0, width - 1)
    v0 = v.to(torch.int64).clamp(max=max(height - 2, 0))
    u0 = u.to(torch.int64).clamp(max=max(width - 2, 0))
    return v0 * width + u0, width * (height > 1), int(width > 1), u - u0, v - v0


def _judged(row: Array, options: AlignOptions, ms: float) -> Fit:
    value = {name: float(number) for name, number in zip(COLUMNS, row, strict=True)}
    count, source = int(value["count"]), SOURCES[int(value["source"])]
    if source == "identity" and not count:
        return Fit(1.0, 0.0, source, "", 0)
    if source == "none":
        few = count < options.min_pixels
        reason = f"fewer than {options.min_pixels} valid pixels" if few else (
            "no range of disparity to fit a scale and a shift"
        )  # fmt: skip
        return Fit(float("nan"), float("nan"), "none", reason, count)
    s, t = value["s"], value["t"]
    finite = [abs(number) < float("inf") for number in (s, t)]
    reason = "" if s > 0 and finite[1] else "scale not positive" if finite[0] else "fit not finite"
    kept = {name: value[name] for name in COLUMNS[INDEX["d10"] :]}
    return Fit(s, t, source, reason, count, **kept, ms=ms)
