"""The depth pool: order, back-pressure, workers that fail, sessions of their own."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from recon.config import option
from recon.engines import Session
from recon.errors import ReconError
from recon.geometry.views import View
from recon.live import DepthAnythingPool
from recon.network import TensorSpec


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Depth Anything twin, built for ONNX Runtime by the stages that a user runs."""
    return twin(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def threes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for three images at once."""
    return twin(tmp_path_factory.mktemp("threes"), "depth.batch=3", "accuracy.examples=true")


def twin(output: Path, *overrides: str) -> Path:
    from dataclasses import replace

    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from recon.config import CONF, register
    from recon.store import Store, built

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(
            "config", ["model=recorded", "depth=da2-twin", "tracking=none", *overrides], return_hydra_config=True
        )
        HydraConfig.instance().set_config(composed)
        del composed.__dict__["_content"]["hydra"]
        config = OmegaConf.to_object(composed)
    store = Store(replace(config, output=str(output)))
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


def test_an_engine_for_several_images_gives_what_one_for_one_gives(engine: Path, threes: Path) -> None:
    frames = [*images(3), *images(2, (61, 47)), *images(2, (200, 150))]
    with DepthAnythingPool(engine) as pool:
        wanted = [result.depth for result in pool.map(frames)]
    calls: list[int] = []
    depth = option("depth", "da2-twin")

    def several(views: list[View], session: Session | None) -> list[np.ndarray]:
        assert session is not None
        infer = session.infer
        session.infer = lambda feeds: (calls.append(len(feeds["pixel_values"])), infer(feeds))[1]
        try:
            return depth.predict_several(views, session)
        finally:
            session.infer = infer

    with DepthAnythingPool(threes, predict=depth.predict, predict_several=several) as pool:
        assert pool.batch == 3
        together = [future.result() for future in pool.submit_all(frames)]
        assert calls == [3, 3]  # the seventh frame is alone in its job
        apart = [*pool.map(iter(frames)), pool.submit(frames[0]).result()]
        assert (pool.frames, pool.failures) == (15, 0)
    for results in (together, apart):
        for result, expected in zip(results, wanted, strict=False):
            assert result.error == ""
            np.testing.assert_allclose(result.depth, expected, atol=1e-5)


def test_a_frame_that_fails_costs_none_of_its_batch(threes: Path) -> None:
    frames = images(6)
    frames[1] = np.zeros((90, 120), np.uint8)  # no colour axis
    with DepthAnythingPool(threes) as pool:
        results = [future.result(20) for future in pool.submit_all(frames)]
        assert (pool.frames, pool.failures, pool.retried) == (6, 1, 1)
    assert [bool(result.error) for result in results] == [False, True, False, False, False, False]


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    from dataclasses import replace

    with pytest.raises(ReconError, match=rf"depth\.batch={batch}: .* at least 1"):
        replace(option("depth", "da2-twin"), batch=batch).network()


def test_workers_follow_from_cameras_and_batch() -> None:
    from dataclasses import replace

    depth = option("depth", "da2-twin")
    assert depth.workers_for(5) == 5
    assert replace(depth, batch=4).workers_for(5) == 2
    assert replace(depth, batch=4, workers=3).workers_for(5) == 3
    assert option("depth", "recorded").workers_for(5) == 5


class Streamless:
    """A session on a device that gives no stream."""

    device = "cuda:97"
    inputs = {"pixel_values": TensorSpec((2, 3, 14, 14))}  # noqa: RUF012

    def sibling(self) -> None:
        return None

    def close(self) -> None:
        pass


def test_a_worker_without_a_stream_fails_its_frames_and_leaves_none_waiting() -> None:
    import torch

    depth = option("depth", "da2-twin")
    with DepthAnythingPool(Streamless, workers=2, predict=depth.predict) as pool:  # type: ignore[arg-type]
        futures = pool.submit_all(images(7, (8, 8)))
        on_device = pool.submit_images([View("", 0, image) for image in images(3, (8, 8))], torch.zeros(3, 8, 8, 3))
        results = [future.result(20) for future in (*futures, *on_device)]
        assert pool.failures == 10
    assert all(result.depth is None and result.error for result in results)


def test_what_the_device_throws_reaches_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of the network, where there is no result to say it in."""
    import torch

    from recon.live import clock

    with DepthAnythingPool(lambda: None, predict=lambda view, _: np.zeros((1, 1), np.float32)) as pool:
        monkeypatch.setattr(clock.Moments, "wait", lambda self: (_ for _ in ()).throw(RuntimeError("device lost")))
        (future,) = pool.submit_images([View("", 0, images(1, (8, 8))[0])], torch.zeros(1, 8, 8, 3))
        with pytest.raises(RuntimeError, match="device lost"):
            future.result(20)
        monkeypatch.undo()
        assert pool.submit(images(1)[0]).result(20).error == ""  # the worker goes on
