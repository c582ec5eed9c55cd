"""The training recipe: what it optimises, that data and continuation are reproducible, that training and use agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recon.geometry.pose_encoding import encode_pose
from recon.models.nets.config import PRESETS
from recon.models.nets.vggt import build
from recon.scene.generate import generate, rig
from recon.weights import resolve
from training import losses
from training.data import FIRST_SEED, Stream, make_pool
from training.loop import Plan, Trainer, resume, save
from training.network import BatchedVGGT
from training.train_da import loss as da_loss
from training.train_vggt import loss as vggt_loss

SIZE, TWIN = (28, 42), PRESETS["vggt-twin"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool():
    return make_pool(3, CPU, workers=1)


@pytest.fixture(scope="module")
def stream(pool) -> Stream:
    return Stream(pool, SIZE, images=8, seed=0, compiled=False)


def trainer(seed: int = 0) -> Trainer:
    model = BatchedVGGT(TWIN, SIZE, seed, compiled=False, bf16=False)
    return Trainer(model, Plan(images=8, total=40, warmup=2, rate=3e-3))


def test_batches_follow_from_seed_and_step(pool, stream: Stream) -> None:
    again = Stream(pool, SIZE, images=8, seed=0, compiled=False)
    first, other = stream.batch(5), stream.batch(6)
    for name in ("images", "depth", "pose", "K"):
        assert torch.equal(getattr(first, name), getattr(again.batch(5), name))
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)
    assert FIRST_SEED >= 10_000, "seeds 0..199 are held out"


def test_cameras_are_rigid_and_stand_clear_in_the_room(pool, stream: Stream) -> None:
    for step in range(6):
        batch = stream.batch(step, views=4)
        R = batch.pose[..., :3, :3]
        assert torch.allclose(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-5)
        assert torch.allclose(torch.linalg.det(R), torch.ones(R.shape[:2]), atol=1e-5)
        assert (batch.depth > 0).all(), "every ray of a camera inside a closed room meets something"
        height = batch.pose[..., 2, 3]
        assert ((height > 0.2) & (height < 2.9)).all()


def test_one_batch_is_learned(stream: Stream) -> None:
    run, batch = trainer(), stream.batch(1, views=4)
    found = [float(run.advance(lambda net, step: vggt_loss(net, batch))[0]) for _ in range(15)]
    assert found[-1] < 0.7 * found[0]


def test_disparity_of_one_batch_is_learned(stream: Stream, pool) -> None:
    from training.disparity import TrainedDisparity

    run = Trainer(TrainedDisparity(0, compiled=False, bf16=False), Plan(images=8, total=40, warmup=2))
    batch = stream.batch(1, views=2)
    found = [float(run.advance(lambda net, step: da_loss(net, batch))[0]) for _ in range(10)]
    assert found[-1] < 0.8 * found[0]


def test_resumed_run_is_bit_identical(stream: Stream, tmp_path: Path) -> None:
    def step(net, number):
        return vggt_loss(net, stream.batch(number))

    whole, first = trainer(), trainer()
    for _ in range(4):
        whole.advance(step)
    for _ in range(2):
        first.advance(step)
    save(first, tmp_path / "state.pt")
    second = trainer(seed=7)  # other weights: everything must come from the file
    assert not resume(second, tmp_path / "none.pt")
    second.plan = whole.plan
    assert resume(second, tmp_path / "state.pt")
    for _ in range(2):
        second.advance(step)
    assert second.step == whole.step
    for a, b in zip(whole.parameters + whole.average, second.parameters + second.average, strict=True):
        assert torch.equal(a, b)


def test_trained_form_equals_the_form_in_use(tmp_path: Path) -> None:
    model = BatchedVGGT(TWIN, SIZE, 3, compiled=False, bf16=False)
    with torch.no_grad():
        for p in model.net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    save_file({k: v.contiguous() for k, v in model.net.state_dict().items()}, tmp_path / "w.safetensors")
    network = build(TWIN, ("camera", "depth"), SIZE, file=tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        poses, depth, conf = model(images)
        for scene in range(2):
            pose, d, c = network(images[scene])
            assert torch.allclose(pose, poses[-1, scene], atol=1e-5)
            assert torch.allclose(d, depth[scene], rtol=1e-4)
            assert torch.allclose(c, conf[scene], rtol=1e-4)


def test_pose_encoding_equals_the_library() -> None:
    cameras = rig(generate(3), 3, 6, 42, 28)
    T = np.linalg.inv(cameras.T_world_cam)
    ours = losses.encode(torch.as_tensor(T), torch.as_tensor(cameras.K), SIZE)
    assert np.allclose(ours.numpy(), encode_pose(T, cameras.K, *SIZE), atol=1e-6)


def test_truth_is_normalised_to_unit_mean_distance(stream: Stream) -> None:
    batch = stream.batch(2, views=2)
    depth, T, scale = losses.normalised(batch.depth, batch.pose, batch.K)
    assert torch.allclose(T[:, 0], torch.eye(4).expand_as(T[:, 0]), atol=1e-5)
    _, _, again = losses.normalised(depth, losses.inverse(T), batch.K)
    assert torch.allclose(again, torch.ones_like(again), atol=1e-4)
    assert ((scale > 0.3) & (scale < 7)).all()


def test_disparity_loss_ignores_scale_and_shift() -> None:
    truth = 0.2 + torch.rand(2, 28, 42, generator=torch.Generator().manual_seed(0))
    assert losses.disparity_loss(3 * truth + 0.7, truth) < 1e-5
    assert losses.disparity_loss(truth.flip(-1), truth) > 0.1


def test_confidence_is_rewarded_where_the_depth_is_right() -> None:
    truth = torch.ones(1, 8, 8)
    right, wrong = truth.clone(), truth + 1.0
    low, high = torch.full_like(truth, 1.1), torch.full_like(truth, 5.0)
    assert losses.depth_loss(right, high, truth) < losses.depth_loss(right, low, truth)
    assert losses.depth_loss(wrong, high, truth) > losses.depth_loss(wrong, low, truth)


def test_packaged_networks_know_two_held_out_rooms() -> None:
    from training.evaluate import evaluate_da, evaluate_vggt

    vggt, da = resolve("packaged:vggt-mini.safetensors").file, resolve("packaged:da-mini").file
    assert vggt is not None
    assert da is not None
    assert vggt.stat().st_size + da.stat().st_size < 25_000_000
    poses = evaluate_vggt(PRESETS["vggt-mini"], vggt, range(2), CPU)[0]
    assert poses["absrel"] < 0.05
    assert poses["rotation_median_deg"] < 5
    disparity = evaluate_da(da.parent, range(1), CPU)[0]
    assert disparity["absrel"] < 0.05
