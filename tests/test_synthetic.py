"""The synthetic source: repeatable, and its ground-truth surface is what its cameras see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recon.errors import ReconError
from recon.geometry.cameras import transform, unproject
from recon.sources import synthetic
from recon.sources.synthetic import Synthetic


def test_synthetic_source_is_consistent_and_repeatable() -> None:
    source = Synthetic(name="synthetic", width=80, height=60, steps=3, seed=2)
    source.check()
    views = source.bootstrap()
    assert [v.camera for v in views] == source.cameras() == ["cam0", "cam1", "cam2", "cam3"]
    assert {(v.image.shape, v.depth.shape, v.depth.dtype.name) for v in views if v.depth is not None} == {
        ((60, 80, 3), (60, 80), "float32")
    }
    stream = list(source.batches())
    assert len(stream) == len(source) == 3
    assert [batch[0].frame for batch in stream] == [1, 2, 3]
    assert stream[2][0].time_s == pytest.approx(3 / 15)
    synthetic._KEPT.clear()
    again = next(iter(Synthetic(name="synthetic", width=80, height=60, steps=3, seed=2).batches()))
    np.testing.assert_array_equal(again[1].image, stream[0][1].image)
    one = Synthetic(name="synthetic", width=80, height=60, seed=2, views=["cam2"]).bootstrap()
    np.testing.assert_array_equal(one[0].image, views[2].image)  # a camera does not depend on the others
    np.testing.assert_array_equal(stream[0][0].T_world_cam, views[0].T_world_cam)
    assert (source.scale().unit, source.scale().source) == ("m", "synthetic scene")
    assert [v[0].frame for v in Synthetic(name="synthetic", width=16, height=16, steps=5, frame_step=2).batches()] == [
        2,
        4,
    ]


def test_a_time_step_is_rendered_once_and_belongs_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from recon.scene import render as module

    rendered, real = [], module.render
    monkeypatch.setattr(module, "render", lambda *args, **options: rendered.append(1) or real(*args, **options))
    synthetic._KEPT.clear()
    source = Synthetic(name="synthetic", width=48, height=32, steps=3)
    first = list(source.batches())
    assert len(rendered) == 3
    for view in first[1]:
        view.image[:] = 0
        assert view.depth is not None
        view.depth[:] = -1
    other = Synthetic(name="synthetic", width=48, height=32, steps=9, frame_step=2)
    again = next(iter(other.batches()))
    assert len(rendered) == 3, "step 2 is known"
    assert all(view.image.any() and view.depth is not None and (view.depth >= 0).all() for view in again)
    next(iter(Synthetic(name="synthetic", width=48, height=32, seed=1).batches()))
    assert len(rendered) == 4, "another room"
    monkeypatch.setattr(synthetic, "KEPT_BYTES", 3 * 4 * 48 * 32 * (3 + 4))
    list(source.batches())
    assert len(synthetic._KEPT) == 3
    before = len(rendered)
    list(source.batches())
    assert len(rendered) == before, "the oldest have left, what was asked for last stays"


def test_synthetic_key_follows_the_pixels() -> None:
    base = Synthetic(name="synthetic").content_key()
    assert Synthetic(name="synthetic", steps=5).content_key() == base
    others = [{"seed": 1}, {"width": 64}, {"moving": 0}, {"fov_deg": 60.0}, {"views": ["cam1"]}, {"count": 5}]
    assert len({base, *(Synthetic(name="synthetic", **knobs).content_key() for knobs in others)}) == 7  # type: ignore[arg-type]


def test_synthetic_surface_is_where_static_depth_is_and_nowhere_else() -> None:
    from scipy.spatial import cKDTree

    source = Synthetic(name="synthetic", width=80, height=60, moving=0, count=2)
    surface = source.surface()
    tree = cKDTree(surface.points)
    for view in source.bootstrap():
        assert view.depth is not None
        assert view.K is not None
        assert view.T_world_cam is not None
        points = transform(view.T_world_cam, unproject(view.depth, view.K)).reshape(-1, 3)
        distance, _ = tree.query(points)
        assert np.quantile(distance, 0.99) < 0.05
    cells = np.floor(surface.points / 0.01)
    assert len(np.unique(cells, axis=0)) == len(cells)
    np.testing.assert_allclose(np.linalg.norm(surface.normals, axis=1), 1, atol=1e-5)
    floor = surface.points[:, 2] < 1e-3
    assert floor.sum() > 100
    assert (surface.normals[floor, 2] > 0.9999).mean() > 0.995  # the rest are feet of furniture
    assert surface.seen.all()
    moved = Synthetic(name="synthetic", width=80, height=60, moving=3, count=2).surface()
    np.testing.assert_array_equal(moved.points, surface.points)


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"width": 8}, {"fov_deg": 179.0}, {"steps": -1}, {"seed": -1}, {"fps": 0.0}]
)
def test_synthetic_refuses_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ReconError, match=f"source.{next(iter(wrong))}"):
        Synthetic(name="synthetic", **wrong).check()
