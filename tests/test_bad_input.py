"""Bad input through the real command: exit code 1, one message with value, rule and remedy, nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recording import write_recording

Spoil = Callable[[Path], None]


def change(name: str, array: str, spoil: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    def apply(folder: Path) -> None:
        with np.load(folder / name) as data:
            arrays = dict(data)
        arrays[array] = spoil(arrays[array].astype(np.float64))
        np.savez(folder / name, **arrays)

    return apply


def at(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return apply


def empty_folder(folder: Path) -> None:
    for path in (folder / "images").rglob("*.png"):
        path.unlink()
    for path in (folder / "images").iterdir():
        path.rmdir()


def camera_without_frames(folder: Path) -> None:
    for path in (folder / "images" / "cam1").iterdir():
        path.unlink()


def other_size(folder: Path) -> None:
    Image.new("RGB", (64, 48)).save(folder / "images" / "cam1" / "000001.png")


def truncated_jpeg(folder: Path) -> None:
    for path in sorted((folder / "images" / "cam1").iterdir()):
        image = Image.open(path).convert("RGB")
        path.unlink()
        image.save(path.with_suffix(".jpg"), quality=95)
    (folder / "depth").rename(folder / "unused")  # named after the PNG frames; the truncated image comes first
    broken = folder / "images" / "cam1" / "000000.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])


def pickled(folder: Path) -> None:
    np.savez(folder / "intrinsics.npz", K=np.array([{"fx": 1.0}], dtype=object))


def a_single_array(folder: Path) -> None:
    with (folder / "intrinsics.npz").open("wb") as file:  # numpy.save in place of numpy.savez
        np.save(file, np.eye(3))


def one_camera_less(folder: Path) -> None:
    with np.load(folder / "poses.npz") as data:
        np.savez(folder / "poses.npz", T_world_cam=data["T_world_cam"][:2])


CASES: list[tuple[str, Spoil, list[str]]] = [
    ("missing path", lambda folder: (folder / "images").rename(folder / "moved"), ["images"]),
    ("empty folder", empty_folder, ["images"]),
    ("camera without frames", camera_without_frames, ["cam1"]),
    ("sizes differ", other_size, ["cam1", "64x48", "96x72"]),
    ("truncated JPEG", truncated_jpeg, ["000000.jpg"]),
    ("NaN intrinsics", change("intrinsics.npz", "K", at((1, 0, 0), np.nan)), ["intrinsics.npz", "cam1"]),
    ("singular intrinsics", change("intrinsics.npz", "K", at((0, 1, 1), 0.0)), ["intrinsics.npz", "cam0"]),
    ("no rotation", change("poses.npz", "T_world_cam", at((2, 1, 0, 0), 3.0)), ["poses.npz", "cam2"]),
    ("pose count", one_camera_less, ["poses.npz", "2"]),
    ("a single array", a_single_array, ["intrinsics.npz", "numpy.savez"]),
    ("pickled objects", pickled, ["intrinsics.npz", "pickled"]),
]


@pytest.mark.parametrize(("spoil", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_recordings_end_with_one_message(tmp_path: Path, spoil: Spoil, words: list[str]) -> None:
    write_recording(tmp_path)
    spoil(tmp_path)
    known = [f"source.{name}={name}.npz" for name in ("intrinsics", "poses")]
    depth = ["source.depth=depth"] if (tmp_path / "depth").is_dir() else []
    command = [sys.executable, "-m", "recon", "source=images", "source.path=images", *depth, *known, "tracking=none"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert "remedy:" in text
    for word in words:
        assert word in text, text
    assert not list(tmp_path.rglob("*.ply"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_tracking_none_works_without_mlflow(tmp_path: Path) -> None:
    recorded = "'model=recorded', 'depth=recorded', 'source.width=96', 'source.height=72', 'source.steps=1'"
    small = f"['recon', 'tracking=none', {recorded}]"
    script = f"import sys; sys.modules['mlflow'] = None; sys.argv = {small}; from recon.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "map_updated.ply" in {path.name for path in tmp_path.rglob("*.ply")}


def test_missing_mlflow_is_said_before_any_work(tmp_path: Path) -> None:
    script = "import sys; sys.modules['mlflow'] = None; sys.argv = ['recon']; from recon.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tracking=none" in done.stderr
    assert "Traceback" not in done.stderr
