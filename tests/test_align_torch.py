"""The batched fit against `align.fit`: equal on the same samples and draws, and as good on draws of its own."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from test_align import SHAPE, error, frame, network, room, wobble

from recon.geometry import align_torch as ours
from recon.geometry.align import AlignOptions, Fit, fit, fit_scale, identity, samples, to_depth

OPTIONS = AlignOptions()
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
NONE = (math.nan, math.nan)


def stacked(rows: list[tuple[np.ndarray, np.ndarray]], device: str, width: int = 5000) -> ours.Samples:
    """Samples (d, y) of several cameras, padded to one length."""
    d, y, valid = np.zeros((len(rows), width)), np.ones((len(rows), width)), np.zeros((len(rows), width), bool)
    for i, (a, b) in enumerate(rows):
        d[i, : len(a)], y[i, : len(b)], valid[i, : len(a)] = a, b, True
    tensors = [torch.from_numpy(part).to(device) for part in (d, y, 1 / y, valid)]
    return ours.Samples(*tensors, tensors[3].sum(1), torch.ones(len(rows), dtype=torch.float64, device=device))


def same_draws(rows: list[tuple[np.ndarray, np.ndarray]], device: str) -> ours.Draws:
    """What `align.fit` would draw from a generator of seed 7."""
    found: list[list[np.ndarray]] = [[], [], []]
    for d, _ in rows:
        rng = np.random.default_rng(7)
        low, high = rng.integers(len(d), size=(2, 4 * OPTIONS.hypotheses))
        for part, values in zip(found, (low, high, rng.permutation(len(d))[: OPTIONS.score_pixels]), strict=True):
            part.append(values)
    return ours.Draws(*(torch.from_numpy(np.stack(part)).to(device) for part in found))


def judged(found: ours.Samples, fitted: ours.Found) -> list[Fit]:
    far = torch.zeros_like(found.overlap)
    return ours.fits(ours.figures(found, fitted, far).cpu().numpy(), OPTIONS, 0.0)


def assert_same(one: Fit, other: Fit, rel: float = 1e-5) -> None:
    assert (one.source, one.reason, one.n_used) == (other.source, other.reason, other.n_used)
    for a, b in zip(astuple(one)[5:-1], astuple(other)[5:-1], strict=True):
        assert a == pytest.approx(b, rel=rel, abs=1e-6, nan_ok=True)
    assert (one.s, one.t) == pytest.approx((other.s, other.t), rel=rel, abs=1e-6, nan_ok=True)


@DEVICE
def test_same_samples_and_draws_give_the_same_fit(device: str) -> None:
    """New objects of 0 to 50 %, with priors that are right, wrong, inverted and missing; noise alone at the end."""
    rng = np.random.default_rng(0)
    rows = [frame(seed, new)[3:5] for seed, new in ((0, 0.0), (1, 0.2), (2, 0.3), (3, 0.5), (4, 0.15), (5, 0.1))]
    rows += [(rng.normal(size=5000), rng.uniform(0.2, 1, 5000)), (rows[0][0][:700], rows[0][1][:700])]
    priors = [NONE, NONE, NONE, (0.42, -0.14), (0.64, -0.12), (-0.4, -0.12), NONE, (0.4, -0.12)]
    found = stacked([(a, b) for a, b in rows], device)
    draws = same_draws([row for row in rows if len(row[0]) == 5000], device)
    short = same_draws(rows[-1:], device)
    pad = torch.nn.functional.pad(short.scored, (0, draws.scored.shape[1] - short.scored.shape[1]), value=4999)
    draws = ours.Draws(*(torch.cat(pair) for pair in zip(
        (draws.first, draws.second, draws.scored), (short.first, short.second, pad), strict=True)))  # fmt: skip
    fitted = ours.fit(found, torch.tensor(priors, dtype=torch.float64, device=device), draws, OPTIONS)
    for (d, y), prior, one in zip(rows, priors, judged(found, fitted), strict=True):
        wanted = fit(d, y, None if math.isnan(prior[0]) else prior, np.random.default_rng(7), OPTIONS)
        assert_same(one, wanted)


@DEVICE
def test_what_is_no_fit_is_none_here_too(device: str) -> None:
    d, y = frame(0)[3:5]
    rows = [(d[:499], y[:499]), (np.ones(1000), y[:1000]), (-d, y), (d[:0], y[:0])]
    found = stacked(rows, device)
    seeds = torch.arange(len(rows), device=device)
    fitted = ours.fit(found, torch.full((4, 2), torch.nan, dtype=torch.float64, device=device),
                      ours.draw(seeds, found, OPTIONS), OPTIONS)  # fmt: skip
    few, flat, inverted, empty = judged(found, fitted)
    assert "fewer than 500" in few.reason
    assert "fewer than 500" in empty.reason
    assert "no range" in flat.reason
    assert not inverted.ok


@DEVICE
def test_scale_only_and_identity(device: str) -> None:
    rng = np.random.default_rng(0)
    depth = room(1)
    prediction = 0.25 * depth * wobble(rng, 0.02)
    prediction[:40] *= 0.5
    p, y = prediction.ravel()[:5000], 1 / depth.ravel().astype(np.float64)[:5000]
    found = stacked([(1 / p, y)], device)
    assert_same(judged(found, ours.fit_scale(found, OPTIONS))[0], fit_scale(p, y), rel=1e-6)
    assert_same(judged(found, ours.identity(found))[0], identity(p, y), rel=1e-6)
    none = stacked([(p[:0], y[:0])], device)
    assert_same(judged(none, ours.identity(none))[0], identity(p[:0], y[:0]))


@DEVICE
def test_samples_are_the_pixels_of_the_host(device: str) -> None:
    """All of them where there are fewer than the limit, and at the same rays between resolutions."""
    rng = np.random.default_rng(0)
    depth = np.where(rng.random((60, 80)) < 0.2, 0, rng.uniform(1, 4, (60, 80))).astype(np.float32)
    image = rng.normal(size=(2, 120, 160)).astype(np.float32)
    image[1, 20:40] = np.nan
    maps = torch.from_numpy(np.stack([depth, depth])).to(device)
    seeds = torch.arange(2, device=device)
    for positive in (False, True):
        found = ours.samples(torch.from_numpy(image).to(device), maps, seeds, 5000, positive)
        for i in range(2):
            d, y, overlap = samples(image[i], depth, rng, 5000, positive)
            pairs = torch.stack([found.d[i], found.y[i]], 1)[found.valid[i]].cpu().numpy()
            assert found.overlap[i].item() == overlap
            np.testing.assert_allclose(pairs[np.lexsort(pairs.T)], np.stack([d, y], 1)[np.lexsort([d, y])], rtol=1e-12)
    few = ours.samples(torch.from_numpy(image).to(device), maps, seeds, 300)
    assert few.count.tolist() == [300, 300]
    assert len(torch.unique(few.d[0])) == 300
    assert not torch.equal(few.d[0], ours.samples(torch.from_numpy(image).to(device), maps, seeds + 2, 300).d[0])


def test_hashes_are_spread_evenly() -> None:
    found = ours.hashed(torch.arange(16), 4096, 1)
    assert (found >= 0).all()
    assert len(torch.unique(found)) == found.numel()
    share = torch.bincount((found % 10).reshape(-1), minlength=10) / found.numel()
    assert (share - 0.1).abs().max() < 0.01


@DEVICE
def test_its_own_draws_fit_as_well(device: str) -> None:
    """A1 in small: 20 % and 30 % new objects, all frames in one batch."""
    frames = [frame(seed, new) for new in (0.2, 0.3) for seed in range(12)]
    predictions = torch.from_numpy(np.stack([found[1] for found in frames])).to(device)
    depths = torch.from_numpy(np.stack([found[0] for found in frames])).to(device)
    seeds = torch.arange(len(frames), device=device)
    found = ours.samples(predictions, depths, seeds, 5000)
    prior = torch.full((len(frames), 2), torch.nan, dtype=torch.float64, device=device)
    fits = judged(found, ours.fit(found, prior, ours.draw(seeds, found, OPTIONS), OPTIONS))
    errors = [error(one, f[1], f[0], ~f[2]) for one, f in zip(fits, frames, strict=True)]
    assert np.max(errors) < 0.08, errors
    assert np.median(errors) < 0.03, errors


@DEVICE
def test_depth_and_its_far_share_are_the_hosts(device: str) -> None:
    disparity, _ = network(room(3), np.random.default_rng(1), 0.1)
    disparity[:3] = np.nan
    disparity[40:60] = -5
    batch = torch.from_numpy(np.stack([disparity, disparity])).to(device)
    s, t = (torch.tensor(pair, dtype=torch.float64, device=device) for pair in ((0.4, 0.1), (-0.12, 0.3)))
    found = ours.to_depth(batch, s, t, 4.0).cpu().numpy()
    for i, pair in enumerate(((0.4, -0.12), (0.1, 0.3))):
        np.testing.assert_allclose(found[i], to_depth(disparity, *pair, 4.0), rtol=1e-6)
    share = ours.far_share(batch, ours.Found(s, t, s), 4.0, 2, True)
    thinned = disparity[1::2, 1::2]
    wanted = np.mean(to_depth(thinned[np.isfinite(thinned)], 0.4, -0.12, 4.0) == 0)
    assert share[0].item() == pytest.approx(wanted)
    assert (
        ours.far_share(torch.full((1, *SHAPE), torch.nan, device=device), ours.Found(s[:1], t[:1], s), 4, 2, True) == 1
    )


@DEVICE
def test_real_frames_give_the_hosts_fit(data_dir: Path, device: str) -> None:
    """Real map and sensor depth, simulated disparity: all pixels of the map at 80x60, so only the order differs."""
    spec = importlib.util.spec_from_file_location("alignment_simulate", data_dir / "alignment" / "simulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(data_dir / "alignment" / "views.npz", allow_pickle=False) as arrays:
        maps, sensors = arrays["map_depth_mm"][:8] / 1000, arrays["sensor_depth_mm"][:8] / 1000
    predictions = [module.simulate(sensors[i], np.random.default_rng(i), outliers=0.2)[0] for i in range(8)]
    small = [depth[4::8, 4::8].astype(np.float32) for depth in maps]
    batch = torch.from_numpy(np.stack(predictions).astype(np.float32)).to(device)
    seeds = torch.arange(8, device=device)
    found = ours.samples(batch, torch.from_numpy(np.stack(small)).to(device), seeds, 5000)
    prior = torch.full((8, 2), torch.nan, dtype=torch.float64, device=device)
    fits = judged(found, ours.fit(found, prior, ours.draw(seeds, found, OPTIONS), OPTIONS))
    for i, one in enumerate(fits):
        rng = np.random.default_rng(i)
        d, y, _ = samples(predictions[i].astype(np.float32), small[i], rng, 5000)
        wanted = fit(d, y, None, rng, OPTIONS)
        assert one.n_used == wanted.n_used
        assert (one.z_d10, one.z_d90) == pytest.approx((wanted.z_d10, wanted.z_d90), rel=0.005)
        assert one.inlier_5pct == pytest.approx(wanted.inlier_5pct, abs=0.01)
