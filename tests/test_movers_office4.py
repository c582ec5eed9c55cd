"""The mask of moving things on a real person, and the depth made for it (benchmarks/movers_office4.py, in part)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from recon.geometry.views import View

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
STEPS, AT_END = 24, (28, 52)


def loaded(name: str) -> ModuleType:
    """A script of benchmarks/, by the name that the others import it by."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    pytest.importorskip("numba")
    pytest.importorskip("cv2")
    return loaded("plane_sweep")


def test_two_slanted_planes_come_back_in_metres(sweep: ModuleType) -> None:
    """A textured wall at 2 m and a nearer square, seen by three cameras of the synthetic kind: made by ray casting."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (200, 200)), np.ones((3, 3))).astype(np.uint8)
    K = np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]])
    views, truth = [], {}
    for name, x in (("a", -0.15), ("b", 0.0), ("c", 0.15)):
        T = np.eye(4)
        T[0, 3] = x
        v, u = np.mgrid[:120, :160].astype(float)
        right, down = (u - 79.5) / 150, (v - 59.5) / 150
        wall = (2.0 + 0.2 * x) / (1 - 0.2 * right)  # z = 2 + 0.2 X
        near = (np.abs(x + right) < 0.2) & (np.abs(down) < 0.2)
        z = np.where(near, 1.0, wall)
        X, Y = x + right * z, down * z
        grey = texture[(Y * 100 + 300).astype(int), (X * 100 + 300).astype(int)]
        views.append(View(name, 0, np.repeat(grey[..., None], 3, 2), K, T))
        truth[name] = z
    settings = sweep.Sweep(near=0.6, far=4.0, planes=64, width=160)
    found = sweep.depths(views, settings, {"a": ["b", "c"], "b": ["a", "c"], "c": ["a", "b"]})
    for name, z in truth.items():
        seen = found[name] > 0
        error = np.abs(found[name] / z - 1)[seen]
        assert seen.mean() > 0.6, name
        assert np.median(error) < 0.015, name
        assert np.mean(error < 0.05) > 0.95, name


@pytest.fixture(scope="module")
def office(sweep: ModuleType, data_dir: Path) -> tuple[ModuleType, list[list[View]], dict[int, Any]]:
    """24 moments in the middle of the recording at a fifth of the resolution."""
    folder = data_dir / "office4"
    if not folder.is_dir():
        pytest.skip("no office4 in the external data")
    movers = loaded("movers_office4")
    batches = movers.recorded(folder, sweep.Sweep(width=224, planes=144, large=40, small=5), AT_END)
    outlines = {step - AT_END[0]: outline for step, outline in movers.boards(folder).items() if step >= AT_END[0]}
    return movers, batches, outlines


def test_the_depth_of_the_real_board_is_right(office: tuple[ModuleType, list[list[View]], dict[int, Any]]) -> None:
    movers, batches, outlines = office
    assert len(batches) == STEPS
    for camera, found in movers.board_depth(batches, outlines).items():
        assert found["pixels"] > 5000, camera
        assert found["measured"] > 0.4, (camera, found)
        assert found["median_pct"] < 1.5, (camera, found)
        assert found["within_5pct"] > 0.9, (camera, found)


def test_less_of_a_real_person_enters_the_map(office: tuple[ModuleType, list[list[View]], dict[int, Any]]) -> None:
    movers, batches, outlines = office
    judged = movers.judges(batches, outlines)
    bootstrap = movers.room(batches, judged)
    found, behind = {}, {}
    for frames in (0, 5):
        live, results = movers.streamed("surfel", batches, bootstrap, frames)
        found[frames] = movers.pixels(live, results, judged)
        behind[frames] = movers.left(live, batches, outlines, bootstrap)
        assert found[frames]["frames"] == found[frames]["frames_accepted"] == 3 * STEPS
    assert found[0]["moving_fused"] == found[0]["board_fused"] == found[0]["static_fused"] == 1.0
    assert found[0]["moving_pixels"] > 1000
    assert found[5]["moving_fused"] < 0.5, found
    assert found[5]["board_fused"] < 0.75, found
    assert found[5]["static_fused"] > 0.75, found
    assert found[5]["static_places_in_the_map"] > 0.9, found
    assert behind[5]["points_off_the_room"] < 0.4 * behind[0]["points_off_the_room"], behind
