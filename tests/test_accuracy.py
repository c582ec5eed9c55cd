"""Accuracy against known errors: every figure is checked on outputs whose error is known beforehand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from recon.accuracy import ALIGNMENT, AccuracyOptions, enforce, figures, judge, measure, reference_beside
from recon.config import Config, option
from recon.engines import Session
from recon.errors import ReconError
from recon.geometry.pose_encoding import encode_pose
from recon.network import TensorSpec


class Says(Session):
    """A session that answers what it is told to, one set of outputs after another."""

    inputs = {"x": TensorSpec((1,))}  # noqa: RUF012 - the base declares it without a value

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers, self.at = answers, 0

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.at += 1
        return {name: torch.as_tensor(value) for name, value in self.answers[self.at - 1].items()}

    def memory_mib(self) -> float:
        return 0.0

    def close(self) -> None:
        self.answers = ()


def judged(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> dict[str, Any]:
    feeds = [{"x": torch.zeros(1)} for _ in expected]
    return measure(Says(*expected), Says(*got), feeds, (56, 56))


RNG = np.random.default_rng(0)
DEPTH = RNG.uniform(1, 5, (3, 8, 8))


def test_the_scale_of_a_bootstrap_depth_is_free_and_what_is_left_is_absrel() -> None:
    found = judged([{"depth": DEPTH}], [{"depth": 7 * DEPTH}])
    assert found["absrel"] == pytest.approx(0, abs=1e-6)
    assert found["delta1"] == 1
    assert found["alignment"] == ALIGNMENT["depth"]
    third = DEPTH.copy()
    third[0] *= 1.3  # a third of the pixels, so the median is of the others
    found = judged([{"depth": DEPTH}], [{"depth": third}])
    assert found["absrel"] == pytest.approx(0.1, abs=1e-6)
    assert found["delta1"] == pytest.approx(2 / 3)


def test_one_scale_serves_all_views_of_an_input_and_each_input_has_its_own() -> None:
    found = judged([{"depth": DEPTH}, {"depth": DEPTH}], [{"depth": 2 * DEPTH}, {"depth": 5 * DEPTH}])
    assert found["absrel"] == pytest.approx(0, abs=1e-6)
    per_view = DEPTH * np.array([1.0, 1.0, 2.0])[:, None, None]
    assert judged([{"depth": DEPTH}], [{"depth": per_view}])["absrel"] == pytest.approx(1 / 3, abs=1e-6)


def test_disparity_has_scale_and_shift() -> None:
    disparity = RNG.uniform(0.5, 2, (1, 16, 16))
    found = judged([{"disparity": disparity}], [{"disparity": 3 * disparity - 4}])
    assert found["absrel"] == pytest.approx(0, abs=1e-6)
    assert found["alignment"] == ALIGNMENT["disparity"]
    assert found["rel_l2_max"] > 0.5, "the outputs themselves are far apart"
    noisy = judged([{"disparity": disparity}], [{"disparity": RNG.permutation(disparity.ravel()).reshape(1, 16, 16)}])
    assert noisy["absrel"] > 0.2


def poses(*turns_deg: float, shifts: tuple[float, ...] = (0.0, 1.0, 2.0)) -> np.ndarray:
    T = np.tile(np.eye(4), (3, 1, 1))
    T[:, :3, :3] = Rotation.from_euler("y", np.array(turns_deg)[:, None], degrees=True).as_matrix()
    T[:, 0, 3] = shifts
    K = np.tile(np.diag([50.0, 50.0, 1.0]), (3, 1, 1))
    return encode_pose(T, K, 56, 56).astype(np.float64)


def test_rotations_are_compared_pair_by_pair() -> None:
    found = judged([{"pose_enc": poses(0, 10, 20)}], [{"pose_enc": poses(0, 10, 24)}])
    assert found["rotation_deg_max"] == pytest.approx(4, abs=1e-3)
    assert found["rotation_deg_mean"] == pytest.approx(8 / 3, abs=1e-3)
    same = judged([{"pose_enc": poses(0, 0, 0)}], [{"pose_enc": poses(0, 0, 0, shifts=(0.0, 3.0, 6.0))}])
    assert same["translation_deg_max"] == pytest.approx(0, abs=1e-3), "scale is free"
    back = judged([{"pose_enc": poses(0, 0, 0)}], [{"pose_enc": poses(0, 0, 0, shifts=(0.0, 1.0, -2.0))}])
    assert back["translation_deg_max"] == pytest.approx(180, abs=1e-3)


def test_poses_that_cannot_be_decoded_are_said_and_not_hidden() -> None:
    bad = poses(0, 10, 20)
    bad[1, 3:7] = 0
    found = judged([{"pose_enc": poses(0, 10, 20)}], [{"pose_enc": bad}])
    assert "rotation_deg_max" not in found
    assert "poses not judged" in found["notes"][0]


def test_what_is_not_finite_is_refused() -> None:
    bad = DEPTH.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(ReconError, match="'depth' holds 1 NaN"):
        judged([{"depth": DEPTH}], [{"depth": bad}])


def test_a_reference_without_depth_is_said() -> None:
    found = judged([{"disparity": np.zeros((1, 4, 4))}], [{"disparity": np.ones((1, 4, 4))}])
    assert "absrel" not in found
    assert "nowhere positive" in found["notes"][0]


@pytest.mark.parametrize(("limit", "key"), [("max_absrel", "absrel"), ("max_rotation_deg", "rotation_deg_max")])
def test_limits_refuse_with_all_numbers(limit: str, key: str) -> None:
    found = {"absrel": 0.03, "rotation_deg_max": 2.5, "rel_l2_max": 0.1, "frames": "text"}
    enforce(replace(AccuracyOptions(), **{limit: found[key]}), found, "x.engine")
    with pytest.raises(ReconError, match=rf"{key} .* accuracy\.{limit}") as caught:
        enforce(replace(AccuracyOptions(), **{limit: found[key] * 0.99}), found, "x.engine")
    assert "rel_l2_max 0.1" in caught.value.problem
    assert set(figures(found)) == {"absrel", "rotation_deg_max", "rel_l2_max"}
    enforce(replace(AccuracyOptions(), **{limit: 1e-9}), {"not_measured": "no GPU"}, "x.engine")


@pytest.mark.parametrize("values", [{"batches": 0}, {"max_absrel": 0.0}, {"max_rotation_deg": -1.0}])
def test_impossible_options(values: dict[str, Any]) -> None:
    with pytest.raises(ReconError, match=next(iter(values))):
        AccuracyOptions(**values).check()


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    from test_pipeline import config

    return config(tmp_path, ["build"])


def test_an_engine_that_cannot_run_here_is_not_measured(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(settings.engine), "runs_here", lambda _: "there is no GPU")
    network = settings.depth.network()
    assert network is not None
    assert judge(settings, network, "depth", tmp_path / "x.engine") == {"not_measured": "there is no GPU"}


def test_frames_are_those_that_calibration_did_not_see(settings: Config) -> None:
    from recon.frames import sample

    settings.source = replace(option("source", "synthetic"), width=96, height=72, steps=6)
    settings.calibration.batches, network = 4, settings.depth.network()
    assert network is not None
    seen = sample(settings, network, "depth", 4)
    judged_on = sample(settings, network, "depth", 3, skip=4)
    assert judged_on.shared == 0
    assert not {frame for ids in seen.ids for frame in ids} & {frame for ids in judged_on.ids for frame in ids}


class Elsewhere(Says):
    """A session that says it runs on a GPU."""

    device = "cuda:0"


@pytest.mark.parametrize(("free_mib", "place"), [(125, "cuda:0"), (124, "cpu")])
def test_the_reference_runs_where_the_engine_runs_if_there_is_room(
    free_mib: int, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from recon.network import Network

    freed: list[str] = []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free_mib * 2**20, 2**40))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append("freed"))
    monkeypatch.setattr("recon.engines.torch.TorchSession", lambda network, module, device: Placed(device))
    found = Network("net", {}, (), "", torch.nn.Identity, lambda _: {}, memory_mib=100.0)
    with reference_beside(Elsewhere(), found) as reference:
        assert reference.device == place
        before = len(freed)
    assert bool(caplog.messages) == (place == "cpu")
    assert len(freed) == before + (place != "cpu"), "what it took is given back"
    with reference_beside(Says(), found) as reference:
        assert reference.device == "cpu"


class Placed(Says):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device


def test_the_manifest_names_where_the_reference_ran(settings: Config, tmp_path: Path) -> None:
    from recon.store import Store, built

    settings.depth = replace(option("depth", "da2-twin"), input_size=84, image_size=[1, 1])
    settings.accuracy.batches = 1
    store = Store(settings)
    found = built(store, store.networks()["depth"]).manifest.facts["accuracy"]
    assert found["reference"] == "torch fp32 on cpu"
    assert found["absrel"] < 1e-4


@pytest.mark.gpu
def test_the_reference_on_cuda_is_fp32_and_leaves_nothing_behind() -> None:
    from recon.engines.torch import TorchSession

    network = option("depth", "da-mini").network()  # type: ignore[attr-defined]
    feeds, left = [network.example(seed) for seed in (1, 2)], []
    for _ in range(2):  # the first leaves the libraries' workspaces
        with TorchSession(network, network.load()) as host, reference_beside(OnCuda(), network) as reference:
            assert reference.device == "cuda"
            found = measure(host, reference, feeds, size=(168, 224))
        left.append(torch.cuda.memory_allocated())
    assert found["rel_l2_max"] < 5e-5, "TF32 would be 1e-3 off"
    assert left[1] <= left[0]


class OnCuda(Says):
    device = "cuda"
