"""Pictures of maps: the right pixel for a known thing, and pages without empty space."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from recon.config import Config, option
from recon.figures import GAP, HEAD, WIDTH, Row, compose, draw_alignment, input_rows, map_row
from recon.fusion import Mesh
from recon.geometry.views import Scale
from recon.mapview import GROUND, intrinsics, look_at, map_image, mesh_image, splat_image, viewpoint
from recon.models.recorded import Recorded
from recon.sources.synthetic import Synthetic


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.figures.MAP_SIZE", (240, 160))


@pytest.fixture(scope="module")
def run() -> tuple[Config, SimpleNamespace]:
    source = replace(option("source", "synthetic"), width=160, height=120, steps=1, count=3, moving=1)
    assert isinstance(source, Synthetic)
    bootstrap = Recorded(name="recorded").bootstrap(source.bootstrap(), source.scale(), None)
    fused = replace(option("fusion", "tsdf"), voxel=0.03).create()
    for posed in bootstrap.views:
        fused.integrate(posed, 0)
    config = Config(source=source, model=Recorded(name="recorded"), depth=option("depth", "recorded"))
    log = SimpleNamespace(accepted=3, seen=4)
    return config, SimpleNamespace(bootstrap=bootstrap, fused=fused, scale=Scale("m", "test"), log=log, frames=[])


def test_a_triangle_is_where_the_camera_says() -> None:
    """A red triangle and a nearer green one: colours at chosen pixels, ground elsewhere."""
    K = intrinsics(80, 60)
    corners = np.array([[-1, -1, 4.0], [1, -1, 4], [-1, 1, 4], [-0.2, -0.2, 2], [0.2, -0.2, 2], [-0.2, 0.2, 2]])
    colors = np.repeat(np.array([[255, 0, 0], [0, 255, 0]], np.uint8), 3, axis=0)
    mesh = Mesh(corners.astype(np.float32), np.array([[0, 1, 2], [3, 4, 5]], np.int32), colors)
    image = mesh_image(mesh, np.eye(4), 80, 60)

    def at(x: float, y: float, z: float) -> list[int]:
        u, v = K[0, 0] * x / z + K[0, 2], K[1, 1] * y / z + K[1, 2]
        return image[round(v), round(u)].tolist()

    assert at(-0.8, -0.8, 4) == [255, 0, 0]
    assert at(-0.1, -0.1, 2) == [0, 255, 0]
    assert at(0.9, 0.9, 4) == list(GROUND)


def test_splats_cover_what_meshes_cover(run: tuple[Config, SimpleNamespace]) -> None:
    _, result = run
    cloud = result.fused.points()
    pose = viewpoint(np.asarray(cloud.points, np.float64), result.bootstrap)
    meshed = map_image(result.fused, pose, 120, 90)
    splatted = splat_image(cloud.points, cloud.colors, pose, 120, 90, 0.03)
    known = [(image != np.array(GROUND)).any(axis=2) for image in (meshed, splatted)]
    assert known[0].mean() > 0.7
    assert np.mean(known[0] == known[1]) > 0.9


def test_the_map_looks_like_the_true_scene_from_the_same_viewpoint(run: tuple[Config, SimpleNamespace]) -> None:
    """Exact depth: where the map is known its colours are those of the scene; from elsewhere they are not."""
    config, result = run
    pose = viewpoint(np.asarray(result.fused.points().points, np.float64), result.bootstrap)
    ours = map_image(result.fused, pose, 160, 120).astype(float)
    truth = config.source.picture(intrinsics(160, 120), pose, 160, 120)
    turned = pose.copy()
    turned[:3, :3] = turned[:3, :3] @ look_at(np.zeros(3), np.array([0.15, 0, 1.0]), np.array([0, -1.0, 0]))[:3, :3]
    other = config.source.picture(intrinsics(160, 120), turned, 160, 120)
    assert truth is not None
    assert other is not None
    known = (ours != np.array(GROUND)).any(axis=2)
    right, wrong = (float(np.abs(ours - picture)[known].mean()) for picture in (truth, other))
    assert right < 16
    assert wrong > 1.6 * right


def test_a_viewpoint_is_raised_and_upright(run: tuple[Config, SimpleNamespace]) -> None:
    _, result = run
    points = np.asarray(result.fused.points().points, np.float64)
    pose = viewpoint(points, result.bootstrap)
    mean = np.mean([view.T_world_cam[:3, 3] for view in result.bootstrap.views], axis=0)
    assert pose[2, 3] > mean[2] + 0.1  # z is up in the synthetic room
    assert abs(pose[2, 0]) < 0.05
    assert pose[:3, 2] @ (np.median(points, axis=0) - pose[:3, 3]) > 0
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)


def test_pages_have_all_pictures_and_no_empty_space(run: tuple[Config, SimpleNamespace]) -> None:
    config, result = run
    rows = [*input_rows(config, result), map_row(config, result, {"unit": "m", "depth_absrel": 0.01})]
    assert [len(row.cells) for row in rows] == [3, 3, 2]
    assert "AbsRel 0.010" in rows[2].note
    assert rows[2].names[1].startswith("true scene")
    figure = compose(rows)
    heights = [HEAD + (WIDTH - GAP * (len(row.cells) + 1)) / len(row.cells) * row.aspect for row in rows]
    assert figure.get_figheight() == pytest.approx(sum(heights) + 4 * GAP)
    boxes = np.array([axis.get_position().extents for axis in figure.axes])
    assert boxes.min() >= 0
    assert boxes.max() <= 1


def test_without_a_known_scene_the_second_picture_is_another_view(run: tuple[Config, SimpleNamespace]) -> None:
    config, result = run
    unknown = SimpleNamespace(picture=lambda *_: None)
    row = map_row(SimpleNamespace(source=unknown, depth=config.depth, model=config.model), result, {})  # type: ignore[arg-type]
    assert row.names == ("fused map", "from above")
    assert isinstance(row, Row)


def test_a_frame_without_depth_has_no_residual_and_costs_no_report() -> None:
    from matplotlib.figure import Figure

    lost = {"camera": "a", "frame": 1, "accepted": False, "reason": "no depth: cut off", "s": None, "t": None}
    good = {"camera": "b", "frame": 1, "accepted": True, "reason": "", "resid_med_pct": 1.5}
    drawn = []
    for frames in ([lost], [lost, good]):
        figure = Figure()
        draw_alignment(figure, SimpleNamespace(frames=frames))  # type: ignore[arg-type]
        legend = figure.axes[0].get_legend()
        drawn.append([text.get_text() for text in legend.get_texts()] if legend else [])
    assert drawn == [[], ["b"]]
