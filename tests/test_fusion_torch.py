"""The torch map against the compiled one: the same blocks, distances and weights, and the same depth when rendered.

Runs on the CPU; with `-m gpu`, the same checks on CUDA.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fusion import K, depth_of, pose, poses, real_views, view_of

from recon.errors import ReconError
from recon.fusion.device import pool as pools
from recon.fusion.device.inputs import upload
from recon.fusion.device.tsdf import DeviceTsdfMap
from recon.fusion.tsdf import Tsdf, TsdfMap, load
from recon.geometry.views import PosedDepth

OPEN3D = pytest.mark.skipif(find_spec("open3d") is None, reason="the compiled map needs open3d")
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
VOXEL = 0.03
K_SMALL, SMALL = np.diag([1 / 3, 1 / 3, 1]) @ K, (80, 60)


def on_lattice(view: PosedDepth, far: float) -> PosedDepth:
    """Depth that survives the compiled map's rounding to 65535 steps, so that results can be compared exactly."""
    steps = np.rint(view.depth.astype(np.float64) / far * 65535)
    return replace(view, depth=(steps * far / 65535).astype(np.float32))


def both(option: Tsdf, views: list[PosedDepth], device: str) -> tuple[TsdfMap, DeviceTsdfMap]:
    compiled, ours = TsdfMap(option), DeviceTsdfMap(option, device)
    for i, view in enumerate(views):
        compiled.integrate(view, i)
        ours.integrate(view, i)
    return compiled, ours


def scene(n: int = 8, until: int = 99, far: float = 10.0) -> list[PosedDepth]:
    """Views of a tilted wall with a ball before it, which is gone after view `until`."""
    return [on_lattice(view_of(T, 30, ball=i <= until), far) for i, T in enumerate(poses(n))]


def assert_equal(compiled: TsdfMap, ours: DeviceTsdfMap, tolerance: float = 1e-5, share: float = 0.0) -> None:
    """All blocks the same, and distances and weights in all but `share` of the voxels."""
    a, b = compiled.grid.arrays(), ours.pool.arrays()
    np.testing.assert_array_equal(a["block_keys"], b["block_keys"])
    assert np.mean(np.abs(a["tsdf"] - b["tsdf"]) > tolerance) <= share
    assert np.mean(a["weight"] != b["weight"]) <= share
    off = np.abs(a["color"].astype(int) - b["color"])
    assert np.mean(off > 3) <= max(share, 2e-3)  # Open3D cuts fractions off and gives the first column no colour


@OPEN3D
@DEVICE
@pytest.mark.parametrize("option", [Tsdf(voxel=VOXEL), Tsdf(voxel=VOXEL, weight_cap=3), Tsdf(voxel=VOXEL, carve=False)])
def test_blocks_distances_and_weights_are_the_compiled_maps(option: Tsdf, device: str) -> None:
    compiled, ours = both(option, scene(until=4), device)
    assert ours.stats()["blocks"] > 300
    assert ours.pool.arrays()["weight"].max() == min(option.weight_cap + 1, 8)
    assert_equal(compiled, ours, share=0.0 if device == "cpu" else 1e-4)  # a GPU fuses products and sums


@OPEN3D
@DEVICE
@pytest.mark.parametrize("least", [1, 3])
def test_rendered_depth_is_the_compiled_maps(least: int, device: str) -> None:
    compiled, ours = both(Tsdf(voxel=0.02, min_weight=least), scene(5), device)
    k, size = np.diag([0.5, 0.5, 1]) @ K, (120, 90)
    for T in (pose(0.05, (0.05, 0.02, 0.03)), pose(0.3, (0.3, 0.1, 0.2))):
        wanted, found = compiled.render_depth(k, T, *size), ours.render_depth(k, T, *size)
        assert found.dtype == np.float32
        assert np.mean(wanted > 0) > 0.5
        near = np.abs(wanted - found) <= 1e-3 * wanted
        assert near.mean() > 0.99
        assert near[(wanted > 0) & (found > 0)].mean() > 0.998  # what differs is whether a ragged edge is met at all


@DEVICE
@pytest.mark.parametrize("degrees", [0, 60])
def test_rendered_depth_of_a_plane_is_unbiased(degrees: int, device: str) -> None:
    ours = DeviceTsdfMap(Tsdf(voxel=VOXEL), device)
    for i, T in enumerate(poses(4)):
        ours.integrate(view_of(T, degrees, ball=False), i)
    T = pose(0.03, (0.02, 0.01, 0.0))
    found, truth = ours.render_depth(K_SMALL, T, *SMALL), depth_of(T, degrees, False, *SMALL)
    valid = (found > 0) & (truth > 0)
    assert valid.mean() > 0.8 * (truth > 0).mean()
    assert abs(((found - truth)[valid] / VOXEL).mean()) < 0.1


@OPEN3D
@DEVICE
def test_points_and_mesh_are_the_compiled_maps(device: str) -> None:
    compiled, ours = both(Tsdf(voxel=VOXEL), scene(4), device)
    for wanted, found in (
        (compiled.points().points, ours.points().points),
        (compiled.mesh().vertices, ours.mesh().vertices),
    ):
        assert len(wanted) > 1500
        assert abs(len(found) - len(wanted)) <= (0 if device == "cpu" else 0.001 * len(wanted))
        if device == "cpu":
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@OPEN3D
@DEVICE
def test_tensors_are_taken_where_they_lie_and_give_the_same_map(device: str) -> None:
    views, option = scene(3), Tsdf(voxel=VOXEL, min_confidence=0.5)
    confident = [replace(view, confidence=(view.depth < 2.2).astype(np.float32)) for view in views]
    compiled, ours = both(option, confident, device)
    direct = DeviceTsdfMap(option, device)
    for i, view in enumerate(confident):
        parts: Any = {
            name: torch.from_numpy(getattr(view, name)).to(device) for name in ("depth", "image", "confidence")
        }
        taken = replace(view, **parts)
        assert upload(taken, direct.device, 10.0, 0.5)[1].data_ptr() == parts["image"].data_ptr()
        direct.integrate(taken, i)
    assert_equal(compiled, direct, share=0.0 if device == "cpu" else 1e-4)
    for name, values in ours.pool.arrays().items():
        assert values.tobytes() == direct.pool.arrays()[name].tobytes(), name
    assert direct.render(K_SMALL, pose(), *SMALL).device.type == device


@DEVICE
def test_same_input_gives_the_same_bytes(device: str) -> None:
    option, views = Tsdf(voxel=VOXEL), scene(3)
    one, two = DeviceTsdfMap(option, device), DeviceTsdfMap(option, device)
    for i, view in enumerate(views):
        one.integrate(view, i)
        two.integrate(view, i)
    for name, values in one.pool.arrays().items():
        assert values.tobytes() == two.pool.arrays()[name].tobytes(), name
    assert one.render_depth(K_SMALL, pose(), *SMALL).tobytes() == two.render_depth(K_SMALL, pose(), *SMALL).tobytes()


@DEVICE
def test_depth_is_not_rounded_and_colours_keep_their_fractions(device: str) -> None:
    """A plane halfway between two steps of 0.15 mm, and an image that darkens by one at every view."""
    ours, T = DeviceTsdfMap(Tsdf(voxel=VOXEL), device), pose()
    flat = np.full((180, 240), 13107.5 * 10 / 65535, np.float32)
    for i in range(5):
        ours.integrate(PosedDepth("cam", np.full((180, 240, 3), 100 - i, np.uint8), flat, K, T), i)
    found = ours.render_depth(K_SMALL, T, *SMALL)[20:40, 27:53]
    assert np.abs(found - flat[0, 0]).max() < 1e-5
    arrays = ours.pool.arrays()
    assert set(np.unique(arrays["color"][arrays["weight"] == 5])) == {98}


@OPEN3D
@DEVICE
def test_what_has_gone_is_forgotten_at_the_same_pace(device: str) -> None:
    option = Tsdf(voxel=0.04, weight_cap=4)
    compiled, ours = both(option, [view_of(poses(4)[i % 4], ball=i < 6) for i in range(14)], device)
    counts = []
    for found in (compiled, ours):
        points = found.points().points
        counts.append(int(np.sum((np.linalg.norm(points - (0.1, 0, 1.5), axis=1) < 0.35) & (points[:, 2] < 1.6))))
    assert counts[1] == pytest.approx(counts[0], rel=0.1, abs=20)


@OPEN3D
@DEVICE
def test_volume_is_read_by_the_compiled_map(device: str, tmp_path: Path) -> None:
    compiled, ours = both(Tsdf(voxel=VOXEL), scene(2), device)
    (path,) = ours.save(tmp_path)
    again = load(path)
    assert again.stats()["blocks"] == compiled.stats()["blocks"]
    assert_equal(again, ours)


@OPEN3D
@DEVICE
def test_nothing_in_nothing_out(device: str) -> None:
    ours, view = DeviceTsdfMap(Tsdf(voxel=VOXEL), device), scene(1)[0]
    for value in (0.0, np.nan, np.inf, -1.0, 11.0):
        ours.integrate(replace(view, depth=np.full_like(view.depth, value)), 0)
    assert ours.stats()["blocks"] == 0
    assert not ours.render_depth(K, pose(), 20, 10).any()
    assert len(ours.points().points) == 0
    assert len(ours.mesh().triangles) == 0
    ours.integrate(view, 1)
    before = ours.pool.arrays()["weight"].sum()
    ours.integrate(replace(view, depth=np.zeros_like(view.depth)), 2)
    assert ours.pool.arrays()["weight"].sum() == before
    assert not ours.render_depth(K, pose(np.pi), 60, 40).any()


@DEVICE
def test_bad_views_are_refused_and_change_nothing(device: str) -> None:
    ours, view = DeviceTsdfMap(Tsdf(voxel=VOXEL), device), scene(1)[0]
    away = pose(0, (1e9, 0, 0))
    bad: list[PosedDepth] = [
        replace(view, image=view.image[1:]), replace(view, image=torch.zeros(180, 240, 3)),  # type: ignore[arg-type]
        replace(view, confidence=view.depth[1:]), replace(view, K=K * np.nan), replace(view, T_world_cam=away),
    ]  # fmt: skip
    for broken in bad:
        with pytest.raises(ReconError):
            ours.integrate(broken, 0)
    assert ours.stats()["blocks"] == 0


def test_a_full_device_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = scene(1)[0], replace(scene(1)[0], T_world_cam=pose(0, (9.0, 0, 0)))
    ours = DeviceTsdfMap(Tsdf(voxel=VOXEL), "cpu")
    ours.integrate(first, 0)
    before, blocks = ours.pool.arrays(), ours.stats()["blocks"]
    monkeypatch.setattr(pools, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(ReconError, match=r"blocks.*1 MiB left") as refused:
        ours.integrate(second, 1)
    assert "fusion.voxel" in refused.value.remedy
    assert ours.stats()["blocks"] == blocks
    for name, values in ours.pool.arrays().items():
        assert values.tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:99", "cpu:0", ""])
def test_devices_that_are_not_there_are_refused(device: str) -> None:
    with pytest.raises(ReconError, match=r"fusion\.device"):
        Tsdf(device=device).check()


@pytest.mark.gpu
def test_the_option_makes_a_map_on_its_device() -> None:
    option = Tsdf(device="cuda:0")
    option.check()
    made = option.create()
    assert isinstance(made, DeviceTsdfMap)
    made.integrate(scene(1)[0], 0)
    assert made.pool.tsdf.is_cuda


@OPEN3D
@DEVICE
def test_real_frames_give_the_compiled_maps_volume(data_dir: Path, device: str) -> None:
    views = [on_lattice(view, 4.0) for _, view in real_views(data_dir, (0,))][:4]
    compiled, ours = both(Tsdf(voxel=0.04, max_depth=4.0), views, device)
    assert_equal(compiled, ours, share=2e-3)
    view = views[0]
    small = np.diag([0.125, 0.125, 1]) @ view.K
    wanted, found = (m.render_depth(small, view.T_world_cam, 80, 60) for m in (compiled, ours))
    assert np.mean(np.abs(wanted - found) <= 1e-3 * wanted) > 0.95  # ragged depth: each misses thin things of its own


@DEVICE
@pytest.mark.parametrize("option", [Tsdf(voxel=VOXEL, weight_cap=3), Tsdf(voxel=VOXEL, carve=False)])
def test_views_fused_together_are_views_fused_one_after_another(option: Tsdf, device: str) -> None:
    """Bit for bit, rows included: also where a view sees through blocks that one before it in the same step made."""
    views = scene(6, until=2) + [replace(view, depth=view.depth[::2, ::2].copy(), image=view.image[::2, ::2].copy(),
                                         K=np.diag([0.5, 0.5, 1]) @ view.K) for view in scene(2)]  # fmt: skip
    together, alone = DeviceTsdfMap(option, device), DeviceTsdfMap(option, device)
    for step in range(2):
        together.integrate_all(views, step)
        for view in views:
            alone.integrate(view, step)
    assert torch.equal(together.pool.keys, alone.pool.keys)
    assert torch.equal(together.pool.rows, alone.pool.rows)
    for name, values in together.pool.arrays().items():
        np.testing.assert_array_equal(values, alone.pool.arrays()[name], name)


@pytest.mark.gpu
def test_the_kernel_gives_what_its_twin_gives() -> None:
    option, views = Tsdf(voxel=VOXEL, weight_cap=3), scene(6, until=2)
    on_gpu, on_cpu = DeviceTsdfMap(option, "cuda"), DeviceTsdfMap(option, "cpu")
    for step in range(3):
        on_gpu.integrate_all(views, step)
        on_cpu.integrate_all(views, step)
    a, b = on_gpu.pool.arrays(), on_cpu.pool.arrays()
    np.testing.assert_array_equal(a["block_keys"], b["block_keys"])
    for name in ("weight", "color", "tsdf"):
        assert np.mean(a[name] != b[name]) < 1e-4, name


@DEVICE
def test_cameras_rendered_together_are_cameras_rendered_alone(device: str) -> None:
    ours = DeviceTsdfMap(Tsdf(voxel=VOXEL), device)
    assert (ours.render_all([(K_SMALL, pose())], *SMALL) == 0).all()
    ours.integrate_all(scene(4), 0)
    cameras = [(K_SMALL, T) for T in (pose(), pose(0.3, (0.3, 0.1, 0.2)), pose(0, (50.0, 0, 0)))]
    found = ours.render_all(cameras, *SMALL).cpu().numpy()
    assert [np.mean(depth > 0) > 0.5 for depth in found] == [True, True, False]
    for depth, (K_one, T) in zip(found, cameras, strict=True):
        assert depth.tobytes() == ours.render_depth(K_one, T, *SMALL).tobytes()
