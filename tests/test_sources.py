"""Sources: what they deliver, and every bad input as one message with value, rule and remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from recon.errors import ReconError
from recon.geometry.cameras import invert
from recon.sources.images import Images
from recon.sources.webcams import quote_devices

SIZE = (40, 30)
K = np.array([[35.0, 0, 19.5], [0, 35.0, 14.5], [0, 0, 1]])


def _picture(path: Path, shade: int, size: tuple[int, int] = SIZE, **save: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    pixels[0, 0] = shade
    Image.fromarray(pixels).save(path, **save)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cameras with three frames, depth, intrinsics and fixed poses."""
    for number, camera in enumerate(("left", "right")):
        for frame in (1, 2, 10):  # natural order, not that of the alphabet
            _picture(tmp_path / "images" / camera / f"f{frame}.png", 10 * number + frame)
            depth = np.full(SIZE[::-1], 1000 + frame, np.uint16)
            (tmp_path / "depth" / camera).mkdir(parents=True, exist_ok=True)
            Image.fromarray(depth).save(tmp_path / "depth" / camera / f"f{frame}.png")
    _npz(tmp_path, "K", K=np.stack([K, 2 * K + np.diag([0, 0, -1.0])]), width=SIZE[0], height=SIZE[1])
    _npz(tmp_path, "poses", T_world_cam=np.stack([np.eye(4), _shifted(1.0)]))
    return tmp_path


def _npz(root: Path, name: str, **arrays: Any) -> str:
    np.savez(root / f"{name}.npz", **arrays)
    return str(root / f"{name}.npz")


def _shifted(x: float) -> np.ndarray:
    T = np.eye(4)
    T[0, 3] = x
    return T


def _source(root: Path, **knobs: Any) -> Images:
    known = {"path": "images", "intrinsics": "K.npz", "poses": "poses.npz", "depth": "depth"}
    paths: dict[str, Any] = {key: str(root / value) for key, value in known.items()}
    return Images(name="images", **(paths | knobs))


def _examine(source: Images) -> None:
    source.check()
    source.validate()


def _run(source: Images) -> None:
    _examine(source)
    list(source.batches())


def test_images_come_in_natural_order_with_everything_known(folder: Path) -> None:
    source = _source(folder)
    _run(source)
    assert source.cameras() == ["left", "right"]
    first = source.bootstrap()
    assert [(v.camera, v.frame, int(v.image[0, 0, 0])) for v in first] == [("left", 0, 1), ("right", 0, 11)]
    assert first[1].T_world_cam is not None
    assert first[1].K is not None
    assert first[0].depth is not None
    assert first[1].T_world_cam[0, 3] == 1
    assert first[1].K[0, 0] == 70
    np.testing.assert_array_equal(first[0].depth, np.float32(1.001))
    stream = [[int(v.image[0, 0, 0]) for v in views] for views in source.batches()]
    assert stream == [[2, 12], [10, 20]]
    assert len(source) == 2
    assert (source.scale().unit, source.scale().source) == ("m", "known poses")


def test_frame_step_bootstrap_frame_views_and_max_batches(folder: Path) -> None:
    assert [v[0].frame for v in _source(folder, frame_step=2).batches()] == [2]
    assert [v[0].frame for v in _source(folder, max_batches=1).batches()] == [1]
    assert [v[0].frame for v in _source(folder, bootstrap_frame=1).batches()] == [2]
    assert _source(folder, bootstrap_frame=1).bootstrap()[0].frame == 1
    assert _source(folder, views=["right"]).bootstrap()[0].K[0, 0] == 70  # type: ignore[index]
    drawn = {tuple(_source(folder, random_views=1, seed=seed).cameras()) for seed in range(20)}
    assert drawn == {("left",), ("right",)}


def test_a_pose_per_frame_and_the_inverse_direction(folder: Path) -> None:
    T = np.stack([[_shifted(10 * camera + frame) for frame in range(3)] for camera in range(2)])
    poses = _npz(folder, "moving", T_cam_world=invert(T), camera_names=["left", "right"])
    *_, last = _source(folder, poses=poses).batches()
    assert [float(v.T_world_cam[0, 3]) for v in last if v.T_world_cam is not None] == pytest.approx([2, 12])


def test_unit_is_metres_only_with_a_reason(folder: Path) -> None:
    assert _source(folder, poses=None).scale().source == "recorded depth"
    assert _source(folder, poses=None, depth=None).scale().unit == "arbitrary"
    assert _source(folder, depth=None, poses_unit="arbitrary").scale().unit == "arbitrary"
    with pytest.raises(ReconError, match="recorded depth is in metres"):
        _source(folder, poses_unit="arbitrary").check()


def test_a_flat_folder_is_one_moment(folder: Path) -> None:
    source = Images(name="images", path=str(folder / "images" / "left"))
    source.validate()
    assert source.cameras() == ["f1", "f2", "f10"]
    assert [v.camera for v in source.bootstrap()] == ["f1", "f2", "f10"]
    assert list(source.batches()) == []


def test_the_stream_may_come_from_another_folder(folder: Path) -> None:
    for camera in ("left", "right"):
        for frame in range(4):
            _picture(folder / "live" / camera / f"{frame}.jpg", 100 + frame)
    source = _source(folder, live_path=str(folder / "live"))
    _run(source)
    stream = list(source.batches())
    assert len(stream) == len(source) == 4
    assert stream[0][0].frame == 0
    assert stream[0][0].depth is None
    assert stream[0][1].T_world_cam[0, 3] == 1  # type: ignore[index]
    moving = _npz(folder, "moving", T_world_cam=np.tile(np.eye(4), (2, 3, 1, 1)))
    with pytest.raises(ReconError, match=r"3 poses per camera|one pose per frame"):
        _run(_source(folder, live_path=str(folder / "live"), poses=moving))


def test_the_shortest_camera_ends_the_stream_and_that_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "images" / "right" / "f10.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(list(_source(folder).batches())) == 1
    assert "the stream ends after 2, with right" in caplog.text


def test_a_late_part_of_an_image_is_not_read_for_its_size(tmp_path: Path) -> None:
    from recon.sources.imagefiles import image_size

    for name in ("a.png", "a.jpg"):
        _picture(tmp_path / name, 1, (200, 150))
        _truncate(tmp_path / name)
        assert image_size(tmp_path / name) == (200, 150)


def test_grey_transparent_wide_and_rotated_images_become_upright_rgb(tmp_path: Path) -> None:
    from recon.sources.imagefiles import image_size, read_image

    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == 7).all()
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, 3:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    image = read_image(tmp_path / "clear.png")
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 5].tolist() == [200, 0, 0]
    Image.fromarray(np.full((4, 6), 257 * 9, np.uint16)).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == 9).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (4, 6)
    assert read_image(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_the_content_key_follows_what_the_bootstrap_reads(folder: Path) -> None:
    key = _source(folder).content_key()
    assert _source(folder, max_batches=1).content_key() == key
    _picture(folder / "images" / "left" / "f10.png", 99)
    assert _source(folder).content_key() == key  # a frame of the stream
    changes: list[Callable[[], object]] = [
        lambda: _picture(folder / "images" / "left" / "f1.png", 98),
        lambda: _npz(folder, "poses", T_world_cam=np.stack([np.eye(4), _shifted(2.0)])),
        lambda: Image.fromarray(np.full(SIZE[::-1], 5, np.uint16)).save(folder / "depth" / "right" / "f1.png"),
    ]
    seen = {key, _source(folder, views=["left"]).content_key(), _source(folder, depth_scale=0.01).content_key()}
    for change in changes:
        change()
        seen.add(_source(folder).content_key())
    assert len(seen) == 6


class _Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("1/0",))


def _truncate(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _jpeg_cut(root: Path) -> dict[str, Any]:
    file = root / "images" / "left" / "f1.jpg"
    _picture(file, 1, quality=90)
    (root / "images" / "left" / "f1.png").unlink()
    _truncate(file)
    return {}


def _with_k(index: tuple[int, ...], value: float) -> Callable[[Path], dict[str, Any]]:
    def break_it(root: Path) -> dict[str, Any]:
        broken = np.stack([K, K])
        broken[index] = value
        return {"intrinsics": _npz(root, "bad", K=broken)}

    return break_it


def _with_pose(pose: np.ndarray) -> Callable[[Path], dict[str, Any]]:
    return lambda root: {"poses": _npz(root, "bad", T_world_cam=np.stack([np.eye(4), pose]))}


def _remove(*names: str) -> Callable[[Path], dict[str, Any]]:
    def break_it(root: Path) -> dict[str, Any]:
        for name in names:
            (root / name).unlink()
        return {}

    return break_it


def _empty(name: str) -> Callable[[Path], dict[str, Any]]:
    def break_it(root: Path) -> dict[str, Any]:
        (root / name).mkdir(parents=True)
        return {"path": str(root / name)} if "images" not in name else {}

    return break_it


def _other_size(root: Path) -> dict[str, Any]:
    _picture(root / "images" / "left" / "f2.png", 5, (41, 30))
    return {}


def _text(name: str) -> Callable[[Path], dict[str, Any]]:
    def break_it(root: Path) -> dict[str, Any]:
        (root / name).write_text("no such thing")
        return {}

    return break_it


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing path": (lambda root: {"path": str(root / "nowhere")}, r"nowhere: no such folder"),
    "path is a file": (lambda root: {"path": str(root / "K.npz")}, r"K\.npz: is a file"),
    "empty folder": (_empty("void"), r"void: is empty"),
    "no images": (lambda root: {"path": str(root / "films")}, r"films: no image is in it\n.*source=videos reads"),
    "camera without frames": (_empty("images/back"), r"camera 'back' has no frames"),
    "two sizes in one camera": (_other_size, r"camera left: .*f2\.png is 41x30, f1\.png is 40x30"),
    "truncated JPEG": (_jpeg_cut, r"f1\.jpg: cannot be decoded: .*truncated"),
    "no image": (_text("images/left/f2.png"), r"f2\.png: is no image"),
    "NaN in K": (_with_k((1, 0, 0), np.nan), r"camera right: intrinsics: not all values are finite"),
    "singular K": (_with_k((1, 1, 1), 0.0), r"camera right: focal lengths .*must be positive"),
    "K of another shape": (lambda root: {"intrinsics": _npz(root, "bad", K=np.eye(4))}, r"K is float64\[4, 4\]"),
    "K missing": (lambda root: {"intrinsics": _npz(root, "bad", M=K)}, r"holds \['M'\], no K"),
    "K for another size": (
        lambda root: {"intrinsics": _npz(root, "bad", K=K, width=80, height=60)},
        r"K of camera left is for 80x60, its images are 40x30",
    ),
    "K count": (lambda root: {"intrinsics": _npz(root, "bad", K=np.stack([K] * 3))}, r"3 entries for 2 cameras"),
    "K without this camera": (
        lambda root: {"intrinsics": _npz(root, "bad", K=np.stack([K, K]), camera_names=["left", "top"])},
        r"nothing for camera right",
    ),
    "scaled rotation": (_with_pose(np.diag([2.0, 2, 2, 1])), r"camera right, pose 0: .*no rotation"),
    "mirrored pose": (_with_pose(np.diag([-1.0, 1, 1, 1])), r"no rotation: determinant -1"),
    "pose count": (lambda root: {"poses": _npz(root, "bad", T_world_cam=np.eye(4)[None])}, r"1 entries for 2 cameras"),
    "pose count per frame": (
        lambda root: {"poses": _npz(root, "bad", T_world_cam=np.tile(np.eye(4), (2, 4, 1, 1)))},
        r"4 poses per camera, but camera left has 3 frames",
    ),
    "pose array missing": (lambda root: {"poses": _npz(root, "bad", T=np.eye(4))}, r"T_world_cam or T_cam_world"),
    "pickled objects": (
        lambda root: {"poses": _npz(root, "bad", T_world_cam=np.array([_Trap(), None]))},
        r"bad\.npz: holds pickled Python objects",
    ),
    "no npz": (_text("poses.npz"), r"poses\.npz: .*(pickled|cannot be read)"),
    "npz missing": (_remove("K.npz"), r"K\.npz: no such file"),
    "unknown camera": (lambda root: {"views": ["left", "top"]}, r"source\.views=.*no camera 'top'"),
    "camera twice": (lambda root: {"views": ["left", "left"]}, r"named twice"),
    "too many random views": (lambda root: {"random_views": 3}, r"source\.random_views=3: there are only 2"),
    "frame_step 0": (lambda root: {"frame_step": 0}, r"source\.frame_step=0: must be at least 1"),
    "bootstrap frame": (lambda root: {"bootstrap_frame": 3}, r"source\.bootstrap_frame=3: camera left has 3 frames"),
    "depth missing": (_remove("depth/right/f10.png"), r"depth/right/f10\.png: no depth for"),
    "depth no image": (_text("depth/left/f1.png"), r"depth/left/f1\.png: is no image"),
    "depth scale": (lambda root: {"depth_scale": 0.0}, r"source\.depth_scale=0\.0: must be positive"),
    "poses_unit": (lambda root: {"poses_unit": "feet"}, r"source\.poses_unit=feet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_any_work_and_explained(folder: Path, case: str) -> None:
    break_it, message = BAD[case]
    (folder / "films").mkdir()
    (folder / "films" / "left.mp4").write_bytes(b"a film")
    source = _source(folder, **break_it(folder))
    with pytest.raises(ReconError, match=message) as caught:
        _examine(source)
    assert caught.value.remedy


def test_images_beside_the_cameras_folders_are_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _source(folder).validate()
    assert not caplog.records
    _picture(folder / "images" / "overview.png", 1)
    _source(folder).validate()
    assert "1 images beside the cameras' folders are not used" in caplog.text
    assert "overview.png" in caplog.text


@pytest.mark.parametrize("kind", ["size", "bits"])
def test_depth_of_another_size_or_kind_is_refused(folder: Path, kind: str) -> None:
    wrong = np.ones((10, 10), np.uint16) if kind == "size" else np.ones(SIZE[::-1], np.uint8)
    Image.fromarray(wrong).save(folder / "depth" / "left" / "f1.png")
    with pytest.raises(ReconError, match=r"f1\.png: depth of (10x10 for an image of 40x30|the kind 'L')"):
        _source(folder).validate()


def test_black_images_are_left_out_and_equal_ones_counted(folder: Path) -> None:
    camera = folder / "images" / "right"
    Image.new("RGB", SIZE).save(camera / "f2.png")
    (camera / "f11.png").write_bytes((camera / "f10.png").read_bytes())
    (folder / "images" / "left" / "f11.png").write_bytes((folder / "images" / "left" / "f10.png").read_bytes())
    source = _source(folder, depth=None)
    source.validate()
    assert [[view.camera for view in batch] for batch in source.batches()] == [["left"], *[["left", "right"]] * 2]
    report = source.report()["cameras"]
    assert (report["right"]["lost"], report["right"]["frozen"], report["left"]["frozen"]) == ({"black": 1}, 1, 1)
    with pytest.raises(ReconError, match=r"f2\.png: the frame that bootstraps camera right is black") as caught:
        _source(folder, depth=None, bootstrap_frame=1).validate()
    assert "source.bootstrap_frame" in caught.value.remedy


def test_a_truncated_frame_of_the_stream_is_lost_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _picture(folder / "images" / "left" / "f2.png", 3)
    _truncate(folder / "images" / "left" / "f2.png")
    source = _source(folder)
    source.validate()
    assert [[view.camera for view in batch] for batch in source.batches()] == [["right"], ["left", "right"]]
    assert source.report()["cameras"]["left"]["lost"] == {"damaged": 1}
    assert "f2.png: cannot be decoded" in caplog.text


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("source.devices=[front=0,left=1]", ["front=0", "left=1"]),
        (
            "source.devices=[front=/dev/video0, left=rtsp://host:80/a=b]",
            ["front=/dev/video0", "left=rtsp://host:80/a=b"],
        ),
        ("source.devices=['front=0',left=1]", ["front=0", "left=1"]),
        ("source.devices=[0,1,2]", [0, 1, 2]),
    ],
)
def test_devices_parse_as_typed(typed: str, parsed: list[object]) -> None:
    value = OverridesParser.create().parse_override(quote_devices(typed)).value()
    assert [entry if isinstance(entry, int) else str(getattr(entry, "text", entry)) for entry in value] == parsed  # type: ignore[union-attr]
    assert quote_devices("depth.workers=[a=1]") == "depth.workers=[a=1]"


def test_real_recording(data_dir: Path) -> None:
    root = data_dir / "redkitchen"
    source = Images(
        name="images", path=str(root / "images"), intrinsics=str(root / "intrinsics.npz"),
        poses=str(root / "poses.npz"), depth=str(root / "depth"), max_batches=1,
    )  # fmt: skip
    _run(source)
    assert len(source.cameras()) == 8
    start, later = source.bootstrap()[0], next(iter(source.batches()))[0]
    assert start.T_world_cam is not None
    assert later.T_world_cam is not None
    assert 0 < np.linalg.norm(start.T_world_cam[:3, 3] - later.T_world_cam[:3, 3]) < 0.1  # one pose per frame
    assert start.depth is not None
    assert 0.3 < start.depth[start.depth > 0].min() < start.depth.max() < 10
