"""Whole runs from recordings with faults: they end well, and metrics.json says what was lost and what a unit means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_files import even, numbered, spoil, write_video

from recon.config import Config, option
from recon.geometry.preprocess import PixelPath
from recon.pipeline import Run, finish, run
from recon.sources import Source
from recon.sources.state import totals
from recon.sources.videos import Videos
from recon.sources.webcams import Webcams
from recon.store import Store


def metrics_of(source: Source, folder: Path) -> dict[str, Any]:
    """metrics.json of the reconstruct stage with the smallest networks in plain torch."""
    config = Config(
        model=replace(option("model", "vggt-twin"), height=42, width=56),
        depth=option("depth", "da2-twin"),
        quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"),
        engine=option("engine", "torch"),
        source=source,
        fusion=replace(option("fusion", "surfel"), max_depth=1e6),
        tracking=option("tracking", "none"),
        stages=["reconstruct"],
        output=str(folder / "outputs"),
    )
    state = Run(config, folder / "run", Store(config))
    state.folder.mkdir()
    run(state)
    found: dict[str, Any] = json.loads(finish(state).read_text())
    return found


def rig(folder: Path) -> str:
    T = np.tile(np.eye(4), (2, 1, 1))
    T[1, :3, 3] = [0.5, 0, 0.1]
    K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
    np.savez(
        folder / "rig.npz", camera_names=["left", "right"], K=[K, K], distortion=[[-0.2, 0.02, 0, 0]] * 2,
        width=160, height=120, T_world_cam=T, unit="m",
    )  # fmt: skip
    return str(folder / "rig.npz")


def assert_pixels_come_back(record: dict[str, Any]) -> None:
    """From what metrics.json says alone, as OpenCV would do it, and as our own reader of the record does it."""
    corners = np.array([[[20.0, 15.0]], [[139.0, 15.0]], [[80.0, 60.0]], [[25.0, 104.0]]])
    assert record.keys() == {"view", "model", "depth"}
    for one in record.values():
        bent, placed = one["undistortion"], one["placement"]
        K, K_view = np.array(bent["K_camera"]), np.array(bent["K_view"])
        view = cv2.undistortPoints(corners, K, np.array(bent["coefficients"]), R=None, P=K_view)[:, 0]
        factor = np.array(placed["resized"]) / placed["source"]
        by_opencv = (view + 0.5) * factor - 0.5 + placed["corner"]
        path = PixelPath.read(one)
        np.testing.assert_allclose(path.to_network(corners[:, 0]), by_opencv, atol=0.01)
        np.testing.assert_allclose(path.to_camera(by_opencv), corners[:, 0], atol=0.01)
    assert record["model"]["placement"]["target"] == [56, 42]
    assert record["depth"]["placement"]["target"] == [154, 112]


def test_a_run_from_damaged_videos_says_what_it_lost(tmp_path: Path) -> None:
    left = write_video(tmp_path / "v" / "left.mp4", even(12), gop=4)
    write_video(tmp_path / "v" / "right.mkv", even(8, start=0.01))
    spoil(left, 5)
    source = Videos(name="videos", path=str(tmp_path / "v"), rig=rig(tmp_path))
    metrics = metrics_of(source, tmp_path)
    assert metrics["scale"] == {"unit": "m", "source": "known poses"}
    assert_pixels_come_back(metrics["pixels"]["left"])
    sizes = {"left": [160, 120], "right": [160, 120]}
    asked = {"image_size": {"requested": [], "effective": [160, 120]}}
    assert metrics["from_source"] == {"image_sizes": sizes, "depth": asked}
    assert metrics["source"]["cameras"]["left"]["lost"] == {"damaged": 3}  # frames 5, 6 and 7
    assert "before the last camera" in metrics["source"]["cameras"]["right"]["events"][0]["what"]
    assert metrics["source"]["skew_ms"]["max"] == 10.0
    assert metrics["source"]["batches"] == 11
    sums = {
        "delivered": 15.0,
        "lost": 3.0,
        "dropped": 0.0,
        "skew_ms_p50": 10.0,
        "skew_ms_p95": 10.0,
        "skew_ms_max": 10.0,
    }
    assert totals(metrics["source"]) == sums
    seen = [(row["camera"], row["frame"]) for row in metrics["frames"]]
    assert sorted(seen) == [*(("left", n) for n in (1, 2, 3, 4, 8, 9, 10, 11)), *(("right", n) for n in range(1, 8))]


def test_a_run_from_cameras_with_black_pictures_goes_on(tmp_path: Path) -> None:
    black = [numbered(n) if not 2 <= n <= 5 else numbered(0) * 0 for n in range(100)]
    write_video(tmp_path / "left.mp4", even(100, 5))  # 20 s: it must outlast the bootstrap on a busy machine
    write_video(tmp_path / "right.mkv", even(100, 5), codec="ffv1", images=black)
    devices = [f"left={tmp_path / 'left.mp4'}", f"right={tmp_path / 'right.mkv'}"]
    source = Webcams(name="webcams", devices=devices, rig=rig(tmp_path), start_s=0.0, stall_s=5.0, max_batches=12)
    metrics = metrics_of(source, tmp_path)
    assert metrics["scale"]["unit"] == "m"
    left, right = (metrics["source"]["cameras"][name] for name in ("left", "right"))
    assert right["lost"]["black"] == 4
    assert [event["what"] for event in right["events"]][-1] == "is back (was black)"
    assert {row["camera"] for row in metrics["frames"]} == {"left", "right"}
    assert (left["lost"], left["events"]) == ({}, [])
    assert metrics["source"]["batches"] == 12
    assert left["delivered"] + right["delivered"] == 24 - metrics["source"]["incomplete_moments"]
    assert left["delivered"] >= right["delivered"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=webcams", "source.devices=[front=97]"], "camera front: 97 cannot be opened"),
        (["source=videos", "source.path=v"], "left.mp4: no video that can be read"),
        (["source=videos", "source.path=v", "source.views=[right]", "source.rig=v/right.mp4"], "no rig file"),
        (
            ["source=videos", "source.path=v", "source.views=[right]", "source.timestamps=t.csv"],
            "t.csv: cannot be read",
        ),
    ],
)
def test_bad_sources_end_the_command_with_one_message(tmp_path: Path, words: list[str], message: str) -> None:
    write_video(tmp_path / "v" / "right.mp4", even(3))
    (tmp_path / "v" / "left.mp4").write_bytes((tmp_path / "v" / "right.mp4").read_bytes()[:4000])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "recon", *words, "model=vggt-twin", "depth=da2-twin", "tracking=none"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert message in text
    assert "remedy:" in text
    assert not list(tmp_path.rglob("*.onnx"))  # before any work
