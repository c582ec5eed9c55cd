"""The ray caster against formulae and against itself; scenes by seed; batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon.scene.description import Builder, Material, Scene, Shape, Texture, tilt, turn
from recon.scene.generate import generate, look_at, rig
from recon.scene.rays import Solids, nearest
from recon.scene.render import Frames, render, stack

GREY = Material((0.3, 0.3, 0.3), (0.6, 0.6, 0.6))
W, H = 96, 72


def _empty(build: Builder) -> Scene:
    room = np.array([[-5.0, -5, 0], [5, 5, 5]])
    return build.scene(room, np.array([[0.0, 0, 4]]), np.ones((1, 3)), np.full(3, 0.3))


def _frames(scenes: list[Scene], seed: int = 0, cameras: int = 2, width: int = W, height: int = H, **kwargs) -> Frames:  # type: ignore[no-untyped-def]
    rigs = [rig(scene, seed, cameras, width, height) for scene in scenes]
    K = torch.from_numpy(np.stack([r.K for r in rigs]))
    pose = torch.from_numpy(np.stack([r.T_world_cam for r in rigs]))
    return render(stack(scenes), K, pose, width, height, **kwargs)


def _cast(scene: Scene, origin: list[float], directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start = torch.tensor(origin, dtype=torch.float32).view(1, 1, 3)
    t, index = nearest(stack([scene]).solids, start, torch.as_tensor(directions, dtype=torch.float32)[None])
    return t[0].numpy(), index[0].numpy()


def _directions(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.uniform(-0.3, 0.3, count), np.ones(count), rng.uniform(-0.3, 0.3, count)], axis=1)


def test_sphere_is_hit_where_the_quadratic_says() -> None:
    build = Builder(np.random.default_rng(0))
    build.sphere((0.2, 3.0, 0.1), 0.8, GREY)
    d = _directions(5000)
    t, _ = _cast(_empty(build), [0.0, 0.0, 0.0], d)
    c = np.array([0.2, 3.0, 0.1])
    a, b = (d * d).sum(1), d @ c
    disc = b * b - a * (c @ c - 0.8**2)
    clear = np.abs(disc) > 1e-3
    assert 500 < (disc > 0).sum() < 4500
    np.testing.assert_array_equal(np.isfinite(t)[clear], disc[clear] > 0)
    hit = clear & (disc > 0)
    np.testing.assert_allclose(t[hit], (b[hit] - np.sqrt(disc[hit])) / a[hit], atol=2e-5)


def test_tilted_plane_is_hit_where_the_formula_says() -> None:
    build = Builder(np.random.default_rng(0))
    rotation = turn(0.5) @ tilt(0.4)
    centre = np.array([0.0, 4.0, 0.0])
    build.add(Shape.BOX, (0.0, 4.0, 0.0), (20.0, 0.5, 20.0), GREY, rotation)
    d = _directions(2000)
    t, _ = _cast(_empty(build), [0.1, 0.2, -0.1], d)
    normal = rotation[:, 1]
    expected = ((centre - 0.5 * normal - [0.1, 0.2, -0.1]) @ normal) / (d @ normal)
    np.testing.assert_allclose(t, expected, rtol=2e-6)


def test_cylinder_side_and_caps() -> None:
    build = Builder(np.random.default_rng(0))
    build.cylinder((0.0, 3.0, 0.0), 0.5, 1.0, GREY)
    scene = _empty(build)
    t, _ = _cast(scene, [0.0, 0.0, 0.0], np.array([[0.0, 1, 0], [0.1, 1, 0.05], [0.2, 1, 0], [0, 1, 0.25], [0, -1, 0]]))
    x = 0.1  # (x t)^2 + (t - 3)^2 = 0.25 from the side
    side = (3 - np.sqrt(9 - (1 + x * x) * 8.75)) / (1 + x * x)
    np.testing.assert_allclose(t[:2], [2.5, side], atol=1e-5)
    assert np.isinf(t[2:]).all()  # past the side, over the top, behind
    down, _ = _cast(scene, [0.2, 3.0, 2.0], np.array([[0.0, 0, -1], [0.2, 0, -1]]))
    np.testing.assert_allclose(down[0], 1.5, atol=1e-6)
    assert np.isinf(down[1])


def test_a_ray_from_inside_meets_the_far_side_and_disabled_ones_are_never_met() -> None:
    build = Builder(np.random.default_rng(0))
    build.box((0, 0, 0), (2.0, 4.0, 6.0), GREY)
    scene = _empty(build)
    t, _ = _cast(scene, [0.0, 0.0, 0.0], np.eye(3))
    np.testing.assert_allclose(t, [1.0, 2.0, 3.0], atol=1e-6)
    for shape in Shape:
        gone = torch.tensor([[[0.0, 3, 0]]]), torch.eye(3)[None, None], torch.full((1, 1, 3), -1.0)
        counts = tuple(int(kind == shape) for kind in Shape)
        d = torch.as_tensor(_directions(3000), dtype=torch.float32)[None]
        assert torch.isinf(nearest(Solids(counts, *gone), torch.zeros(1, 1, 3), d)[0]).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_static_points_have_the_same_depth_in_the_next_camera_and_two_fifths_are_shared(seed: int) -> None:
    scene = generate(seed)
    r = rig(scene, seed, 4, W, H)
    depths = _frames([scene], seed, 4, color=False).depth[0].double().numpy()
    v, u = np.mgrid[0:H, 0:W]
    rays = np.stack([(u - r.K[0, 0, 2]) / r.K[0, 0, 0], (v - r.K[0, 1, 2]) / r.K[0, 1, 1], np.ones_like(u)], -1)
    for depth, pose, other in zip(depths, r.T_world_cam, r.T_world_cam[1:], strict=False):
        world = (rays * depth[..., None]).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]
        seen = (world - other[:3, 3]) @ other[:3, :3]
        x, y = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2]
        inside = (seen[:, 2] > 0) & (abs(x) < W / 2 / r.K[0, 0, 0]) & (abs(y) < H / 2 / r.K[0, 1, 1])
        d = seen[inside] / seen[inside, 2:] @ other[:3, :3].T  # z = 1 in the other camera, so t is its depth
        t, _ = _cast(scene, other[:3, 3].tolist(), d)
        error = t - seen[inside, 2]
        assert error.max() < 1e-4  # what one camera sees is at most hidden from the other, never missing
        assert (abs(error) < 1e-4).sum() / (W * H) >= 0.4


def test_normals_are_those_of_the_depth() -> None:
    frames, r = _frames([generate(1)], color=False), rig(generate(1), 0, 2, W, H)
    depth, normals = frames.depth[0, 0].double().numpy(), frames.normals[0, 0].numpy()
    v, u = np.mgrid[0:H, 0:W]
    K, T = r.K[0], r.T_world_cam[0]
    points = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1) * depth[..., None]
    points = points @ T[:3, :3].T
    own = np.cross(points[1:, :-1] - points[:-1, :-1], points[:-1, 1:] - points[:-1, :-1])
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    same = frames.primitive[0, 0].numpy()
    flat = (same[1:, :-1] == same[:-1, :-1]) & (same[:-1, 1:] == same[:-1, :-1])
    flat &= same[:-1, :-1] < generate(1).counts[0]
    agree = abs((own * normals[:-1, :-1]).sum(-1)) > 0.999
    assert (agree[flat]).mean() > 0.95  # the rest are edges between two faces of a box
    assert ((normals * points).sum(-1) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)


def test_a_seed_is_a_scene_and_the_static_part_ignores_the_moving_objects() -> None:
    first, again, other = generate(5), generate(5), generate(6)
    np.testing.assert_array_equal(first.centre, again.centre)
    assert first.centre.shape != other.centre.shape or not np.allclose(first.centre, other.centre)
    without = generate(5, moving=0)
    for name in ("centre", "half", "salt", "colors"):
        np.testing.assert_array_equal(getattr(first, name)[~first.moving], getattr(without, name))
    assert first.moving.sum() == 3
    a, b = _frames([first]), _frames([again])
    assert torch.equal(a.rgb, b.rgb)
    assert torch.equal(a.depth, b.depth)
    assert not torch.equal(a.rgb, _frames([first], salts=[7, 8]).rgb)  # the sensor noise has another draw


def test_generated_numbers_do_not_change() -> None:
    """Pins the generator: a change that alters scenes must raise scene.VERSION and these numbers."""
    scene = generate(0)
    assert scene.counts == (89, 19, 10)
    assert scene.centre.sum() == pytest.approx(120.59361162626756, abs=1e-9)
    assert _frames([scene]).rgb.double().mean().item() == pytest.approx(125.464, abs=0.05)


def test_a_batch_renders_what_single_scenes_do() -> None:
    scenes = [generate(seed) for seed in (0, 1, 2)]
    assert len({scene.counts for scene in scenes}) == 3  # so some are padded
    batch = _frames(scenes)
    for number, scene in enumerate(scenes):
        single = _frames([scene])
        assert torch.equal(single.depth[0], batch.depth[number])
        assert torch.equal(single.normals[0], batch.normals[number])
        assert (single.rgb[0].int() - batch.rgb[number].int()).abs().max() <= 1
        assert torch.equal(single.moving[0], batch.moving[number])


def test_moving_objects_move_and_nothing_else_does() -> None:
    scene = generate(1)
    early, late = (_frames([scene.at(time)], 1, 4, color=False) for time in (0.0, 0.7))
    still = _frames([scene.static()], 1, 4, color=False)
    touched = early.moving | late.moving
    assert 0.002 < early.moving.float().mean() < 0.2
    assert (early.depth != late.depth)[touched].float().mean() > 0.5
    assert torch.equal(early.depth[~touched], late.depth[~touched])
    assert torch.equal(early.depth[~early.moving], still.depth[~early.moving])
    assert not still.moving.any()


def test_the_room_is_closed_and_well_lit() -> None:
    for seed in range(6):
        frames = _frames([generate(seed)], seed, 4)
        grey = frames.rgb.float().mean(-1)
        assert (frames.depth > 0.3).all()
        assert (frames.depth < 9).all()
        assert 70 < grey.mean() < 190
        assert grey.std() > 25
        assert ((grey > 250).float().mean() < 0.05) & ((grey < 5).float().mean() < 0.05)


@pytest.mark.parametrize("texture", list(Texture))
def test_every_texture_varies_from_pixel_to_pixel(texture: Texture) -> None:
    build = Builder(np.random.default_rng(0))
    material = Material((0.1, 0.1, 0.1), (0.8, 0.7, 0.6), texture, 0.3)
    build.box((0.0, 2.0, 0.0), (4.0, 0.2, 4.0), material)
    pose = torch.from_numpy(look_at(np.array([0.0, 0.0, 0.0]), np.array([0.0, 2.0, 0.1])))[None, None]
    K = torch.tensor([[[[80.0, 0, 40], [0, 80.0, 30], [0, 0, 1]]]])
    image = render(stack([_empty(build)]), K, pose, 80, 60, noise=0).rgb[0, 0].float().mean(-1)
    assert image.std() > 5
    assert (image[:, 1:] - image[:, :-1]).abs().mean() > 1


def test_sensor_noise_has_the_strength_asked_for() -> None:
    scene = generate(2)
    clean, noisy = _frames([scene], noise=0), _frames([scene], noise=4)
    middle = (clean.rgb > 30) & (clean.rgb < 225)
    difference = (noisy.rgb.double() - clean.rgb.double())[middle]
    assert difference.std() == pytest.approx(4, rel=0.05)
    assert abs(difference.mean()) < 0.1
