"""`viewer=rerun`: the recording is read back with rerun's own reader."""

import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recon.config import check_viewer, option
from recon.errors import ReconError, Refused
from recon.fusion import Map
from recon.geometry.views import Bootstrap, View
from recon.models.recorded import Recorded
from recon.options import RerunOptions
from recon.viewer import Viewer, _flush, _require_complete, open_viewer

SIZE, PER_VIEW_POINTS = (64, 48), 100


@pytest.fixture(scope="module")
def scene() -> tuple[list[View], list[list[View]], Bootstrap, Map]:
    source = replace(option("source", "synthetic"), width=64, height=48, steps=6, count=2)
    views = source.bootstrap()
    bootstrap = Recorded(name="recorded").bootstrap(views, source.scale(), None)
    fused = replace(option("fusion", "surfel"), voxel=0.08).create()
    for posed in bootstrap.views:
        fused.integrate(posed, 0)
    return views, list(source.batches()), bootstrap, fused


def record(scene: Any, folder: Path, **changes: Any) -> tuple[Path, ...]:
    """Two cameras over six steps; the second frame of cam1 is rejected."""
    _, batches, bootstrap, fused = scene
    options = replace(RerunOptions(map_period_s=0.0, image_width=32, depth_width=16, map_points=200), **changes)
    with open_viewer("rerun", folder, bootstrap, options) as viewer:
        for step, views in enumerate(batches, 1):
            for view in views:
                depth = None if (view.camera, step) == ("cam1", 2) else view.depth
                viewer.frame(view, depth, {"resid_med_pct": 1.5})
            viewer.step(step, fused)
    return viewer.files


def chunks(path: Path) -> list[Any]:
    reader = pytest.importorskip("rerun.chunk").RrdReader(path)
    (recording,) = reader.recordings()
    return list(reader.stream(store=recording))


def column(path: Path, entity: str, name: str) -> dict[int, Any]:
    """Values of one component by step."""
    found = {}
    for chunk in chunks(path):
        if chunk.entity_path == entity and not chunk.is_static:
            table = chunk.to_record_batch()
            for key in table.schema.names:
                if key.endswith(name):
                    steps = table.column("step").to_pylist()
                    found |= {s: v for s, v in zip(steps, table.column(key).to_pylist(), strict=True) if v is not None}
    return found


@pytest.fixture(scope="module")
def recorded(scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rerun")
    (path,) = record(scene, tmp_path_factory.mktemp("viewer"))
    assert path.name == "recon.rrd"
    return path


def test_rerun_itself_verifies_the_file(recorded: Path) -> None:
    command = [sys.executable, "-m", "rerun", "rrd", "verify", str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_entities_and_timelines(recorded: Path) -> None:
    found = {chunk.entity_path for chunk in chunks(recorded)}
    cameras = {f"/world/cameras/{name}" for name in ("cam0", "cam1")}
    parts = {f"{camera}/{part}" for camera in cameras for part in ("image", "depth")}
    assert {"/world", "/world/map", "/align/cam0", "/align/cam1", *cameras, *parts} <= found
    moving = [chunk for chunk in chunks(recorded) if chunk.entity_path == "/world/cameras/cam0/image"]
    assert all({"step", "time"} & set(chunk.timeline_names) for chunk in moving)


def test_depth_comes_back_in_millimetres(scene: Any, recorded: Path) -> None:
    _, batches, _, _ = scene
    images = column(recorded, "/world/cameras/cam0/depth", "DepthImage:buffer")
    assert sorted(images) == list(range(7))
    view = batches[3][0]
    found = np.frombuffer(bytes(images[4][0]), np.uint16).reshape(12, 16) / 1000
    sampled = view.depth[::4, ::4]
    assert np.median(np.abs(found - sampled) / sampled) < 0.05


def test_images_are_jpeg_of_the_bounded_width(recorded: Path) -> None:
    import cv2

    images = column(recorded, "/world/cameras/cam1/image", "EncodedImage:blob")
    assert len(images) == 7
    picture = cv2.imdecode(np.frombuffer(bytes(images[3][0]), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (24, 32, 3)


def test_a_fixed_camera_is_logged_once_and_its_pinhole_is_ours_half_a_pixel_on(scene: Any, recorded: Path) -> None:
    views = scene[0]
    poses = column(recorded, "/world/cameras/cam0", "Transform3D:translation")
    assert list(poses) == [0]
    np.testing.assert_allclose(poses[0][0], views[0].T_world_cam[:3, 3], atol=1e-6)
    (K,) = column(recorded, "/world/cameras/cam0/image", "Pinhole:image_from_camera").values()
    K = np.array(K[0]).reshape(3, 3).T  # columns first
    np.testing.assert_allclose(K[:2, :2], views[0].K[:2, :2] / 2, rtol=1e-5)
    np.testing.assert_allclose(K[:2, 2], (views[0].K[:2, 2] + 0.5) / 2, rtol=1e-5)


def test_a_rejected_frame_has_no_depth(recorded: Path) -> None:
    assert sorted(column(recorded, "/world/cameras/cam1/depth", "DepthImage:buffer")) == [0, 1, 3, 4, 5, 6]


def test_the_map_comes_at_a_bounded_rate_and_size(scene: Any, recorded: Path, tmp_path: Path) -> None:
    often = column(recorded, "/world/map", "Points3D:positions")
    assert sorted(often) == list(range(1, 7))
    assert {len(points) for points in often.values()} == {200}
    (path,) = record(scene, tmp_path, map_period_s=1000.0)
    assert sorted(column(path, "/world/map", "Points3D:positions")) == [1, 6]


def test_the_budget_ends_pictures_but_not_the_last_map(scene: Any, tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    options = RerunOptions(map_period_s=0.0, max_mib=0)
    _, batches, bootstrap, fused = scene
    with open_viewer("rerun", tmp_path, bootstrap, options) as viewer:
        for step, views in enumerate(batches, 1):
            for view in views:
                viewer.frame(view, view.depth, {})
            viewer.step(step, fused)
    (path,) = viewer.files
    assert sorted(column(path, "/world/cameras/cam0/image", "EncodedImage:blob")) == [0]
    assert sorted(column(path, "/world/map", "Points3D:positions")) == [6]


def test_a_run_that_fails_leaves_no_recording(scene: Any, tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    with pytest.raises(RuntimeError, match="midway"), open_viewer("rerun", tmp_path, scene[2], RerunOptions()):
        raise RuntimeError("midway")
    assert not list(tmp_path.iterdir())


def test_a_recording_cut_short_is_noticed(recorded: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.rrd"
    cut.write_bytes(recorded.read_bytes()[:-4096])
    with pytest.raises(ReconError, match="cut short"):
        _require_complete(cut)
    _require_complete(recorded)


def test_a_full_disk_costs_the_recording_not_the_run(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun")
    monkeypatch.setattr("recon.viewer.FLUSH_S", 2.0)  # waited for twice
    _, batches, bootstrap, fused = scene
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with open_viewer("rerun", tmp_path, bootstrap, RerunOptions(map_period_s=0.0)) as viewer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
            for step, views in enumerate(batches, 1):
                for view in views:
                    viewer.frame(view, view.depth, {})
                viewer.step(step, fused)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (viewer.files, viewer.lost) == ((), "recon.rrd: the recording was cut short")
    assert not list(tmp_path.iterdir())


def test_a_recording_that_cannot_end_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full disk rerun sometimes waits for its writing thread without end, again when the process ends."""
    rerun, forgotten, over = pytest.importorskip("rerun"), threading.Event(), threading.Event()
    recording = SimpleNamespace(flush=lambda timeout_sec: None, disconnect=over.wait)
    monkeypatch.setattr(rerun, "unregister_shutdown", forgotten.set)
    monkeypatch.setattr("recon.viewer.FLUSH_S", 0.05)
    _flush(recording, spawned=False)
    assert forgotten.is_set()
    over.set()
    forgotten.clear()
    _flush(recording, spawned=False)
    assert not forgotten.is_set()


def test_none_shows_nothing(scene: Any, tmp_path: Path) -> None:
    with open_viewer("none", tmp_path, scene[2], RerunOptions()) as viewer:
        assert type(viewer) is Viewer
        viewer.step(1, scene[3])
    assert viewer.files == ()
    assert not list(tmp_path.iterdir())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    check_viewer("none", ["export"])
    with pytest.raises(ReconError, match="no such viewer"):
        check_viewer("viser", ["reconstruct"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="not installed") as caught:
        check_viewer("rerun", ["reconstruct"])
    assert "recon[viewer]" in caught.value.remedy
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(Refused, match="reconstruct"):
        check_viewer("rerun", ["export"])
    check_viewer("rerun", ["reconstruct"])
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(Refused, match="no display"):
        check_viewer("rerun", ["reconstruct"], spawn=True)
    monkeypatch.setenv("DISPLAY", ":0")
    check_viewer("rerun", ["reconstruct"], spawn=True)


@pytest.mark.slow  # rerun waits for the viewer
def test_a_viewer_that_is_gone_does_not_cost_the_recording(
    scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing listens where the viewer should be, as after a person has closed it."""
    rerun = pytest.importorskip("rerun")
    monkeypatch.setattr(rerun, "spawn", lambda **_: None)
    (path,) = record(scene, tmp_path, spawn=True)
    assert "does not answer" in caplog.text
    assert sorted(column(path, "/world/map", "Points3D:positions")) == [1, 2, 3, 4, 5, 6]
