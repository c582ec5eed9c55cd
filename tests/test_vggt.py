"""VGGT against outputs of the published code, its loader, its export, and the bootstrap around it."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.engines.torch import Torch
from recon.errors import ReconError
from recon.geometry.preprocess import example_images
from recon.geometry.views import Scale, View
from recon.models.nets import vggt as nets
from recon.models.nets.config import OUTPUTS, PRESETS
from recon.models.nets.vggt import build
from recon.models.vggt import VGGT
from recon.weights import commit, require_equal, resolve, seeded, seeded_state

ALL = ("camera", "depth", "points")
NAMES = [name for part in ALL for name in OUTPUTS[part]]
TWIN = PRESETS["vggt-twin"]
METRES = Scale("m", "synthetic scene")


def rel_l2(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64).ravel(), np.asarray(wanted, np.float64).ravel()
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def twin(**knobs) -> VGGT:
    return VGGT(
        **{"name": "vggt-twin", "preset": "vggt-twin", "weights": "seeded:0", "height": 112, "width": 112} | knobs
    )


def shapes_of(parts=ALL) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in nets.VGGT(TWIN, parts).state_dict().items()}


@pytest.fixture(scope="module")
def twin_state() -> dict[str, torch.Tensor]:
    return seeded_state(shapes_of(), 0)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vggt_tiny_seed0_3x56x84", "vggt_tiny_seed0_1x112x112"])
@torch.inference_mode()
def test_twin_equals_the_published_code(golden_dir: Path, name: str) -> None:
    golden = np.load(golden_dir / f"{name}.npz")
    images = torch.from_numpy(golden["images"])
    network = build(TWIN, ALL, tuple(images.shape[-2:]), seed=0)
    outputs = dict(zip(NAMES, network(images), strict=True))
    errors = {key: rel_l2(value, golden[key]) for key, value in outputs.items()}
    assert errors.pop("pose_enc") < 2e-6
    assert max(errors.values()) < 3e-6, errors
    if "tap.tokens.3" in golden:
        assert rel_l2(network.aggregator.patch_embed(images), golden["tap.patch_tokens"]) < 4e-6
        taps = [rel_l2(tap, golden[f"tap.tokens.{i}"]) for i, tap in enumerate(network.aggregator(images))]
        assert max(taps) < 4e-6, taps  # a swapped LayerNorm epsilon gives 8e-6


@pytest.mark.slow
@torch.inference_mode()
def test_full_network_equals_the_published_code(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "vggt_1b_seed0_2x112x112.npz")
    network = build(PRESETS["vggt-1b"], ALL, (112, 112), seed=0)
    outputs = dict(zip(NAMES, network(torch.from_numpy(golden["images"])), strict=True))
    errors = {key: rel_l2(value, golden[key]) for key, value in outputs.items()}
    assert max(errors.values()) < 1e-5, errors


def test_seeded_weights_equal_the_stored_ones(golden_dir: Path, twin_state) -> None:
    stored = load_file(golden_dir / "vggt_tiny_seed0.safetensors")
    assert stored.keys() == twin_state.keys()
    assert all(torch.equal(stored[name], twin_state[name]) for name in stored)


def test_seeded_weights_depend_on_name_and_seed_alone() -> None:
    first = seeded("a.weight", (4, 3), 0)
    assert np.array_equal(first, seeded("a.weight", (4, 3), 0))
    assert not np.array_equal(first, seeded("b.weight", (4, 3), 0))
    assert not np.array_equal(first, seeded("a.weight", (4, 3), 1))
    assert first[0, 0] == pytest.approx(-0.6429925, abs=1e-7)  # the same on every machine


def test_parameter_names_are_the_checkpoint_s() -> None:
    with torch.device("meta"):
        full = nets.VGGT(PRESETS["vggt-1b"], ALL)
    names = full.state_dict()
    assert len(names) == 1403
    assert sum(value.numel() for value in names.values()) == 1_190_596_120
    assert tuple(names["aggregator.patch_embed.patch_embed.proj.weight"].shape) == (1024, 3, 14, 14)
    assert tuple(names["camera_head.poseLN_modulation.1.weight"].shape) == (6144, 2048)
    assert tuple(names["point_head.scratch.output_conv2.2.weight"].shape) == (4, 32, 1, 1)
    assert "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight" not in names


@torch.inference_mode()
def test_switched_off_heads_change_nothing_else() -> None:
    images = twin().network(2).example(0)["images"]
    with_points = build(TWIN, ALL, (112, 112), seed=0)(images)
    without = build(TWIN, ("camera", "depth"), (112, 112), seed=0)(images)
    assert len(without) == 3
    assert all(torch.equal(a, b) for a, b in zip(without, with_points, strict=False))


@torch.inference_mode()
def test_the_graph_compiles_whole() -> None:
    network = twin().network(2)
    module, images = network.load(), network.example(1)["images"]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(module(images), compiled(images), strict=True))


@pytest.mark.parametrize("views", [1, 3])
def test_exported_file_computes_the_same(views: int, tmp_path: Path) -> None:
    import onnxruntime

    network = twin(pcd_only=False, height=56, width=84).network(views)
    module, images = network.load(), network.example(0)["images"]
    program = torch.export.export(module, (images,))
    fresh = network.example(7)["images"]
    with torch.inference_mode():
        wanted = module(fresh)
        assert all(torch.equal(a, b) for a, b in zip(program.module()(fresh), wanted, strict=True))
    torch.onnx.export(program, dynamo=True, opset_version=20, input_names=["images"], verbose=False).save(
        tmp_path / "net.onnx"
    )
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": fresh.numpy()})
    assert max(rel_l2(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-4


# --- the loader ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_files_and_folders_give_the_seeded_network(tmp_path: Path, twin_state) -> None:
    save_file(twin_state | {"track_head.extra": torch.zeros(3)}, tmp_path / "model.safetensors")
    torch.save({name: value.half().float() for name, value in twin_state.items()}, tmp_path / "net.pt")
    network = twin().network(2)
    images = network.example(0)["images"]
    wanted = network.load()(images)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        other = twin(weights=str(weights)).network(2)
        assert other.weights_key.startswith("sha256:")
        assert all(torch.equal(a, b) for a, b in zip(other.load()(images), wanted, strict=True))
    rounded = twin(weights=str(tmp_path / "net.pt")).network(2).load()(images)
    assert 0 < rel_l2(rounded[1], wanted[1]) < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("camera_head.token_norm.weight"), "1 missing: camera_head.token_norm.weight"),
        (lambda s: s.update(surprise=torch.zeros(1)), "1 unexpected: surprise"),
        (
            lambda s: s.update({"camera_head.token_norm.bias": torch.zeros(5)}),
            r"camera_head.token_norm.bias \[5\] where the network has \[128\]",
        ),
        (
            lambda s: [s.update({f"module.{k}": s.pop(k)}) for k in list(s)],
            r"285 missing: .*; 347 unexpected: module\.",
        ),
        (lambda s: s.update({"camera_head.token_norm.bias": torch.zeros(128, dtype=torch.int32)}), "int32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, twin_state, change, message: str) -> None:
    state = {name: value for name, value in twin_state.items()}
    change(state)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ReconError, match=message):
        twin(weights=str(tmp_path / "odd.safetensors")).network(1).load()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, twin_state) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(twin_state, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:100_000])
    torch.save({"weights": Path("x")}, tmp_path / "objects.pt")
    torch.save({"model": twin_state}, tmp_path / "nested.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, message in {
        "cut.safetensors": "cannot be read",
        "objects.pt": "Python objects",
        "nested.pt": r"no flat dictionary of tensors but \['model'\]",
        "raw.pt": "Python objects|cannot be read",
        "empty.pt": "cannot be read",
    }.items():
        with pytest.raises(ReconError, match=message) as caught:
            twin(weights=str(tmp_path / name)).network(1).load()
        assert name in caught.value.problem
        assert caught.value.remedy


def test_references_are_not_guessed(tmp_path: Path) -> None:
    assert resolve("facebook/VGGT-1B").hub == ("facebook/VGGT-1B", "main")
    assert resolve("seeded:7").key("x") == "seeded:7:x"
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    for reference, message in {
        "seeded:x": "no seed",
        "weights/model.pt": "no such file",
        "/nowhere/at/all": "no such file",
        str(tmp_path): "holds 2 .safetensors files",
    }.items():
        with pytest.raises(ReconError, match=message):
            resolve(reference)
    with pytest.raises(ReconError, match="1 missing: b"):
        require_equal({"a": (1,), "b": (2,)}, {"a": (1,)}, "file", "remedy")


@pytest.fixture
def offline(monkeypatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit.cache_clear()
    yield tmp_path
    commit.cache_clear()


def test_a_hub_id_without_cache_or_network_names_the_remedy(offline: Path) -> None:
    with pytest.raises(ReconError, match="facebook/VGGT-1B@main: not in the local cache") as caught:
        VGGT(name="vggt-1b").network(1)
    assert "hf download facebook/VGGT-1B" in caught.value.remedy


@torch.inference_mode()
def test_a_cached_hub_id_needs_no_network(offline: Path, twin_state) -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    snapshot = offline / "models--someone--twin" / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(sha)
    save_file(twin_state, snapshot / "model.safetensors")
    network = twin(weights="someone/twin").network(1)
    assert network.weights_key == f"hf:someone/twin@{sha}"
    images = network.example(0)["images"]
    assert torch.equal(network.load()(images)[1], twin().network(1).load()(images)[1])


# --- the option ------------------------------------------------------------------------------------------------------


def test_the_network_describes_itself() -> None:
    big = VGGT(name="vggt-1b", weights="seeded:0").network(8)
    assert big.name == "vggt-8x3x518x518-pcd"
    assert big.outputs == ("pose_enc", "depth", "depth_conf")
    assert big.inputs["images"].shape == (8, 3, 518, 518)
    assert 7_000 < big.memory_mib < 12_000
    small = twin(pcd_only=False).network(4)
    assert small.name == "vggt-twin-4x3x112x112-full"
    assert small.outputs == tuple(NAMES)
    assert small.weights_key.startswith("seeded:0:vggt-twin-")
    json.dumps(small.settings)
    example = small.example(3)["images"]
    assert example.dtype == torch.float32
    assert 0 <= example.min() < example.max() <= 1
    assert torch.equal(example, small.example(3)["images"])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"height": 500}, "model.height=500: must be a positive multiple of 14"),
        ({"width": 0}, "model.width=0"),
        ({"preset": "vggt-2b"}, "model.preset=vggt-2b"),
        ({"preprocess": "stretch"}, "model.preprocess=stretch"),
        ({"views": -1}, "model.views=-1"),
        ({"weights": "/nowhere.pt"}, "/nowhere.pt: no such file"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message: str) -> None:
    with pytest.raises(ReconError, match=message):
        twin(**knobs).check()


@pytest.fixture(scope="module")
def own_rig():
    """(option, session, views, bootstrap): what the twin itself makes of four images without poses."""
    option = twin(views=4)
    session = Torch(name="torch").session(option.network(4), None)
    images = example_images(4, (160, 120), 0)
    views = [View(f"cam_{i}", 0, image) for i, image in enumerate(images)]
    return option, session, views, option.bootstrap(views, Scale(), session)


def moved(T_world_cam: np.ndarray, scale: float) -> np.ndarray:
    """The same rig after a similarity."""
    angle = 0.7
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    out = T_world_cam.copy()
    out[:3, :3] = R @ T_world_cam[:3, :3]
    out[:3, 3] = scale * R @ T_world_cam[:3, 3] + [1, -2, 3]
    return out


def test_bootstrap_without_poses_has_no_unit(own_rig) -> None:
    _, _, views, found = own_rig
    assert (found.scale, found.depth_type, found.in_source_frame) == (Scale(), "relative", False)
    assert found.notes["known_poses_unused"] == "4 of 4 views have no pose"
    assert np.allclose(found.T_world_cam["cam_0"], np.eye(4), atol=1e-9)
    for posed in found.views:
        assert posed.image.shape == (112, 112, 3)
        assert posed.depth.dtype == posed.confidence.dtype == np.float32
        assert (posed.depth[:14] == 0).all()  # 120 rows become 84 (6 patches), so 14 white rows above and below
        assert (posed.depth[14:98] > 0).all()
        assert (posed.confidence[14:98] >= 1).all()
        f_network, f_source = posed.K[1, 1], found.K_source[posed.camera][1, 1]
        assert f_source == pytest.approx(f_network * 120 / 84)
    assert [posed.camera for posed in found.views] == [view.camera for view in views]


def test_agreeing_poses_give_the_metre(own_rig) -> None:
    option, session, views, own = own_rig
    K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
    known = [replace(view, K=K, T_world_cam=moved(own.T_world_cam[view.camera], 2.5)) for view in views]
    found = option.bootstrap(known, METRES, session)
    assert found.scale == Scale("m", "known poses")
    assert (found.depth_type, found.in_source_frame) == ("metric", True)
    assert found.notes["depth_scale_factor"] == pytest.approx(2.5, rel=1e-6)
    assert found.notes["pose_centre_residual_share"] < 1e-6
    for view, scaled, before in zip(known, found.views, own.views, strict=True):
        assert np.allclose(scaled.depth, 2.5 * before.depth, rtol=1e-5)
        assert np.array_equal(scaled.T_world_cam, view.T_world_cam)
        assert np.allclose(found.K_source[view.camera], K)
        assert scaled.K[0, 0] == pytest.approx(150 * 112 / 160)
    same_without_unit = option.bootstrap(known, Scale(), session)
    assert (same_without_unit.scale, same_without_unit.in_source_frame) == (Scale(), True)


@pytest.mark.parametrize("fault", ["centres", "rotations", "one missing", "one place"])
def test_disagreeing_poses_are_not_used(own_rig, fault: str) -> None:
    option, session, views, own = own_rig
    poses = [moved(own.T_world_cam[view.camera], 2.5) for view in views]
    if fault == "centres":
        poses[1][:3, 3] += [4, 0, 0]
    elif fault == "rotations":
        poses[1][:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ poses[1][:3, :3]
    elif fault == "one place":
        for pose in poses:
            pose[:3, 3] = 0
    known = [replace(view, T_world_cam=pose) for view, pose in zip(views, poses, strict=True)]
    if fault == "one missing":
        known[2] = replace(known[2], T_world_cam=None)
    found = option.bootstrap(known, METRES, session)
    assert (found.scale, found.in_source_frame) == (Scale(), False)
    expected = {
        "centres": "centres miss",
        "rotations": "rotations miss",
        "one missing": "1 of 4",
        "one place": "coincide",
    }
    assert expected[fault] in found.notes["known_poses_unused"]
    assert np.allclose(found.views[3].depth, own.views[3].depth)


def test_wrong_number_of_views_is_refused(own_rig) -> None:
    option, session, views, _ = own_rig
    with pytest.raises(ReconError, match="3 views and the network was built for 4"):
        option.bootstrap(views[:3], Scale(), session)
