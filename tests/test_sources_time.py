"""Images with time stamps, rigs that move, undistorted views, and what the source says it lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recon.errors import ReconError
from recon.geometry.preprocess import place
from recon.geometry.registration import register
from recon.sources.images import Images

SIZE = (40, 30)
K = np.array([[35.0, 0, 19.5], [0, 35.0, 14.5], [0, 0, 1]])
FLIP = np.diag([1.0, -1, -1, 1])


def shifted(x: float) -> np.ndarray:
    T = np.eye(4)
    T[0, 3] = x
    return T


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cameras with five frames; a frame's first pixel says which it is. The left one took its frame 2 late."""
    lines = ["camera,file,time_s"]
    for number, camera in enumerate(("left", "right")):
        for frame in range(5):
            path = tmp_path / "images" / camera / f"{frame:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(frame).integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
            pixels[0, 0] = 10 * number + frame
            Image.fromarray(pixels).save(path)
            late = 0.07 if (camera, frame) == ("left", 2) else 0.0
            lines.append(f"{camera},{path.name},{10 + frame / 10 + late + 0.004 * number:.3f}")
    (tmp_path / "times.csv").write_text("\n".join(lines))
    return tmp_path


def source(root: Path, **knobs: Any) -> Images:
    known = {"name": "images", "path": str(root / "images"), "timestamps": str(root / "times.csv")}
    found = Images(**(known | knobs))  # type: ignore[arg-type]
    found.check()
    found.validate()
    return found


def numbers(images: Images) -> list[dict[str, int]]:
    return [{v.camera: int(v.image[0, 0, 0]) % 10 for v in views} for views in images.batches()]


def test_frames_are_put_together_by_time(folder: Path) -> None:
    images = source(folder)
    one, two = {"left": 1, "right": 1}, [{"right": 2}, {"left": 2}]
    assert numbers(images) == [one, *two, *({"left": n, "right": n} for n in (3, 4))]
    assert images.bootstrap()[1].time_s == 10.004
    report = images.report()
    assert report["frames_without_partner"] == 2
    assert report["skew_ms"]["max"] == pytest.approx(4.0)
    assert report["cameras"]["left"]["delivered"] == 4
    assert len(numbers(source(folder, max_skew_ms=80.0))) == 4


def test_time_limits_and_steps(folder: Path) -> None:
    assert source(folder, start_s=0.1).bootstrap()[0].frame == 1
    assert numbers(source(folder, end_s=0.15)) == [{"left": 1, "right": 1}]
    assert numbers(source(folder, max_skew_ms=80.0, frame_step=2)) == [{"left": n, "right": n} for n in (2, 4)]
    assert source(folder, bootstrap_frame=1).bootstrap()[0].frame == 1
    with pytest.raises(ReconError, match="need time"):
        source(folder, timestamps=None, start_s=1.0)


def test_a_camera_that_ends_early_does_not_end_the_others(folder: Path) -> None:
    for name in ("002", "003", "004"):
        (folder / "images" / "right" / f"{name}.png").unlink()
    assert numbers(source(folder))[1:] == [{"left": 2}, {"left": 3}, {"left": 4}]


def test_clocks_that_never_meet_are_refused(folder: Path) -> None:
    text = (folder / "times.csv").read_text().splitlines()
    moved = [line if line.startswith(("camera", "left")) else line.replace(",10.", ",99.") for line in text]
    (folder / "times.csv").write_text("\n".join(moved))
    with pytest.raises(ReconError, match="at no time do all 2 cameras"):
        source(folder)


def test_the_stream_of_a_second_folder_has_the_times(folder: Path) -> None:
    (folder / "start").mkdir()
    for camera in ("left", "right"):
        Image.open(folder / "images" / camera / "000.png").save(folder / "start" / f"{camera}.png")
    images = source(folder, path=str(folder / "start"), live_path=str(folder / "images"))
    assert [view.frame for view in images.bootstrap()] == [0, 0]
    assert numbers(images)[0] == {"left": 0, "right": 0}
    assert len(numbers(images)) == 6


def transforms(folder: Path, leave_out: str = "") -> str:
    frames = [
        {"file_path": f"images/{camera}/{frame:03d}.png", "transform_matrix": (shifted(10 * n + frame) @ FLIP).tolist()}
        for n, camera in enumerate(("left", "right"))
        for frame in range(5)
    ]
    frames = [frame for frame in frames if frame["file_path"] != leave_out]
    optics = {"fl_x": 35.0, "fl_y": 35.0, "cx": 20.0, "cy": 15.0, "w": 40, "h": 30, "k1": -0.1}
    (folder / "transforms.json").write_text(json.dumps({**optics, "frames": frames}))
    return str(folder / "transforms.json")


def test_a_rig_that_moves_has_a_pose_for_every_image(folder: Path) -> None:
    images = source(folder, rig=transforms(folder), timestamps=None)
    views = [images.bootstrap(), *images.batches()]
    found = [[float(v.T_world_cam[0, 3]) for v in batch if v.T_world_cam is not None] for batch in views]
    assert found == [[n, 10 + n] for n in range(5)]
    first = views[0][0]
    assert first.origin is not None
    assert first.K is not None
    np.testing.assert_allclose(first.K[:2, 2], K[:2, 2])
    assert images.scale().unit == "arbitrary"
    assert source(folder, rig=transforms(folder), rig_unit="m").scale().unit == "m"


def test_an_image_without_pose_is_lost_and_counted(folder: Path) -> None:
    images = source(folder, rig=transforms(folder, "images/left/003.png"), timestamps=None)
    assert [sorted(v.camera for v in batch) for batch in images.batches()][2] == ["right"]
    assert images.report()["cameras"]["left"]["lost"] == {"no pose": 1}


def test_depth_follows_the_undistortion(folder: Path) -> None:
    for camera in ("left", "right"):
        (folder / "depth" / camera).mkdir(parents=True)
        for frame in range(5):
            pixels = np.tile(1000 + np.arange(40, dtype=np.uint16), (30, 1))
            Image.fromarray(pixels).save(folder / "depth" / camera / f"{frame:03d}.png")
    rig = transforms(folder)
    view = source(folder, rig=rig, rig_unit="m", depth=str(folder / "depth")).bootstrap()[0]
    assert view.origin is not None
    assert view.depth is not None
    grid = np.stack(np.meshgrid(np.arange(40.0), np.arange(30.0)), axis=-1)
    expected = 1 + np.rint(view.origin.to_camera(grid)[..., 0]) / 1000
    np.testing.assert_allclose(view.depth, expected, atol=1e-6)
    assert source(folder, depth=str(folder / "depth")).scale().source == "recorded depth"
    with pytest.raises(ReconError, match=r"its unit is arbitrary, with source\.depth"):
        source(folder, rig=rig, depth=str(folder / "depth"))


def test_intrinsics_may_bend_too(folder: Path) -> None:
    np.savez(folder / "K.npz", K=K, distortion=[-0.2, 0.01, 0, 0], width=40, height=30)
    view = source(folder, intrinsics=str(folder / "K.npz")).bootstrap()[0]
    assert view.origin is not None
    assert view.origin.lens.coefficients == (-0.2, 0.01, 0.0, 0.0)
    np.savez(folder / "K.npz", K=K, distortion=[-0.2, 0.01], width=40, height=30)
    with pytest.raises(ReconError, match="2 distortion coefficients"):
        source(folder, intrinsics=str(folder / "K.npz"))


def test_key_and_trust(folder: Path) -> None:
    rig = transforms(folder)
    keys = {
        source(folder, **knobs).content_key()
        for knobs in ({}, {"rig": rig}, {"rig": rig, "trust_poses": False}, {"start_s": 0.1}, {"views": ["left"]})
    }
    assert len(keys) == 5
    assert source(folder, rig=rig).bootstrap()[0].pose_trusted
    assert not source(folder).bootstrap()[0].pose_trusted


def test_a_calibrated_rig_stands_against_a_network_that_sees_it_otherwise(folder: Path) -> None:
    """The poses stay, the doubt is recorded; poses that nobody vouches for are not used."""
    T = np.stack([shifted(x) for x in (0.0, 1.0)])
    T[1, 2, 3] = 0.3
    np.savez(folder / "rig.npz", camera_names=["left", "right"], T_world_cam=T, unit="m")
    images = source(folder, rig=str(folder / "rig.npz"))
    views = images.bootstrap()
    seen = T.copy()
    seen[:, :3, 3] *= 0.25
    seen[1, :3, :3] = np.diag([-1.0, 1, -1])  # the network has one camera look backwards
    placements = [place(view.size, (56, 42), "crop") for view in views]
    found = register(views, placements, seen, np.stack([K, K]))
    assert found.accepted
    np.testing.assert_array_equal(found.T_world_cam, T)
    assert found.scale == pytest.approx(4.0)
    assert str(found.notes["pose_confidence"]).startswith("low")
    doubtful = source(folder, rig=str(folder / "rig.npz"), trust_poses=False).bootstrap()
    assert not register(doubtful, placements, seen, np.stack([K, K])).accepted
    agreeing = T.copy()
    agreeing[:, :3, 3] *= 0.25
    assert "pose_confidence" not in register(views, placements, agreeing, np.stack([K, K])).notes


def test_a_baseline_reaches_whoever_estimates_poses(folder: Path) -> None:
    np.savez(folder / "rig.npz", camera_names=["left", "right"], baseline_cameras=["left", "right"], baseline_m=0.3)
    images = source(folder, rig=str(folder / "rig.npz"))
    baseline = images.baseline()
    assert baseline is not None
    assert (baseline.first, baseline.second, baseline.metres) == ("left", "right", 0.3)
    assert images.scale().unit == "arbitrary"
    assert source(folder).baseline() is None


def test_frames_of_the_office_recording_as_images(data_dir: Path, tmp_path: Path) -> None:
    from recon.sources.videofiles import frames, index_video

    office = data_dir / "office4"
    for number in range(4):
        (tmp_path / f"cam_{number}").mkdir()
        for frame, image in frames(index_video(office / f"cam_{number}.mp4"), range(3)):
            assert not isinstance(image, str)
            Image.fromarray(image).save(tmp_path / f"cam_{number}" / f"{frame}.jpg")
    images = Images(
        name="images", path=str(tmp_path), rig=str(office / "camera_array.toml"),
        timestamps=str(office / "timestamps.csv"),
    )  # fmt: skip
    images.check()
    images.validate()
    assert [len(batch) for batch in images.batches()] == [4, 4]
    assert images.scale().unit == "m"
    assert images.report()["skew_ms"]["max"] < 20
    assert all(view.origin is not None and view.T_world_cam is not None for view in images.bootstrap())
