"""What moves is kept out of the map; what has come to stay gets in; what has left is forgotten."""

from dataclasses import replace

import numpy as np
import pytest

from recon.config import option
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.movers import MoverMask, residual
from recon.live.stream import FrameResult, Streamer

WALL = np.full((60, 80), 4.0, np.float32)
HERE = np.eye(4)


def with_box(column: int, depth: float = 2.0) -> np.ndarray:
    image = np.full((120, 160), 4.0, np.float32)
    image[40:80, column : column + 30] = depth
    return image


def test_a_thing_that_moves_is_never_fused() -> None:
    mask = MoverMask(3, 0.04)
    for step in range(8):
        still, share = mask.apply(with_box(10 + 14 * step % 110), WALL, HERE)
        assert still.min() != 2.0
        assert share is not None
        assert share > 0.03
        assert np.mean(still == 4.0) > 0.8


def test_a_thing_that_stays_is_fused_after_so_many_frames() -> None:
    mask = MoverMask(3, 0.04)
    seen = [bool((mask.apply(with_box(50), WALL, HERE)[0] == 2.0).any()) for _ in range(5)]
    assert seen == [False, False, True, True, True]


def test_noise_does_not_reset_the_count_and_a_thing_leaving_is_fused_at_once() -> None:
    mask, rng = MoverMask(3, 0.04), np.random.default_rng(0)
    for _ in range(3):
        noisy = (with_box(50) * (1 + 0.005 * rng.standard_normal((120, 160)))).astype(np.float32)
        still, share = mask.apply(noisy, WALL, HERE)
    assert share == 0.0
    behind = np.full((120, 160), 4.0, np.float32)
    still, share = mask.apply(behind, np.full((60, 80), 2.0, np.float32), HERE)
    assert share == 0.0
    np.testing.assert_array_equal(still, behind)


def test_a_thing_that_draws_back_is_not_fused_because_it_stood_nearer_before() -> None:
    """Where the reference is the live map's own, only what agrees with it is fused at once."""
    before = np.full((60, 80), 2.0, np.float32)  # it stood still for a while, and got into the live map
    nowhere = np.zeros((60, 80), np.bool_)
    own, bootstraps = MoverMask(3, 0.04), MoverMask(3, 0.04)
    for step in range(6):
        depth = np.full((120, 160), 2.2 + 0.2 * step, np.float32)
        assert own.apply(depth, before, HERE, anchored=nowhere)[1] == 1.0
        assert bootstraps.apply(depth, before, HERE, anchored=~nowhere)[1] == 0.0
    shares = [own.apply(depth, before, HERE, anchored=nowhere)[1] for _ in range(2)]
    assert shares == [1.0, 0.0]  # and forgets it once what is behind it has been the same for long enough
    agreeing = np.full((120, 160), 2.03, np.float32)
    assert MoverMask(3, 0.04).apply(agreeing, before, HERE, anchored=nowhere)[1] == 0.0


def test_the_tolerance_does_not_grow_with_the_moving_thing() -> None:
    """A thing over 15 % of the image is 50 % off the map; the rest is 1 % off."""
    rng = np.random.default_rng(0)
    off = np.abs(rng.normal(0, 0.01, 10_000))
    figures = {"resid_med_pct": 100 * np.median(off), "resid_p90_pct": 100 * np.quantile(off, 0.9)}
    assert residual(figures) == pytest.approx(figures["resid_p90_pct"] / 100)
    off[:1500] = 0.5
    figures = {"resid_med_pct": 100 * np.median(off), "resid_p90_pct": 100 * np.quantile(off, 0.9)}
    assert figures["resid_p90_pct"] == pytest.approx(50)
    assert residual(figures) < 0.03
    assert residual({}) == 0.0
    assert residual({"resid_med_pct": None, "resid_p90_pct": None}) == 0.0


def test_a_camera_that_moves_is_not_judged() -> None:
    mask = MoverMask(3, 0.04)
    mask.apply(with_box(50), WALL, HERE)
    there = HERE.copy()
    there[0, 3] = 0.1
    still, share = mask.apply(with_box(90), WALL, there)
    assert share is None
    assert (still == 2.0).any()
    assert MoverMask(0, 0.04).apply(with_box(50), WALL, HERE)[1] is None


@pytest.mark.parametrize("fusion", ["tsdf", "surfel"])
def test_less_smear_in_the_map(fusion: str) -> None:
    """Things walk in after the bootstrap. They leave fewer points where nothing is; what all but stands still, stays."""
    from scipy.spatial import cKDTree

    source = replace(option("source", "synthetic"), width=160, height=120, steps=10, moving=5)
    depth = replace(option("depth", "recorded"), distortion=0.0, noise=0.0, bleed=0.0, outliers=0.0)
    empty = replace(source, moving=0).bootstrap()
    bootstrap = option("model", "recorded").bootstrap(empty, source.scale(), None)
    surface = cKDTree(source.surface().points)

    def off_the_surface(found) -> int:
        return int(np.sum(surface.query(found.points().points)[0] > 0.15))

    left = {}
    for frames in (0, 5):
        maps = [replace(option("fusion", fusion), voxel=0.05).create() for _ in range(2)]
        for view in bootstrap.views:
            for found in maps:
                found.integrate(view, 0)
        before = off_the_surface(maps[0])  # edges of the furniture
        results: list[FrameResult] = []
        with DepthAnythingPool(lambda: None, workers=2, predict=depth.predict) as pool:
            streamer = Streamer(source, depth, pool, bootstrap, *maps, Align(moving_frames=frames))
            for _ in streamer.run(results.append):
                pass
        left[frames] = off_the_surface(maps[0]) - before
    assert left[0] > 100
    assert left[5] <= left[0] * {"tsdf": 0.8, "surfel": 0.6}[fusion], left  # a TSDF itself wears away what was brief
