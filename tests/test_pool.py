"""The depth pool: order, back-pressure, workers that fail, sessions of their own."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from recon.config import option
from recon.errors import ReconError
from recon.geometry.views import View
from recon.live import DepthAnythingPool


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Depth Anything twin, built for ONNX Runtime by the stages that a user runs."""
    from dataclasses import replace

    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from recon.config import CONF, register
    from recon.store import Store, built

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["model=recorded", "depth=da2-twin", "tracking=none"], return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        del composed.__dict__["_content"]["hydra"]
        config = OmegaConf.to_object(composed)
    store = Store(replace(config, output=str(tmp_path_factory.mktemp("pool"))))
    return built(store, store.networks()["depth"]).path


def images(count: int, size: tuple[int, int] = (90, 120)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]


def test_it_gives_what_one_session_gives_at_every_size_and_in_order(engine: Path) -> None:
    from recon.store import open_engine

    frames = [*images(3), *images(2, (61, 47)), *images(2, (200, 150))]
    depth = option("depth", "da2-twin")
    with open_engine(engine) as session:
        wanted = [depth.predict(View("", 0, image), session) for image in frames]
    with DepthAnythingPool(engine, workers=3) as pool:
        results = list(pool.map(frames))
        assert pool.frames == len(frames)
    for image, result, expected in zip(frames, results, wanted, strict=True):
        assert result.error == ""
        assert result.depth.shape == image.shape[:2]
        assert result.depth.dtype == np.float32
        np.testing.assert_allclose(result.depth, expected, atol=1e-5)


def test_a_frame_that_fails_costs_no_other(engine: Path) -> None:
    frames = images(6)
    frames[2] = np.zeros((90, 120), np.uint8)  # no colour axis
    with DepthAnythingPool(engine, workers=2) as pool:
        results = list(pool.map(frames))
        assert pool.failures == 1
    assert [bool(result.error) for result in results] == [False, False, True, False, False, False]
    assert results[2].depth is None
    assert "\n" not in results[2].error


def test_back_pressure_bounds_what_is_read_ahead() -> None:
    gate, taken = threading.Event(), []

    def frames():
        for index, image in enumerate(images(20, (4, 4))):
            taken.append(index)
            yield image

    def predict(view: View, session: None) -> np.ndarray:
        gate.wait(20)
        return np.full(view.image.shape[:2], view.image[0, 0, 0], np.float32)

    with DepthAnythingPool(lambda: None, workers=2, waiting=3, predict=predict) as pool:
        results: list[object] = []
        reader = threading.Thread(target=lambda: results.extend(pool.map(frames())))
        reader.start()
        deadline = time.monotonic() + 10
        while len(taken) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(taken) <= 2 + 3 + 1  # in the workers, in the queue, in the reader's hand
        gate.set()
        reader.join(20)
    assert [result.depth[0, 0] for result in results] == [image[0, 0, 0] for image in images(20, (4, 4))]


def test_slow_workers_do_not_change_the_order() -> None:
    def predict(view: View, session: None) -> np.ndarray:
        time.sleep(0.03 if view.image[0, 0, 0] % 3 == 0 else 0)
        return np.full((1, 1), view.image[0, 0, 0], np.float32)

    frames = [np.full((2, 2, 3), index, np.uint8) for index in range(12)]
    with DepthAnythingPool(lambda: None, workers=4, predict=predict) as pool:
        found = list(pool.map(frames))
    assert [int(result.depth[0, 0]) for result in found] == list(range(12))
    assert len({result.worker for result in found}) > 1


def test_closed_and_impossible_pools_say_so(engine: Path, tmp_path: Path) -> None:
    pool = DepthAnythingPool(engine)
    pool.close()
    pool.close()
    with pytest.raises(ReconError, match="closed"):
        pool.submit(images(1)[0])
    with pytest.raises(ReconError, match="workers=0"):
        DepthAnythingPool(engine, workers=0)
    with pytest.raises(ReconError, match="manifest"):
        DepthAnythingPool(tmp_path / "no.engine")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("depth-")]
