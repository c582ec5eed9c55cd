"""The torch surfels against the compiled ones: on the CPU the same bytes, on CUDA (`-m gpu`) the same within rounding."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_fusion import BALL, RADIUS, K, depth_of, pose, poses, real_views, view_of

from recon.errors import ReconError
from recon.fusion.device import surfel_render, surfel_update, surfel_windows, surfels
from recon.fusion.device.cameras import cameras, pack_camera
from recon.fusion.device.inputs import upload
from recon.fusion.device.surfel_sight import Eye, Sight
from recon.fusion.device.surfels import DeviceSurfelMap
from recon.fusion.surfel import COLUMNS, Surfel, SurfelMap
from recon.geometry.metrics import surface_metrics
from recon.geometry.views import PosedDepth

DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
VOXEL = 0.03
K_SMALL, SMALL = np.diag([1 / 3, 1 / 3, 1]) @ K, (80, 60)
Columns = dict[str, NDArray[Any]]


def halved(view: PosedDepth) -> PosedDepth:
    """Every second pixel: pixel (u, v) is (2u, 2v) of the larger image."""
    small = np.ascontiguousarray(view.image[::2, ::2])
    return replace(view, image=small, depth=view.depth[::2, ::2].copy(), K=np.diag([0.5, 0.5, 1]) @ view.K)


def scene(n: int = 8, until: int = 99) -> list[PosedDepth]:
    """Views of a tilted wall with a ball before it, which is gone after view `until`, in noisy colours."""
    views = [halved(view_of(T, 30, ball=i <= until)) for i, T in enumerate(poses(n))]
    rng = np.random.default_rng(0)
    shift = np.array([[0, 0, 0.1372], [0, 0, -0.2119], [0, 0, 0]])  # no round numbers: they would hide rounding
    return [
        replace(view, image=rng.integers(0, 256, view.image.shape, dtype=np.uint8), K=view.K + shift) for view in views
    ]


def both(option: Surfel, views: list[PosedDepth], device: str) -> tuple[SurfelMap, DeviceSurfelMap]:
    compiled, ours = SurfelMap(option), DeviceSurfelMap(option, device)
    for i, view in enumerate(views):
        compiled.integrate(view, i)
        ours.integrate(view, i)
    return compiled, ours


def columns_of(found: SurfelMap | DeviceSurfelMap) -> Columns:
    return {name: torch.as_tensor(column[: found.size]).cpu().numpy() for name, column in found.columns.items()}


def assert_same(wanted: SurfelMap | DeviceSurfelMap, found: DeviceSurfelMap) -> None:
    """Every column the same: to the byte on the CPU; a GPU may round a surfel to another pixel here and there."""
    if found.device.type == "cuda":
        assert found.size == pytest.approx(wanted.size, rel=1e-3)
        if found.size != wanted.size:
            return
    for name, column in columns_of(wanted).items():
        other = columns_of(found)[name]
        assert column.dtype == other.dtype
        if found.device.type == "cpu":
            assert column.tobytes() == other.tobytes(), name
        else:
            assert np.mean(np.abs(column.astype(np.float64) - other) > 1e-4) < 1e-3, name


@DEVICE
@pytest.mark.parametrize(
    "option",
    [
        Surfel(voxel=VOXEL), Surfel(voxel=VOXEL, weight_cap=2, patience=1), Surfel(voxel=0.01, unit_depth=1.5),
        Surfel(voxel=0.1, gate_voxels=0.5, gate_share=0, radius=2, max_depth=2.1),
    ],
)  # fmt: skip
def test_surfels_are_the_compiled_maps(option: Surfel, device: str) -> None:
    compiled, ours = both(option, scene(until=5), device)
    held = columns_of(compiled)
    assert compiled.size > 300
    assert (held["last"] > held["first"]).any()
    assert (held["violations"] > 0).any() == (option.patience > 1)
    assert_same(compiled, ours)


@DEVICE
def test_rendered_depth_is_the_compiled_maps(device: str) -> None:
    compiled, ours = both(Surfel(voxel=0.02), scene(5), device)
    k, size = np.diag([0.5, 0.5, 1]) @ K, (120, 90)
    for T in (pose(0.05, (0.05, 0.02, 0.03)), pose(0.3, (0.3, 0.1, 0.2)), pose(0, (0, 0, 0.9)), pose(0, (0, 0, 4))):
        wanted, found = compiled.render_depth(k, T, *size), ours.render_depth(k, T, *size)
        assert found.dtype == np.float32
        assert (wanted > 0).any() == (T[2, 3] < 3)  # from behind there are no front faces
        near = np.abs(wanted - found) <= 2e-6 * wanted
        assert near.mean() >= (1 if device == "cpu" else 0.999)


@DEVICE
def test_kernels_give_what_their_torch_twins_give(device: str) -> None:
    """On CUDA, or with TRITON_INTERPRET=1 in Triton's interpreter, which takes a minute."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on CUDA, or with TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from recon.fusion.device import surfel_launch

    option, views = Surfel(voxel=0.06, unit_depth=0.1, stale_frames=1), [halved(view) for view in scene(6, until=3)]
    ours = DeviceSurfelMap(option, "cpu")
    for i, view in enumerate(views[:5]):
        ours.integrate(view, i)
    columns = {name: column[: ours.size] for name, column in ours.columns.items()}
    there = {name: column.to(device) for name, column in columns.items()}
    twin, kernel = (sight_of(views[5], option, where) for where in ("cpu", device))
    normals, found = twin.normals(), surfel_launch.normals(kernel)
    assert (normals - found.cpu()).abs().max() < 1e-14  # torch's square roots on the CPU are off by a bit
    (wanted, covered), (other, marked) = (
        surfel_update.merge(columns, twin, normals, 5),
        surfel_launch.merge(there, kernel, found, 5),
    )
    assert 0 < (wanted["weight"] == 0).sum() < len(wanted["weight"])
    assert 0 < covered.sum() < covered.numel()
    assert torch.equal(covered, marked.cpu())
    for name, column in wanted.items():
        assert torch.equal(column, other[name].cpu()), name
    passes = surfel_render._passes(columns, twin.eye, SMALL, option.voxel, 1e9)
    for one, two in zip(passes, surfel_launch.splat(there, kernel.eye, SMALL, option.voxel, 1e9), strict=True):
        assert len(one.unique()) > 100
        assert torch.equal(one, two.cpu())


def sight_of(view: PosedDepth, option: Surfel, device: str) -> Sight:
    where = torch.device(device)
    eye = Eye.of(cameras(pack_camera(view.K, view.T_world_cam)[None], where))
    return Sight(*upload(view, where, 10.0, 0.0), eye, option, 0.1)


@DEVICE
@pytest.mark.parametrize("degrees", [0, 60])
def test_rendered_depth_of_a_plane_is_unbiased(degrees: int, device: str) -> None:
    ours = DeviceSurfelMap(Surfel(voxel=VOXEL), device)
    for i, T in enumerate(poses(3)):
        ours.integrate(view_of(T, degrees, ball=False), i)
    T = pose(0.03, (0.02, 0.01, 0.0))
    found, truth = ours.render_depth(K_SMALL, T, *SMALL), depth_of(T, degrees, False, *SMALL)
    valid = (found > 0) & (truth > 0)
    assert valid.mean() > 0.8 * (truth > 0).mean()
    assert abs(((found - truth)[valid] / VOXEL).mean()) < 0.1


@DEVICE
def test_rendering_does_not_depend_on_the_order_of_surfels(device: str) -> None:
    """What floating sums by atomics would not give: the same bytes for any order, and so in any run."""
    ours = DeviceSurfelMap(Surfel(voxel=VOXEL), device)
    for i, view in enumerate(scene(4)):
        ours.integrate(view, i)
    before, shuffled = ours.render_depth(K, pose(), 240, 180), torch.randperm(ours.size, device=ours.device)
    for column in ours.columns.values():
        with torch.inference_mode():
            column[: ours.size] = column[: ours.size][shuffled]
    assert before.tobytes() == ours.render_depth(K, pose(), 240, 180).tobytes()


@DEVICE
def test_same_input_gives_the_same_bytes_in_pieces_of_any_length(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    views, option = scene(4, until=1), Surfel(voxel=VOXEL)
    maps = [DeviceSurfelMap(option, device) for _ in range(3)]
    depths = []
    for number, found in enumerate(maps):
        if number == 2:
            monkeypatch.setattr(surfel_update, "_ROWS", 1000)
            monkeypatch.setattr(surfel_windows, "_PAIRS", {device: 777})
        for i, view in enumerate(views):
            found.integrate(view, i)
        depths.append(found.render_depth(K_SMALL, pose(), *SMALL).tobytes())
    assert maps[0].size > 2000
    assert len(set(depths)) == 1
    for name, column in columns_of(maps[0]).items():
        assert {columns_of(found)[name].tobytes() for found in maps} == {column.tobytes()}, name


@DEVICE
def test_tensors_are_taken_where_they_lie_and_give_the_same_map(device: str) -> None:
    option = Surfel(voxel=VOXEL, min_confidence=0.5)
    views = [replace(view, confidence=(view.depth < 2.2).astype(np.float32)) for view in scene(3)]
    compiled, ours = both(option, views, device)
    direct = DeviceSurfelMap(option, device)
    for i, view in enumerate(views):
        parts: Any = {
            name: torch.from_numpy(getattr(view, name)).to(device) for name in ("depth", "image", "confidence")
        }
        taken = replace(view, **parts)
        assert upload(taken, direct.device, 10.0, 0.5)[1].data_ptr() == parts["image"].data_ptr()
        direct.integrate(taken, i)
    assert_same(compiled, ours)
    assert_same(ours, direct)
    assert direct.render(K_SMALL, pose(), *SMALL).device.type == device


@DEVICE
def test_points_are_the_compiled_maps(device: str) -> None:
    compiled, ours = both(Surfel(voxel=VOXEL), scene(2), device)
    wanted, found = compiled.points(), ours.points()
    assert len(found.points) == pytest.approx(len(wanted.points), rel=1e-3)
    assert ours.mesh() is None
    for name in ("points", "normals", "colors"):
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        if device == "cpu":
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    found.points[:] = 0  # a copy: the map stays
    assert ours.points().points.any()


@DEVICE
def test_what_has_gone_is_forgotten_at_once(device: str) -> None:
    """S3, on a ball: a surfel that three frames see through is gone."""
    ours = DeviceSurfelMap(Surfel(), device)

    def on_ball() -> int:
        points = ours.points().points
        return int(np.sum((np.linalg.norm(points - BALL, axis=1) < RADIUS + 0.05) & (points[:, 2] < 1.6)))

    for i in range(6):
        ours.integrate(halved(view_of(poses(4)[i % 4])), i)
    counts = [on_ball()]
    for i in range(6, 10):
        ours.integrate(halved(view_of(poses(4)[i % 4], ball=False)), i)
        counts.append(on_ball())
    assert counts[0] > 300
    assert counts[2] > 0.9 * counts[0]
    assert counts[4] < 0.05 * counts[0]


@DEVICE
def test_light_surfels_age_with_frames_that_have_depth(device: str) -> None:
    ours = DeviceSurfelMap(Surfel(unit_depth=0.5), device)  # at 2 m an observation weighs 1/16
    view = halved(view_of(pose(), ball=False))
    away = replace(view, T_world_cam=pose(0, (50, 0, 0)))
    ours.integrate(view, 0)
    first = ours.size
    assert first > 500
    ours.integrate(replace(away, depth=np.zeros_like(view.depth)), 31)
    ours.integrate(away, 30)
    assert (ours.points().points[:, 0] < 25).sum() == first
    ours.integrate(away, 31)
    assert not (ours.points().points[:, 0] < 25).any()


@DEVICE
def test_nothing_in_nothing_out(device: str) -> None:
    ours, view = DeviceSurfelMap(Surfel(voxel=VOXEL), device), scene(1)[0]
    for value in (0.0, np.nan, np.inf, -1.0, 11.0):
        ours.integrate(replace(view, depth=np.full_like(view.depth, value)), 0)
    assert ours.stats()["surfels"] == 0
    assert not ours.render_depth(K, pose(), 20, 10).any()
    assert ours.render_depth(K, pose(), 20, 10).shape == (10, 20)
    assert len(ours.points().points) == 0
    ours.integrate(view, 1)
    before = columns_of(ours)
    ours.integrate(replace(view, depth=np.zeros_like(view.depth)), 99)
    assert {name: column.tobytes() for name, column in columns_of(ours).items()} == {
        name: column.tobytes() for name, column in before.items()
    }
    assert not ours.render_depth(K, pose(np.pi), 60, 40).any()


@DEVICE
def test_memory_doubles_with_the_surfels_and_then_stays(device: str) -> None:
    ours, views = DeviceSurfelMap(Surfel(voxel=0.01), device), scene(3)
    row = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in COLUMNS.values())
    sizes = []
    for i in range(12):
        ours.integrate(views[i % 3], i)
        stats = ours.stats()
        assert stats["surfels"] <= stats["surfels_capacity"] < 2.2 * max(stats["surfels"], 1024)
        assert stats["memory_mib"] * 2**20 == stats["surfels_capacity"] * row
        assert all(len(column) == stats["surfels_capacity"] for column in ours.columns.values())
        sizes.append(stats["surfels"])
    assert sizes[0] > 4000
    assert sizes[-1] < 1.02 * sizes[5]


def test_a_full_device_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, view = DeviceSurfelMap(Surfel(voxel=VOXEL), "cpu"), scene(1)[0]
    ours.integrate(view, 0)
    before = columns_of(ours)
    monkeypatch.setattr(surfels, "free_bytes", lambda device: 1 << 16)
    with pytest.raises(ReconError, match=r"surfels.*0 MiB left") as refused:
        ours.integrate(replace(view, T_world_cam=pose(0, (9.0, 0, 0))), 1)
    assert "fusion.voxel" in refused.value.remedy
    for name, column in columns_of(ours).items():
        assert column.tobytes() == before[name].tobytes(), name


@DEVICE
def test_bad_views_are_refused_and_change_nothing(device: str) -> None:
    ours, view = DeviceSurfelMap(Surfel(voxel=VOXEL), device), scene(1)[0]
    bad: list[PosedDepth] = [
        replace(view, image=view.image[1:]), replace(view, image=torch.zeros(90, 120, 3)),  # type: ignore[arg-type]
        replace(view, confidence=view.depth[1:]), replace(view, K=K * np.nan), replace(view, T_world_cam=2 * pose()),
    ]  # fmt: skip
    for broken in bad:
        with pytest.raises(ReconError):
            ours.integrate(broken, 0)
    assert ours.stats()["surfels"] == 0


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:99", "cpu:0", ""])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(ReconError, match=r"fusion\.device"):
        Surfel(device=device).check()


@pytest.mark.gpu
def test_the_option_makes_a_map_on_its_device() -> None:
    option = Surfel(device="cuda:0")
    option.check()
    made = option.create()
    assert isinstance(made, DeviceSurfelMap)
    made.integrate(scene(1)[0], 0)
    assert all(column.is_cuda for column in made.columns.values())


@DEVICE
def test_real_frames_give_the_compiled_maps_surfels(data_dir: Path, device: str) -> None:
    """S1: the same surfels, so the same score, from eight cameras of a real room."""
    with np.load(data_dir / "redkitchen" / "reference_points.npz") as file:
        reference, seen = file["points_mm"] / 1000, (file["seen"] & 2) > 0
    views = [halved(view) for _, view in real_views(data_dir, (0,))]
    compiled, ours = both(Surfel(voxel=0.04, max_depth=4.0), views, device)
    assert compiled.size > 8000
    assert_same(compiled, ours)
    scores = [surface_metrics(found.points().points, reference, 0.04, seen) for found in (compiled, ours)]
    assert scores[0]["f_score"] > 0.6
    for name in ("precision", "recall", "f_score"):
        assert scores[1][name] == pytest.approx(scores[0][name], abs=5e-4)
    view = views[0]
    small = np.diag([0.25, 0.25, 1]) @ view.K
    wanted, found = (m.render_depth(small, view.T_world_cam, 80, 60) for m in (compiled, ours))
    assert np.mean(np.abs(wanted - found) <= 2e-6 * wanted) > (0.9999 if device == "cpu" else 0.995)


@DEVICE
def test_a_stream_fills_the_map_on_its_device(device: str) -> None:
    """Aligned, freed of what moves and fused there: as many surfels as on the host, and the same surface."""
    pytest.importorskip("omegaconf")
    from recon.config import option
    from recon.live import DepthAnythingPool
    from recon.live.align import Align
    from recon.live.stream import Streamer

    source: Any = replace(option("source", "synthetic"), width=128, height=96, steps=2, count=2)
    depth: Any = option("depth", "recorded")
    bootstrap = option("model", "recorded").bootstrap(source.bootstrap(), source.scale(), None)
    found: list[Any] = []
    for kind in (SurfelMap, lambda o: DeviceSurfelMap(o, device)):
        maps = [kind(Surfel(voxel=0.06)) for _ in range(2)]
        for one in maps:
            one.integrate_all(bootstrap.views, 0)
        with DepthAnythingPool(lambda: None, workers=1, predict=depth.predict) as pool:
            steps = list(Streamer(source, depth, pool, bootstrap, *maps, Align(render_width=64)).run(lambda _: None))
        assert len(steps) == 2
        found.append(maps[0])
    compiled, ours = found
    assert (columns_of(ours)["last"] == 2).mean() > 0.3
    assert ours.size == pytest.approx(compiled.size, rel=0.02)
    K, pose = bootstrap.K_source["cam1"], bootstrap.T_world_cam["cam1"]
    wanted, other = (fused.render_depth(K, pose, 128, 96) for fused in found)
    both = (wanted > 0) & (other > 0)
    assert both.mean() > 0.97 * (wanted > 0).mean()
    assert np.median(np.abs(other[both] / wanted[both] - 1)) < 1e-3
