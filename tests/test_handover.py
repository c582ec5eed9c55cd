"""What is handed over, read back by other programs: pycolmap, Open3D, and nerfstudio's conventions written out here."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from recon.artifact import seal
from recon.config import Config, check, option
from recon.errors import ReconError
from recon.geometry.cameras import transform, unproject
from recon.geometry.ply import write_points
from recon.geometry.rig_files import read_rig
from recon.geometry.views import View
from recon.handover import hand_over
from recon.handover.colmap import quaternion
from recon.handover.gaussians import SH_C0, neighbour_distance, rotations_to
from recon.keyframes import KeyframeWriter, camera_of, read_keyframes, require_complete
from recon.models.recorded import Recorded
from recon.optional import open3d
from recon.options import DepthVideoOptions, HandoverOptions
from recon.pipeline import Run, finish, run
from recon.store import Store

SHIFT = np.array([2.25, -3.5])  # of the principal point: a centre that is wrong by half a pixel must show


def recorded_run(folder: Path) -> tuple[list[View], np.ndarray]:
    """A run folder as reconstruct leaves it, from exact depth; returns the views and (camera, u, v) of every point."""
    source = replace(option("source", "synthetic"), width=96, height=72, steps=1, moving=0, count=3, noise=0.0)
    views = [replace(view, K=view.K + np.pad(SHIFT[:, None], ((0, 1), (2, 0)))) for view in source.bootstrap()]
    bootstrap = Recorded(name="recorded").bootstrap(views, source.scale(), None)
    writer = KeyframeWriter(folder, HandoverOptions(), bootstrap)
    for view in views:
        writer.offer(view)
    points, normals, colors, origin = [], [], [], []
    for number, view in enumerate(views):
        world = transform(view.T_world_cam, unproject(view.depth, view.K))[1:-1, 1:-1]
        normal = np.cross(world[1:, :-1] - world[:-1, :-1], world[:-1, 1:] - world[:-1, :-1])
        v, u = np.mgrid[1 : 1 + normal.shape[0], 1 : 1 + normal.shape[1]]
        flip = np.sign(np.einsum("ijk,ijk->ij", normal, view.T_world_cam[:3, 3] - world[:-1, :-1]))[..., None]
        normal = normal / np.maximum(np.linalg.norm(normal, axis=2, keepdims=True), 1e-12) * flip
        points.append(world[:-1, :-1].reshape(-1, 3))
        normals.append(normal.reshape(-1, 3))
        colors.append(view.image[v, u].reshape(-1, 3))
        origin.append(np.stack([np.full(u.size, number), u.ravel(), v.ravel()], axis=1))
    write_points(folder / "map_updated.ply", *(np.concatenate(part) for part in (points, normals, colors)))
    seal(folder, "run", [*writer.close(), folder / "map_updated.ply"])
    return views, np.concatenate(origin)


@pytest.fixture(scope="module")
def handed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[View], np.ndarray]:
    folder = tmp_path_factory.mktemp("run")
    views, origin = recorded_run(folder)
    hand_over(folder, folder, HandoverOptions())
    return folder / "handover", views, origin


def ran(settings: Config, folder: Path) -> Run:
    folder.mkdir()
    state = Run(settings, folder, Store(settings))
    run(state)
    finish(state)
    return state


def read(folder: Path, form: str):
    pycolmap = pytest.importorskip("pycolmap")
    found = pycolmap.Reconstruction()
    getattr(found, f"read_{form}")(str(folder / "sparse" / "0"))
    return found


@pytest.mark.parametrize("form", ["binary", "text"])
def test_pycolmap_puts_every_point_on_the_pixel_it_came_from(handed, form: str) -> None:
    """Our pixel (u, v) is COLMAP's (u + 0.5, v + 0.5); the pixel's colour is that of the point."""
    folder, views, origin = handed
    model = read(folder, form)
    assert model.num_images() == model.num_cameras() == 3
    assert model.num_points3D() == len(origin)
    names = {image.name: image for image in model.images.values()}
    worst = 0.0
    for number, view in enumerate(views):
        image = names[f"{view.camera}_000000.png"]
        camera = model.cameras[image.camera_id]
        assert (camera.width, camera.height, camera.model.name) == (96, 72, "PINHOLE")
        own = np.flatnonzero(origin[:, 0] == number)
        world = np.array([model.points3D[i + 1].xyz for i in own])
        pixels = camera.img_from_cam(image.cam_from_world() * world)
        worst = max(worst, float(np.abs(pixels - (origin[own, 1:] + 0.5)).max()))
        assert all((model.points3D[i + 1].color == view.image[origin[i, 2], origin[i, 1]]).all() for i in own[::97])
    assert worst < 0.01


def test_tracks_hold_what_the_images_see(handed) -> None:
    """Recomputed by pycolmap, the error of every observation is below 0.01 px; points of a view are seen in it."""
    folder, _, origin = handed
    model = read(folder, "binary")
    model.update_point_3d_errors()
    errors = np.array([point.error for point in model.points3D.values() if point.track.length()])
    assert errors.max() < 0.01
    ids = {image.name.partition("_")[0]: number for number, image in model.images.items()}
    for camera, number in ids.items():
        own = np.flatnonzero(origin[:, 0] == int(camera[3:]))
        seen = [number in {e.image_id for e in model.points3D[i + 1].track.elements} for i in own]
        assert np.mean(seen) > 0.9  # not all: at depth edges a cell of the occlusion test holds both sides
    assert model.compute_mean_track_length() > 1.5
    for image in model.images.values():
        for index, observation in enumerate(image.points2D[:50]):
            assert any(
                e.image_id == image.image_id and e.point2D_idx == index
                for e in model.points3D[observation.point3D_id].track.elements
            )


def test_a_hidden_point_is_not_in_the_track(handed) -> None:
    """A point that another camera's own depth image hides by more than 10 % is rarely listed there."""
    folder, views, origin = handed
    model = read(folder, "binary")
    ids = {image.name.partition("_")[0]: number for number, image in model.images.items()}
    view, number = views[0], ids["cam0"]
    image = model.images[number]
    camera = model.cameras[image.camera_id]
    others = np.flatnonzero(origin[:, 0] != 0)
    world = np.array([model.points3D[i + 1].xyz for i in others])
    local = image.cam_from_world() * world
    front = local[:, 2] > 0.1
    others, local = others[front], local[front]
    u, v = np.rint(camera.img_from_cam(local) - 0.5).astype(int).T
    inside = (u >= 0) & (u < 96) & (v >= 0) & (v < 72)
    others, local, u, v = others[inside], local[inside], u[inside], v[inside]
    hidden = local[:, 2] > 1.1 * view.depth[v, u]
    listed = np.array([number in {e.image_id for e in model.points3D[i + 1].track.elements} for i in others])
    assert hidden.sum() > 100
    assert listed[hidden].mean() < 0.05
    assert listed[np.abs(local[:, 2] / view.depth[v, u] - 1) < 0.005].mean() > 0.8


@pytest.mark.parametrize("form", ["sparse/0", "transforms.json"])
def test_our_own_rig_reader_gets_the_cameras_back(handed, form: str) -> None:
    folder, views, _ = handed
    entries = {Path(name).name.partition("_")[0]: entry for name, entry in read_rig(folder / form).entries.items()}
    for view in views:
        np.testing.assert_allclose(entries[view.camera].lens.K, view.K, atol=1e-9)
        np.testing.assert_allclose(entries[view.camera].T_world_cam, view.T_world_cam, atol=1e-9)


def test_nerfstudio_cameras_look_at_the_points(handed) -> None:
    """Projection as nerfstudio does it: OpenGL axes, -z ahead, y up, pixel centres at +0.5; seed PLY as it is."""
    folder, _, origin = handed
    document = json.loads((folder / "transforms.json").read_text())
    o3d = open3d()
    seed = o3d.io.read_point_cloud(str(folder / document["ply_file_path"]))
    points = np.asarray(seed.points)
    assert seed.has_normals()
    assert seed.has_colors()
    for number, frame in enumerate(document["frames"]):
        assert (folder / frame["file_path"]).is_file()
        T = np.array(frame["transform_matrix"])
        own = origin[:, 0] == number
        local = (points[own] - T[:3, 3]) @ T[:3, :3]
        assert (local[:, 2] < 0).all()
        u = frame["fl_x"] * local[:, 0] / -local[:, 2] + frame["cx"]
        v = frame["cy"] - frame["fl_y"] * local[:, 1] / -local[:, 2]
        assert np.abs(np.stack([u, v], 1) - (origin[own, 1:] + 0.5)).max() < 0.01
        assert (frame["w"], frame["h"]) == (96, 72)


def test_gaussians_have_the_layout_and_the_values_of_inria(handed) -> None:
    folder, _, _ = handed
    o3d = open3d()
    head = (folder / "gaussians.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    names = [line.split()[2] for line in head if line.startswith("property")]
    rest = [f"f_rest_{i}" for i in range(45)]
    expected = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity"]
    expected += ["scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert names == expected
    found = o3d.t.io.read_point_cloud(str(folder / "gaussians.ply")).point
    seed = o3d.t.io.read_point_cloud(str(folder / "seed.ply")).point
    points, normals = found["positions"].numpy(), found["normals"].numpy()
    assert np.array_equal(points, seed["positions"].numpy())
    colors = 0.5 + SH_C0 * found["f_dc"].numpy().reshape(-1, 3)
    np.testing.assert_allclose(colors * 255, seed["colors"].numpy(), atol=0.01)
    assert not found["f_rest"].numpy().any()
    np.testing.assert_allclose(1 / (1 + np.exp(-found["opacity"].numpy())), 0.1, atol=1e-6)
    scales = found["scale"].numpy().reshape(-1, 3)  # Open3D takes the exponential when it reads
    np.testing.assert_allclose(scales[:, 0], neighbour_distance(points.astype(float)), rtol=1e-4)
    np.testing.assert_allclose(scales[:, 2] / scales[:, 0], 0.2, rtol=1e-4)
    q = found["rot"].numpy().reshape(-1, 4)
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-6)
    w, x, y, z = q.T
    axis = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], axis=1)
    unit = np.linalg.norm(normals, axis=1) > 0.5
    np.testing.assert_allclose(axis[unit], normals[unit], atol=1e-5)


def test_rotations_to_every_direction() -> None:
    normals = np.array([[0, 0, 1.0], [0, 0, -1], [1, 0, 0], [0, -1, 0], [0, 0, 0], [0.6, 0, -0.8]])
    w, x, y, z = rotations_to(normals).T
    axis = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], axis=1)
    wanted = np.where(np.arange(6)[:, None] == 4, [[0, 0, 1.0]], normals)
    np.testing.assert_allclose(axis, wanted, atol=1e-12)


def test_quaternion_is_w_first() -> None:
    quarter = np.array([[0, -1.0, 0], [1, 0, 0], [0, 0, 1]])  # about z
    np.testing.assert_allclose(quaternion(quarter), [np.sqrt(0.5), 0, 0, np.sqrt(0.5)], atol=1e-12)


def test_without_tracks_and_with_few_points(handed, tmp_path: Path) -> None:
    folder = handed[0].parent
    _, facts = hand_over(folder, tmp_path, HandoverOptions(tracks=False, max_points=500))
    model = read(tmp_path / "handover", "binary")
    assert facts["tracks"] == "empty"
    assert model.num_points3D() == 500
    assert all(point.track.length() == 0 for point in model.points3D.values())
    assert read(tmp_path / "handover", "text").num_points3D() == 500


def test_centred_images_keep_pixels_and_projection(handed, tmp_path: Path) -> None:
    """Cropped about the principal point, every image still shows the point where the camera says."""
    import cv2

    folder, views = handed[0].parent, handed[1]
    hand_over(folder, tmp_path, HandoverOptions(center=True))
    model = read(tmp_path / "handover", "binary")
    for image in model.images.values():
        camera = model.cameras[image.camera_id]
        _, _, cx, cy = camera.params
        assert max(abs(cx - camera.width / 2), abs(cy - camera.height / 2)) <= 0.5
        picture = cv2.imread(str(tmp_path / "handover" / "images" / image.name))[..., ::-1]
        assert picture.shape[:2] == (camera.height, camera.width)
        view = views[int(image.name[3])]
        left, top = np.rint(view.K[:2, 2] + 0.5 - [cx, cy]).astype(int)
        assert np.array_equal(picture, view.image[top : top + camera.height, left : left + camera.width])


def test_keyframes_follow_the_moves_of_a_camera(tmp_path: Path) -> None:
    source = replace(option("source", "synthetic"), width=32, height=24, count=1, moving=0)
    (view,) = source.bootstrap()
    bootstrap = Recorded(name="recorded").bootstrap([view], source.scale(), None)
    writer = KeyframeWriter(tmp_path, HandoverOptions(max_images=4), bootstrap)
    for frame in range(60):
        pose = view.T_world_cam.copy()
        pose[0, 3] += 0.03 * frame
        writer.offer(replace(view, frame=frame, T_world_cam=pose))
    writer.close()
    frames, scale = read_keyframes(tmp_path)
    assert [frame.frame for frame in frames] == [0, 4, 8, 12]
    assert scale.unit == "m"
    np.testing.assert_allclose(frames[1].T_world_cam[0, 3], view.T_world_cam[0, 3] + 0.12)


def test_a_camera_without_a_frame_comes_with_its_bootstrap_image(tmp_path: Path) -> None:
    source = replace(option("source", "synthetic"), width=32, height=24, count=2, moving=0)
    views = source.bootstrap()
    bootstrap = Recorded(name="recorded").bootstrap(views, source.scale(), None)
    writer = KeyframeWriter(tmp_path, HandoverOptions(), bootstrap)
    writer.offer(replace(views[0], frame=7))
    writer.close()
    rows = json.loads((tmp_path / "keyframes" / "cameras.json").read_text())["frames"]
    assert [(row["camera"], row["origin"]) for row in rows] == [("cam0", "stream"), ("cam1", "bootstrap")]
    stranger = View("nobody", 0, views[0].image)
    assert camera_of(bootstrap, stranger) is None


def test_damaged_and_foreign_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReconError, match="no complete run"):
        HandoverOptions(run=str(tmp_path)).check()
    recorded_run(tmp_path)
    require_complete(tmp_path)
    (tmp_path / "map_updated.ply").write_bytes(b"ply\n")
    with pytest.raises(ReconError, match=r"map_updated\.ply"):
        require_complete(tmp_path)
    index = tmp_path / "keyframes" / "cameras.json"
    index.write_text(index.read_text().replace("cam0_000000.png", "../../etc/passwd"))
    with pytest.raises(ReconError, match="not what a run writes"):
        hand_over(tmp_path, tmp_path, HandoverOptions())
    index.unlink()
    with pytest.raises(ReconError, match="has no keyframes"):
        hand_over(tmp_path, tmp_path, HandoverOptions())
    assert not (tmp_path / "handover").exists()


def test_stages_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """reconstruct and handover in one run with a recording of it; then a second run that hands over the first."""
    monkeypatch.setattr("recon.figures.MAP_SIZE", (240, 160))
    config = Config(
        model=option("model", "recorded"),
        depth=option("depth", "recorded"),
        engine=option("engine", "torch"),
        quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"),
        source=replace(option("source", "synthetic"), width=64, height=48, steps=2, moving=0, count=2),
        fusion=replace(option("fusion", "tsdf"), voxel=0.06),
        tracking=option("tracking", "none"),
        stages=["depth", "reconstruct", "handover", "evaluate", "report"],
        depth_video=DepthVideoOptions(width=64),
        viewer="rerun" if find_spec("rerun") else "none",
        output=str(tmp_path),
    )
    first, second = tmp_path / "first", tmp_path / "second"
    check(config)
    state = ran(config, first)
    assert [row.stage for row in state.rows] == ["depth", "reconstruct", "handover", "evaluate", "report"]
    sealed = json.loads((first / "manifest.json").read_text())["files"]
    wanted = {"handover/sparse/0/points3D.bin", "handover/transforms.json", "handover/gaussians.ply"}
    wanted |= {"keyframes/cameras.json", "overview.png", "depth_video/all.mp4"}
    assert wanted <= sealed.keys()
    assert ("recon.rrd" in sealed) == (config.viewer == "rerun")
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["handover"]["unit"] == "m"
    assert metrics["handover"]["images"] == 2
    assert metrics["depth"]["frames_seen"] == 6
    assert metrics["evaluation"]["map_alignment"].startswith("none")
    again = replace(config, stages=["handover"], viewer="none", handover=HandoverOptions(run=str(first)))
    check(again)
    ran(again, second)
    names = {path.relative_to(first) for path in (first / "handover").rglob("*.bin")}
    assert {path.relative_to(second) for path in (second / "handover").rglob("*.bin")} == names
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes()
    with pytest.raises(ReconError, match="no run to hand over"):
        check(replace(config, stages=["handover"], viewer="none"))


@pytest.mark.parametrize("change", [{"opacity": 1.0}, {"flatness": 0.0}, {"sh_degree": 4}, {"max_points": 3}])
def test_impossible_options(change: dict[str, float]) -> None:
    with pytest.raises(ReconError, match=next(iter(change))):
        replace(HandoverOptions(), **change).check()
