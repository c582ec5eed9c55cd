"""Lenses against OpenCV, pixels there and back, and rigs from every kind of file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from recon.errors import ReconError
from recon.geometry.cameras import invert, project, transform
from recon.geometry.distortion import MAX_HALF_ANGLE_DEG, Lens, Undistortion, straighten
from recon.geometry.preprocess import PixelPath, place
from recon.geometry.rig_files import read_rig
from recon.geometry.views import Scale

SIZE = (320, 240)
K = np.array([[230.0, 0, 157], [0, 233, 121], [0, 0, 1]])
LENSES = {
    "4 coefficients": Lens(K, (-0.33, 0.11, 0.002, -0.003)),
    "5 coefficients": Lens(K, (-0.33, 0.05, -0.004, 0.004, 0.07)),
    "5, pincushion": Lens(K, (0.17, -0.23, 0.0014, 0.0004, 0.1)),
    "8 coefficients": Lens(K, (0.3, -0.1, 0.001, 0.002, 0.02, 0.6, 0.05, 0.01)),
    "fisheye": Lens(np.array([[110.0, 0, 157], [0, 110, 121], [0, 0, 1]]), (0.06, -0.02, 0.01, -0.003), True),
}


def grid(size: tuple[int, int] = SIZE, inset: float = 0.0) -> np.ndarray:
    u, v = (np.linspace(inset, side - 1 - inset, 23) for side in size)
    return np.stack(np.meshgrid(u, v), axis=-1)


@pytest.mark.parametrize("name", LENSES)
def test_a_lens_maps_rays_as_opencv_does(name: str) -> None:
    lens = LENSES[name]
    rays = np.random.default_rng(0).uniform([-0.5, -0.4, 1], [0.5, 0.4, 1], (200, 3))
    coefficients, still = np.array(lens.coefficients), np.zeros(3)
    model = cv2.fisheye.projectPoints if lens.fisheye else cv2.projectPoints
    expected = model(rays[:, None], still, still, lens.K, coefficients)[0].reshape(-1, 2)
    np.testing.assert_allclose(lens.pixels(rays[:, :2]), expected, atol=1e-6)
    np.testing.assert_allclose(lens.slopes(expected), rays[:, :2], atol=1e-7)


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize(("target", "mode"), [((224, 168), "crop"), ((168, 168), "crop"), ((168, 168), "pad")])
def test_pixels_come_back_through_undistort_resize_crop_and_pad(name: str, target: tuple[int, int], mode: str) -> None:
    path = PixelPath(straighten(LENSES[name], SIZE), place(SIZE, target, mode))
    network = grid(target)
    np.testing.assert_allclose(path.to_network(path.to_camera(network)), network, atol=1e-6)
    seen = path.to_camera(network)  # pixels of the camera that the network can see
    np.testing.assert_allclose(path.to_camera(path.to_network(seen)), seen, atol=1e-6)
    assert json.loads(json.dumps(path.record()))["placement"]["target"] == list(target)


@pytest.mark.parametrize("name", LENSES)
def test_the_picture_itself_lands_where_the_numbers_say(name: str) -> None:
    """A disc drawn into the camera's image is found in the undistorted image within a hundredth of a pixel."""
    found = straighten(LENSES[name], SIZE)
    v, u = np.mgrid[: SIZE[1], : SIZE[0]].astype(np.float64)
    for centre in ((120.0, 80.0), (200.0, 150.0), (160.0, 118.0)):
        view_grid = np.stack([u, v], axis=-1)
        wide = found.to_view(np.array(centre))
        blob = np.exp(-(((view_grid - wide) ** 2).sum(-1)) / (2 * 6.0**2))  # the disc as the view should show it
        camera = np.exp(-(((found.to_view(view_grid) - wide) ** 2).sum(-1)) / (2 * 6.0**2))  # as the camera sees it
        image = np.repeat(np.rint(255 * np.nan_to_num(camera)).astype(np.uint8)[..., None], 3, axis=2)
        weight = found.image(image)[..., 0].astype(np.float64) ** 2
        middle = np.array([(weight * u).sum(), (weight * v).sum()]) / weight.sum()
        expected = np.array([(blob**2 * u).sum(), (blob**2 * v).sum()]) / (blob**2).sum()
        np.testing.assert_allclose(middle, expected, atol=0.01)


@pytest.mark.parametrize("name", LENSES)
def test_every_pixel_of_the_view_comes_from_inside_the_image(name: str) -> None:
    found = straighten(LENSES[name], SIZE)
    rim = found.to_camera(grid())
    assert ((rim > -0.01) & (rim < np.array(SIZE) - 0.99)).all()
    assert found.image(np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)).min() == 255
    tighter = Undistortion(found.lens, found.K.copy(), SIZE)
    tighter.K[[0, 1], [0, 1]] *= 0.99
    outside = tighter.to_camera(grid())
    slopes = np.abs((grid() - tighter.K[:2, 2]) / np.diag(tighter.K)[:2])
    assert (  # and no wider view would do
        (outside < -0.01).any()
        or (outside > np.array(SIZE) - 0.99).any()
        or slopes.max() > np.tan(np.radians(MAX_HALF_ANGLE_DEG))
    )


def test_depth_is_moved_but_never_mixed_and_tables_are_made_once() -> None:
    found = straighten(LENSES["5 coefficients"], SIZE)
    depth = np.where(np.arange(SIZE[0]) < 160, 1.0, 3.0).astype(np.float32) * np.ones((SIZE[1], 1), np.float32)
    assert set(np.unique(found.depth(depth))) == {1.0, 3.0}
    found.image(np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    tables = found._maps
    found.image(np.zeros((SIZE[1], SIZE[0], 3), np.uint8))
    assert found._maps is tables


def test_lenses_that_cannot_be_straightened_are_refused() -> None:
    with pytest.raises(ReconError, match="3 distortion coefficients"):
        Lens(K, (0.1, 0.2, 0.3))
    with pytest.raises(ReconError, match="not all are finite"):
        Lens(K, (np.nan, 0, 0, 0))
    with pytest.raises(ReconError, match="no usable view"):
        straighten(Lens(np.array([[230.0, 0, 900], [0, 230, 121], [0, 0, 1]]), (0.1, 0, 0, 0)), SIZE)  # centre outside


def test_a_folding_lens_gives_a_view_without_the_fold() -> None:
    lens = Lens(K, (-0.9, 0.0, 0.0, 0.0))  # r(1 - 0.9 r^2) turns back at r = 0.61, inside the image's corners
    found = straighten(lens, SIZE)
    slopes = (grid() - found.K[:2, 2]) / np.diag(found.K)[:2]
    assert np.linalg.norm(slopes, axis=-1).max() < 0.61


# --- rig files -------------------------------------------------------------------------------------------------------


def poses(count: int) -> np.ndarray:
    T = np.tile(np.eye(4), (count, 1, 1))
    T[:, :3, :3] = Rotation.random(count, random_state=1).as_matrix()
    T[:, :3, 3] = np.random.default_rng(1).normal(size=(count, 3))
    return T


NAMES = ["left", "right", "top"]


def npz(path: Path, **changes: Any) -> Path:
    known: dict[str, Any] = {
        "camera_names": NAMES, "K": np.stack([K] * 3), "width": 320, "height": 240, "unit": "m",
        "distortion": np.tile([0.1, -0.05, 0, 0, 0.01], (3, 1)), "T_world_cam": poses(3),
    }  # fmt: skip
    np.savez(path, **{key: value for key, value in (known | changes).items() if value is not None})
    return path


def test_our_own_npz(tmp_path: Path) -> None:
    rig = read_rig(npz(tmp_path / "rig.npz"))
    assert rig.scale == Scale("m", "known poses")
    entry = rig.fixed("right")
    assert entry is not None
    assert entry.lens is not None
    assert entry.T_world_cam is not None
    np.testing.assert_array_equal(entry.T_world_cam, poses(3)[1])
    assert (entry.lens.size, len(entry.lens.coefficients)) == ((320, 240), 5)
    other = read_rig(npz(tmp_path / "other.npz", T_world_cam=None, T_cam_world=invert(poses(3)), unit=None))
    np.testing.assert_allclose(other.fixed("top").T_world_cam, poses(3)[2], atol=1e-12)  # type: ignore[union-attr]
    assert other.scale == Scale()
    assert read_rig(tmp_path / "other.npz", "m").scale.unit == "m"


def test_a_baseline_gives_poses_their_metre(tmp_path: Path) -> None:
    T = poses(3)
    apart = float(np.linalg.norm(T[0, :3, 3] - T[2, :3, 3]))
    line = {"baseline_cameras": ["left", "top"], "baseline_m": 0.42}
    rig = read_rig(npz(tmp_path / "rig.npz", unit=None, **line))
    assert rig.scale == Scale("m", "known baseline")
    centres = [rig.fixed(name).T_world_cam[:3, 3] for name in NAMES]  # type: ignore[union-attr,index]
    assert np.linalg.norm(centres[0] - centres[2]) == pytest.approx(0.42)
    np.testing.assert_allclose(centres[1], T[1, :3, 3] * 0.42 / apart)
    with pytest.raises(ReconError, match=r"m apart by their poses and 0\.42 m by baseline"):
        read_rig(npz(tmp_path / "rig.npz", unit="m", **line))
    without = read_rig(npz(tmp_path / "rig.npz", unit=None, T_world_cam=None, **line))
    assert without.scale == Scale()  # nothing to scale yet; whoever estimates poses may use it
    assert without.baseline is not None
    assert without.baseline.metres == 0.42


CALISCOPE = """
[cameras.0]
cam_id = 0
size = [320, 240]
matrix = [[230.0, 0.0, 157.0], [0.0, 233.0, 121.0], [0.0, 0.0, 1.0]]
distortions = [-0.3, 0.05, -0.004, 0.004, 0.07]
translation = [0.1, 0.2, 0.3]
rotation = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
[cameras.7]
size = [320, 240]
matrix = [[230.0, 0.0, 157.0], [0.0, 233.0, 121.0], [0.0, 0.0, 1.0]]
translation = [0.0, 0.0, 1.0]
rotation = [0.0, 0.0, 1.5707963267948966]
[cameras.9]
ignore = true
matrix = [[1.0]]
"""


def test_toml_of_caliscope(tmp_path: Path) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text(CALISCOPE)
    rig = read_rig(path)
    assert (rig.kind, rig.scale.unit, list(rig.entries)) == ("TOML", "m", ["0", "7"])
    entry, turned = rig.fixed("cam_0"), rig.fixed("7")  # files number what folders name
    assert entry is not None
    assert turned is not None
    assert entry.T_world_cam is not None
    assert turned.T_world_cam is not None
    np.testing.assert_allclose(entry.T_world_cam[:3, 3], [-0.2, 0.1, -0.3])  # the file is world to camera
    np.testing.assert_allclose(turned.T_world_cam[:3, :3], entry.T_world_cam[:3, :3], atol=1e-12)  # Rodrigues
    flat = tmp_path / "anipose.toml"
    flat.write_text(CALISCOPE.replace("cameras.", "cam_"))
    assert read_rig(flat).scale == Scale()  # Anipose's unit is whatever its board was given in


def write_transforms(folder: Path, **changes: Any) -> Path:
    flip = np.diag([1.0, -1, -1, 1])
    frames = [
        {"file_path": f"images/frame_{i:05d}.png", "transform_matrix": (T @ flip).tolist()}
        for i, T in enumerate(poses(3))
    ]
    known = {"camera_model": "OPENCV", "fl_x": 230.0, "fl_y": 233.0, "cx": 157.5, "cy": 121.5, "w": 320, "h": 240,
             "k1": -0.3, "k2": 0.05, "p1": 0.001, "p2": 0.002, "frames": frames}  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(known | changes))
    return folder / "transforms.json"


def test_transforms_of_nerfstudio(tmp_path: Path) -> None:
    rig = read_rig(write_transforms(tmp_path))
    entry = rig.fixed("frame_00001")
    assert entry is not None
    assert entry.lens is not None
    np.testing.assert_allclose(entry.T_world_cam, poses(3)[1], atol=1e-12)
    np.testing.assert_allclose(entry.lens.K, K)  # half a pixel less: integer centres
    assert entry.lens.coefficients == (-0.3, 0.05, 0.001, 0.002, 0.0)
    assert rig.scale == Scale()
    assert rig.fixed("images") is None  # one camera that moves
    assert set(rig.images("images")) == {f"frame_{i:05d}" for i in range(3)}
    assert read_rig(tmp_path).kind == "nerfstudio"  # the folder will do
    fisheye = read_rig(write_transforms(tmp_path, camera_model="OPENCV_FISHEYE", k3=0.1, k4=0.2)).fixed("frame_00000")
    assert fisheye is not None
    assert fisheye.lens is not None
    assert (fisheye.lens.fisheye, fisheye.lens.coefficients) == (True, (-0.3, 0.05, 0.1, 0.2))


POINT = np.array([0.3, -0.2, 4.0])


def colmap_model(folder: Path, suffix: str) -> np.ndarray:
    """Two cameras and three images, written by COLMAP's own library; returns T_world_cam of the images."""
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP's own writer")
    model, T = pycolmap.Reconstruction(), poses(3)
    optics = {
        1: ("OPENCV", [230, 233, 157.5, 121.5, -0.3, 0.05, 0.001, 0.002]),
        2: ("SIMPLE_RADIAL", [200, 160, 120, 0.1]),
    }
    for number, (name, params) in optics.items():
        camera = pycolmap.Camera(model=name, width=320, height=240, params=params, camera_id=number)
        model.add_camera_with_trivial_rig(camera)
    for number, name in enumerate(("left/a b.png", "left/0002.png", "right/0001.png")):
        image = pycolmap.Image(name=name, camera_id=1 if name.startswith("left") else 2, image_id=number + 1)
        pose = pycolmap.Rigid3d(invert(T[number])[:3])
        model.add_image_with_trivial_frame(image, pose)
    folder.mkdir(parents=True)
    (model.write_text if suffix == "txt" else model.write_binary)(str(folder))
    return T


@pytest.mark.parametrize("suffix", ["txt", "bin"])
def test_models_of_colmap(tmp_path: Path, suffix: str) -> None:
    T = colmap_model(tmp_path / "sparse" / "0", suffix)
    for path in (tmp_path, tmp_path / "sparse" / "0" / f"cameras.{suffix}"):
        rig = read_rig(path)
        assert (rig.kind, sorted(rig.entries)) == ("COLMAP", ["left/0002", "left/a b", "right/0001"])
        np.testing.assert_allclose(rig.entries["left/0002"].T_world_cam, T[1], atol=1e-9)
        left, right = rig.lens("left"), rig.lens("right")
        assert left is not None
        assert right is not None
        np.testing.assert_allclose(left.K, K)
        assert left.coefficients == (-0.3, 0.05, 0.001, 0.002)
        assert right.coefficients == (0.1, 0, 0, 0)
        assert rig.fixed("left") is None  # it moved
        fixed = rig.fixed("right")
        assert fixed is not None
        np.testing.assert_allclose(fixed.T_world_cam, T[2], atol=1e-9)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def bad_colmap(folder: Path, what: str) -> Path:
    colmap_model(folder / "m", "txt" if what in ("model", "quaternion", "camera") else "bin")
    if what in ("cameras", "images"):
        cut(folder / "m" / f"{what}.bin", 0.6)
    if what == "count":
        data = (folder / "m" / "images.bin").read_bytes()
        (folder / "m" / "images.bin").write_bytes(struct.pack("<Q", 10**6) + data[8:])
    if what == "missing":
        (folder / "m" / "images.bin").unlink()
    if what == "model":
        text = (folder / "m" / "cameras.txt").read_text()
        (folder / "m" / "cameras.txt").write_text(text.replace("SIMPLE_RADIAL", "FOV"))
    if what == "camera":
        text = (folder / "m" / "cameras.txt").read_text().splitlines()
        (folder / "m" / "cameras.txt").write_text("\n".join(line for line in text if not line.startswith("2")))
    if what == "quaternion":
        lines = (folder / "m" / "images.txt").read_text().splitlines()
        row = next(i for i, line in enumerate(lines) if line.endswith("0002.png"))
        words = lines[row].split()
        lines[row] = " ".join([words[0], "0", "0", "0", "0", *words[5:]])
        (folder / "m" / "images.txt").write_text("\n".join(lines))
    return folder / "m"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cameras", "damaged or no COLMAP model"), ("images", "damaged or no COLMAP model"), ("count", "damaged"),
        ("missing", r"images\.bin: no such file"), ("model", "FOV has no equal"), ("camera", "camera 2 is not in"),
        ("quaternion", "of length 0"),
    ],
)  # fmt: skip
def test_damaged_models_of_colmap_are_refused(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ReconError, match=message) as caught:
        read_rig(bad_colmap(tmp_path, what))
    assert caught.value.remedy


def text(name: str, content: str | bytes) -> Any:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return write


BAD: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: f / "none.toml", r"none\.toml: no such file"),
    "empty folder": (lambda f: f, "a folder without cameras.txt"),
    "binary rubbish": (text("rig.bin", bytes(range(255))), "no rig file that is known"),
    "prose": (text("rig.txt", "hello world"), "no rig file that is known"),
    "no table": (text("rig.toml", "a = 1"), "no table with a matrix"),
    "no transforms": (text("t.json", '{"frames": [{"x": 1}]}'), r"is no transforms\.json"),
    "no camera_names": (lambda f: npz(f / "r.npz", camera_names=None), "no camera_names"),
    "K count": (lambda f: npz(f / "r.npz", K=np.stack([K] * 2)), r"K has the shape \[2, 3, 3\]"),
    "name twice": (lambda f: npz(f / "r.npz", camera_names=["a", "a", "b"]), "a name stands twice"),
    "coefficients": (lambda f: npz(f / "r.npz", distortion=np.zeros((3, 3))), "camera left: 3 distortion coefficients"),
    "unit": (lambda f: npz(f / "r.npz", unit="mm"), "unit 'mm'"),
    "pickled": (lambda f: npz(f / "r.npz", K=np.array([{}], dtype=object)), "pickled Python objects"),
    "mirrored pose": (
        lambda f: npz(f / "r.npz", T_world_cam=poses(3) * np.array([-1, 1, 1, 1])[:, None]),
        "camera left: .*no rotation",
    ),
    "baseline camera": (lambda f: npz(f / "r.npz", baseline_cameras=["left", "x"], baseline_m=1.0), "baseline between"),
    "baseline 0": (lambda f: npz(f / "r.npz", baseline_cameras=["left", "top"], baseline_m=0.0), "of 0.0 m"),
    "rotated": (
        text("c.toml", CALISCOPE.replace("cam_id = 0", "rotation_count = 1")),
        "camera 0: rotation_count=1",
    ),
    "perspective k4": (lambda f: write_transforms(f, k4=0.1), "k4=0.1 of a lens that is no fisheye"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rig_files_are_refused_with_a_remedy(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ReconError, match=message) as caught:
        read_rig(make(tmp_path))
    assert caught.value.remedy


def test_the_office_rig_reprojects_its_board(data_dir: Path) -> None:
    """Triangulated corners of the recording, through our rig and undistortion, against its detected corners."""
    folder = data_dir / "office4"
    rig = read_rig(folder / "camera_array.toml")
    seen = np.genfromtxt(folder / "xy_CHARUCO.csv", delimiter=",", skip_header=1)
    known = np.genfromtxt(folder / "xyz_CHARUCO.csv", delimiter=",", skip_header=1, usecols=range(6))
    points = {(int(r[0]), int(r[2])): r[3:6] for r in known}
    for number in range(4):
        entry = rig.fixed(f"cam_{number}")
        assert entry is not None
        assert entry.lens is not None
        assert entry.T_world_cam is not None
        rows = [r for r in seen if int(r[1]) == number and (int(r[0]), int(r[3])) in points]
        world = np.array([points[int(r[0]), int(r[3])] for r in rows])
        straight = straighten(entry.lens, (1280, 720))
        expected, z = project(transform(invert(entry.T_world_cam), world), straight.K)
        found = straight.to_view(np.array([r[4:6] for r in rows]))
        errors = np.linalg.norm(found - expected, axis=1)
        assert (z > 0).all()
        assert np.median(errors) < 2.0  # 0.9 to 1.5 px in the camera's own pixels
        bare = np.linalg.norm(
            np.array([r[4:6] for r in rows]) - project(transform(invert(entry.T_world_cam), world), entry.lens.K)[0],
            axis=1,
        )
        assert np.median(bare) > np.median(errors)  # undistortion is not a matter of taste
