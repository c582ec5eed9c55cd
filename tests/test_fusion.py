"""Both maps: surfaces where they are, nothing where nothing is, the same bytes twice, and what has gone is forgotten."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.fusion import Fusion, Map
from recon.fusion.surfel import Surfel
from recon.fusion.tsdf import Tsdf, TsdfMap, load
from recon.geometry.views import PosedDepth
from recon.optional import open3d

K = np.array([[200.0, 0, 119.5], [0, 200.0, 89.5], [0, 0, 1]])
WIDTH, HEIGHT, VOXEL = 240, 180, 0.02
BALL, RADIUS = np.array([0.1, 0.0, 1.5]), 0.3
BOTH = pytest.mark.parametrize("option", [Tsdf, Surfel])


def pose(angle: float = 0.0, at: tuple[float, float, float] = (0, 0, 0)) -> NDArray[np.float64]:
    T = np.eye(4)
    T[0, 0] = T[2, 2] = np.cos(angle)
    T[0, 2], T[2, 0] = np.sin(angle), -np.sin(angle)
    T[:3, 3] = at
    return T


def depth_of(
    T: NDArray[np.float64], degrees: float = 0, ball: bool = True, width: int = WIDTH, height: int = HEIGHT
) -> NDArray[np.float32]:
    """Exact depth of a plane at 2 m, turned about y, with a ball before it."""
    k = np.diag([width / WIDTH] * 2 + [1]) @ K
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)], -1) @ T[:3, :3].T
    normal = np.array([np.sin(np.deg2rad(degrees)), 0, -np.cos(np.deg2rad(degrees))])
    depth = ((np.array([0, 0, 2.0]) - T[:3, 3]) @ normal) / (rays @ normal)
    depth = np.where((depth > 0) & (depth < 5), depth, 0)
    if ball:
        offset = T[:3, 3] - BALL
        a, b, c = (rays**2).sum(-1), rays @ offset, offset @ offset - RADIUS**2
        inside = b * b - a * c
        near = (-b - np.sqrt(np.maximum(inside, 0))) / a
        depth = np.where((inside > 0) & ((near < depth) | (depth == 0)), near, depth)
    return depth.astype(np.float32)


def view_of(T: NDArray[np.float64], degrees: float = 0, ball: bool = True) -> PosedDepth:
    depth = depth_of(T, degrees, ball)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[...] = np.where(depth[..., None] < 1.9, (200, 40, 90), (30, 120, 60))
    return PosedDepth("cam", image, depth, K, T)


def poses(n: int = 8) -> list[NDArray[np.float64]]:
    return [pose(0.02 * i - 0.07, (0.03 * i - 0.1, 0.01 * i, 0.01 * i)) for i in range(n)]


def fused(option: Fusion, n: int = 8, degrees: float = 0, ball: bool = True) -> Map:
    result = option.create()
    for i, T in enumerate(poses(n)):
        result.integrate(view_of(T, degrees, ball), i)
    return result


def distance(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """From points to the exact surface of plane and ball."""
    return np.minimum(np.abs(points[:, 2] - 2.0), np.abs(np.linalg.norm(points - BALL, axis=1) - RADIUS))


@BOTH
@pytest.mark.parametrize("degrees", [0, 45, 60])
def test_rendered_depth_of_a_plane_is_unbiased(option: type[Fusion], degrees: int) -> None:
    result = fused(option(voxel=VOXEL), degrees=degrees, ball=False)
    T = pose(0.03, (0.02, 0.01, 0.0))
    k = np.diag([0.5, 0.5, 1.0]) @ K
    depth, truth = result.render_depth(k, T, 120, 90), depth_of(T, degrees, False, 120, 90)
    both = (depth > 0) & (truth > 0)
    assert both.mean() > 0.8 * (truth > 0).mean()
    error = (depth - truth)[both] / VOXEL
    assert abs(error.mean()) < 0.1
    assert np.median(np.abs(error)) < 0.1


@BOTH
def test_points_lie_on_the_surface_and_face_the_camera(option: type[Fusion]) -> None:
    cloud = fused(option(voxel=VOXEL)).points()
    assert len(cloud.points) > 3000
    assert cloud.points.dtype == cloud.normals.dtype == np.float32
    assert cloud.colors.dtype == np.uint8
    assert np.isfinite(cloud.points).all()
    np.testing.assert_allclose(np.linalg.norm(cloud.normals, axis=1), 1, atol=1e-3)
    assert np.mean(distance(cloud.points) < 0.5 * VOXEL) > 0.95
    assert np.mean((cloud.normals * -cloud.points).sum(1) > 0) > 0.95
    wall = np.abs(cloud.points[:, 2] - 2.0) < 0.005
    np.testing.assert_allclose(np.median(cloud.colors[wall], axis=0), (30, 120, 60), atol=2)
    ball = np.abs(np.linalg.norm(cloud.points - BALL, axis=1) - RADIUS) < 0.005
    np.testing.assert_allclose(np.median(cloud.colors[ball & ~wall], axis=0), (200, 40, 90), atol=2)


def test_tsdf_mesh_has_triangles_on_the_surface_turned_outwards() -> None:
    mesh = fused(Tsdf(voxel=VOXEL)).mesh()
    assert mesh is not None
    assert len(mesh.vertices) > 3000  # Open3D's legacy volume gives none, without an error
    assert len(mesh.triangles) > 5000
    assert mesh.triangles.min() == 0
    assert mesh.triangles.max() == len(mesh.vertices) - 1
    assert np.mean(distance(mesh.vertices) < 0.5 * VOXEL) > 0.95
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    assert np.mean((np.cross(b - a, c - a) * -a).sum(1) > 0) > 0.95


def test_surfels_have_no_mesh_and_no_own_files(tmp_path: Path) -> None:
    result = fused(Surfel(voxel=VOXEL), 1)
    assert result.mesh() is None
    assert result.save(tmp_path) == []


@BOTH
def test_empty_map_renders_zeros_and_has_no_points(option: type[Fusion]) -> None:
    result = option(voxel=VOXEL).create()
    assert not result.render_depth(K, pose(), 20, 10).any()
    assert result.render_depth(K, pose(), 20, 10).shape == (10, 20)
    assert len(result.points().points) == 0
    mesh = result.mesh()
    assert mesh is None or len(mesh.triangles) == 0


@BOTH
def test_depth_without_a_valid_pixel_changes_nothing(option: type[Fusion]) -> None:
    view = view_of(pose())
    result, untouched = fused(option(voxel=VOXEL), 2), fused(option(voxel=VOXEL), 2)
    for value in (0.0, np.nan, np.inf, -1.0, 11.0):
        result.integrate(replace(view, depth=np.full_like(view.depth, value)), 5)
    assert result.points().points.tobytes() == untouched.points().points.tobytes()
    assert option(voxel=VOXEL).create().points().points.size == 0


@BOTH
def test_bad_pixels_are_left_out(option: type[Fusion]) -> None:
    clean, dirty = option(voxel=VOXEL).create(), option(voxel=VOXEL).create()
    for i, T in enumerate(poses(4)):
        view = view_of(T)
        holes, spoilt = view.depth.copy(), view.depth.copy()
        holes[:, ::7] = 0
        for first, value in enumerate((np.nan, np.inf, -np.inf, -2.0, 1e9)):
            spoilt[first::5, ::7] = value
        clean.integrate(replace(view, depth=holes), i)
        dirty.integrate(replace(view, depth=spoilt), i)
    assert clean.points().points.tobytes() == dirty.points().points.tobytes()
    assert np.isfinite(dirty.render_depth(K, pose(), WIDTH, HEIGHT)).all()


@BOTH
def test_pixels_of_low_confidence_are_left_out(option: type[Fusion]) -> None:
    view = view_of(pose(), ball=False)
    confidence = np.where(np.arange(WIDTH) < WIDTH // 2, 1.0, 3.0) * np.ones((HEIGHT, 1))
    confidence[:, -40:] = np.nan
    result = option(voxel=VOXEL, min_confidence=2.0).create()
    result.integrate(replace(view, confidence=confidence.astype(np.float32)), 0)
    seen = result.render_depth(K, pose(), WIDTH, HEIGHT) > 0
    assert seen[20:-20, WIDTH // 2 + 8 : -48].mean() > 0.95
    assert not seen[:, : WIDTH // 2 - 8].any()
    assert not seen[:, -32:].any()


@BOTH
def test_views_that_see_nothing_of_the_map_do_no_harm(option: type[Fusion]) -> None:
    result = fused(option(voxel=VOXEL), 3)
    away = pose(np.pi)
    assert not result.render_depth(K, away, 60, 40).any()
    before = result.points().points
    result.integrate(view_of(pose(np.pi, (0, 0, -8)), ball=False), 3)  # its plane is behind it: depth 0 everywhere
    far = replace(view_of(pose()), T_world_cam=pose(0, (40, 0, 0)))
    result.integrate(far, 4)
    after = result.points().points
    assert len(after) > len(before)
    assert {tuple(p) for p in before} <= {tuple(p) for p in after}


@BOTH
def test_same_input_gives_the_same_bytes(option: type[Fusion]) -> None:
    one, two = fused(option(voxel=VOXEL)), fused(option(voxel=VOXEL))
    for a, b in ((one.points(), two.points()),):
        assert a.points.tobytes() == b.points.tobytes()
        assert a.normals.tobytes() == b.normals.tobytes()
        assert a.colors.tobytes() == b.colors.tobytes()
    assert one.render_depth(K, pose(), 80, 60).tobytes() == two.render_depth(K, pose(), 80, 60).tobytes()
    first, second = one.mesh(), two.mesh()
    if first is not None and second is not None:
        assert first.vertices.tobytes() == second.vertices.tobytes()
        assert first.triangles.tobytes() == second.triangles.tobytes()


@BOTH
def test_unit_of_the_map_does_not_matter(option: type[Fusion]) -> None:
    metres = fused(option(voxel=VOXEL))
    other = option(voxel=VOXEL * 50, max_depth=500.0).create()
    for i, T in enumerate(poses()):
        view, moved = view_of(T), T.copy()
        moved[:3, 3] *= 50
        other.integrate(replace(view, depth=view.depth * 50, T_world_cam=moved), i)
    a, b = metres.points().points, other.points().points
    assert abs(len(a) - len(b)) < 0.02 * len(a)
    one, two = metres.render_depth(K, pose(), 60, 45), other.render_depth(K, pose(), 60, 45)
    assert np.median(np.abs(two / 50 - one)) < 1e-3


@pytest.mark.parametrize(("option", "after", "left"), [(Tsdf(weight_cap=8), 30, 0.3), (Surfel(), 4, 0.05)])
def test_what_has_gone_is_forgotten(option: Fusion, after: int, left: float) -> None:
    def on_ball() -> int:
        points = result.points().points
        return int(np.sum((np.linalg.norm(points - BALL, axis=1) < RADIUS + 0.05) & (points[:, 2] < 1.6)))

    result = option.create()
    for i in range(12):
        result.integrate(view_of(poses(4)[i % 4]), i)
    before = on_ball()
    for i in range(after):
        result.integrate(view_of(poses(4)[i % 4], ball=False), 12 + i)
    assert before > 300
    assert on_ball() < left * before


def test_tsdf_without_carving_does_not_forget() -> None:
    result = fused(Tsdf(carve=False))
    for i in range(20):
        result.integrate(view_of(pose(), ball=False), 8 + i)
    assert np.sum(np.linalg.norm(result.points().points - BALL, axis=1) < RADIUS + 0.03) > 300


def test_surfels_of_low_weight_that_are_not_seen_again_are_removed() -> None:
    result = Surfel(unit_depth=0.5).create()  # at 2 m an observation weighs 1/16
    result.integrate(view_of(pose(), ball=False), 0)
    assert len(result.points().points) > 1000
    elsewhere = view_of(pose(), ball=False)
    elsewhere = replace(elsewhere, T_world_cam=pose(0, (50, 0, 0)))
    result.integrate(elsewhere, 30)
    assert (result.points().points[:, 0] < 25).any()
    result.integrate(elsewhere, 31)
    assert not (result.points().points[:, 0] < 25).any()


def test_tsdf_memory_follows_the_blocks_in_use() -> None:
    stats = fused(Tsdf(voxel=0.01)).stats()
    assert stats["blocks"] > 500
    assert stats["memory_mib"] * 2**20 <= 1.35 * stats["blocks"] * 512 * 12
    assert Tsdf().create().stats()["memory_mib"] < 1


def test_tsdf_weights_stay_at_the_cap() -> None:
    result = Tsdf(weight_cap=5).create()
    assert isinstance(result, TsdfMap)
    for i in range(12):
        result.integrate(view_of(pose()), i)
    assert result.grid.weight.max() == 6  # capped, then one observation added


def test_tsdf_volume_round_trip(tmp_path: Path) -> None:
    result = fused(Tsdf(voxel=VOXEL), 4)
    (path,) = result.save(tmp_path)
    assert path.name == "tsdf_volume.npz"
    assert [p.name for p in tmp_path.iterdir()] == ["tsdf_volume.npz"]
    again = load(path)
    assert again.points().points.tobytes() == result.points().points.tobytes()
    assert again.render_depth(K, pose(), 60, 45).tobytes() == result.render_depth(K, pose(), 60, 45).tobytes()
    with np.load(path, allow_pickle=False) as data:
        keys, tsdf, weight = data["block_keys"], data["tsdf"], data["weight"]
        block, z, y, x = (int(i) for i in np.argwhere((np.abs(tsdf) < 0.5) & (weight > 2))[0])
        centre = (8 * keys[block] + (x, y, z)) * float(data["voxel"])  # the layout that the docstring states
        signed = tsdf[block, z, y, x] * float(data["truncation"]) * VOXEL
    assert abs(min(2.0 - centre[2], np.linalg.norm(centre - BALL) - RADIUS) - signed) < 0.5 * VOXEL
    again.integrate(view_of(pose()), 9)
    assert again.stats()["blocks"] >= result.stats()["blocks"]


def test_damaged_volumes_are_refused(tmp_path: Path) -> None:
    (path,) = fused(Tsdf(voxel=VOXEL), 1).save(tmp_path)
    with np.load(path) as data:
        arrays = dict(data)
    for change in (
        {"tsdf": arrays["tsdf"][1:]}, {"format": np.int64(2)}, {"weight": arrays["weight"].astype(object)},
        {"tsdf": arrays["tsdf"] * np.nan}, {"block_keys": np.zeros_like(arrays["block_keys"])}, {"voxel": np.float64(-1)},
    ):  # fmt: skip
        np.savez(path, **{**arrays, **change})
        with pytest.raises(ReconError):
            load(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ReconError, match="tsdf_volume"):
        load(path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (Tsdf(voxel=0), "voxel"), (Tsdf(max_depth=float("inf")), "max_depth"), (Tsdf(truncation=0.5), "truncation"),
        (Tsdf(weight_cap=0), "weight_cap"), (Tsdf(weight_cap=65536), "weight_cap"), (Tsdf(min_weight=99), "min_weight"),
        (Tsdf(voxel=0.001, max_depth=50), "max_depth"), (Surfel(patience=0), "patience"), (Surfel(radius=0), "radius"),
        (Surfel(gate_share=float("nan")), "gate_share"), (Surfel(voxel=float("nan")), "voxel"),
        (Tsdf(voxel=100.0), "holds no surface"),
    ],
)  # fmt: skip
def test_impossible_knobs_are_refused(option: Fusion, words: str) -> None:
    with pytest.raises(ReconError, match=words):
        option.check()


@BOTH
def test_views_whose_parts_do_not_fit_are_refused(option: type[Fusion]) -> None:
    view, result = view_of(pose()), option().create()
    for bad in (
        replace(view, image=view.image[1:]), replace(view, image=view.image.astype(np.float32)),
        replace(view, confidence=view.depth[1:]), replace(view, K=K * np.nan), replace(view, T_world_cam=2 * pose()),
    ):  # fmt: skip
        with pytest.raises(ReconError):
            result.integrate(bad, 0)
    assert len(result.points().points) == 0


def real_views(data_dir: Path, steps: tuple[int, ...]) -> list[tuple[int, PosedDepth]]:
    import cv2

    root, views = data_dir / "redkitchen", []
    with np.load(root / "intrinsics.npz") as k, np.load(root / "poses.npz") as p:
        intrinsics, transforms = k["K"], p["T_world_cam"]
    for step in steps:
        for c in range(8):
            depth = cv2.imread(str(root / f"depth/cam{c}/{step:06d}.png"), cv2.IMREAD_UNCHANGED) / np.float32(1000)
            image = cv2.imread(str(root / f"images/cam{c}/{step:06d}.jpg"))[..., ::-1]
            views.append((step, PosedDepth(f"cam{c}", image, depth, intrinsics[c], transforms[c, step])))
    return views


@pytest.mark.parametrize(("option", "floor"), [(Tsdf(max_depth=4.0), 0.88), (Surfel(max_depth=4.0), 0.83)])
def test_real_frames(data_dir: Path, option: Fusion, floor: float) -> None:
    """T3, T5 and the bias of rendered depth at looser bounds: 8 cameras, 2 of 20 steps."""
    from recon.geometry.metrics import surface_metrics

    with np.load(data_dir / "redkitchen" / "reference_points.npz") as r:
        reference, seen = r["points_mm"] / 1000, (r["seen"] & 1) > 0
    views, result = real_views(data_dir, (0, 10)), option.create()
    for step, view in views:
        result.integrate(view, step)
    mesh, stats = result.mesh(), result.stats()
    triangles = (mesh.vertices, mesh.triangles) if mesh else None
    assert surface_metrics(result.points().points, reference, 0.02, seen, triangles)["f_score"] > floor
    if mesh:
        assert stats["memory_mib"] * 2**20 <= 1.3 * stats["blocks"] * 512 * 12
    view = views[0][1]
    depth = result.render_depth(np.diag([0.25, 0.25, 1]) @ view.K, view.T_world_cam, 160, 120)
    sensor = view.depth[::4, ::4]
    both = (depth > 0) & (sensor > 0)
    assert both.mean() > 0.8 * (sensor > 0).mean()
    assert abs(np.median((depth - sensor)[both])) < 0.003


def test_integrating_costs_what_open3d_costs(data_dir: Path) -> None:
    """T1 at a looser bound: CPU time of frames 9 to 16 against the bare library on the same blocks and types."""
    o3d, views = open3d(), real_views(data_dir, (0, 10))
    core = o3d.core
    grid = o3d.t.geometry.VoxelBlockGrid(
        ("tsdf", "weight", "color"), (core.float32, core.uint16, core.uint16), ((1), (1), (3)), VOXEL, 8, 4000
    )
    ours, times = Tsdf(max_depth=4.0, carve=False, weight_cap=60000).create(), []
    for step, view in views:
        depth = o3d.t.geometry.Image((view.depth * 1000).astype(np.uint16))
        color = o3d.t.geometry.Image(np.ascontiguousarray(view.image))
        camera, pose_inverse = core.Tensor(view.K), core.Tensor(np.linalg.inv(view.T_world_cam))
        start = time.process_time()
        found = grid.compute_unique_block_coordinates(depth, camera, pose_inverse, 1000.0, 4.0, 4.0)
        grid.integrate(found, depth, color, camera, pose_inverse, 1000.0, 4.0, 4.0)
        middle = time.process_time()
        ours.integrate(view, step)
        times.append((time.process_time() - middle, middle - start))
    assert ours.stats()["blocks"] == pytest.approx(grid.hashmap().size(), rel=0.03)
    mine, theirs = np.median(np.array(times[8:]), axis=0)
    assert mine < 1.5 * theirs
