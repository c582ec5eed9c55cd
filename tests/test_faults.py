"""Faults through the real command: the run goes on where it can, says what it lost, and leaves no half file."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import even, numbered, spoil, write_video

from recon.artifact import read_manifest, verify
from recon.config import Config, option
from recon.depth import Depth
from recon.depth.recorded import Recorded
from recon.geometry.views import DepthImage, View
from recon.pipeline import Run, finish, run
from recon.sources import Source
from recon.sources.synthetic import Synthetic
from recon.store import Store

SMALL = [
    "model=vggt-twin", "model.width=56", "model.height=42", "depth=da2-twin", "depth.input_size=56", "engine=torch",
    "fusion=surfel", "fusion.max_depth=1e6", "tracking=none",
]  # fmt: skip
RECORDED = [
    "model=recorded", "depth=recorded", "source.width=96", "source.height=72", "tracking=none", "fusion.voxel=0.1",
    "align.moving_frames=1",
]  # fmt: skip


def command(folder: Path, *words: str, file_limit: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m recon` in `folder`. file_limit: bytes that a file may have, as `ulimit -f` sets it; 0 = any."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def limit() -> None:
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        [sys.executable, "-m", "recon", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit,
    )  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The same without waiting for its end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "recon", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_frames(folder: Path, process: subprocess.Popen[str], limit_s: float = 90.0) -> None:
    """Until rows of frames reach the disk."""
    end = time.monotonic() + limit_s
    while not any(path.stat().st_size for path in folder.glob("outputs/runs/*/*/frames.jsonl.part")):
        assert time.monotonic() < end, "the stream never started"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def metrics_of(folder: Path) -> dict[str, Any]:
    """metrics.json of the only run, after its manifest has been checked file by file."""
    (run,) = folder.glob("outputs/runs/*/*")
    verify(run, read_manifest(run / "manifest"))
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


def test_everything_that_can_be_wrong_with_videos_at_once(tmp_path: Path) -> None:
    """left: a corrupted packet. right: black, then frozen. top: ends early, variable rate, another resolution.

    Their times come from a CSV with gaps, disorder, a repeated row and one for a frame that does not exist.
    """
    spoil(write_video(tmp_path / "v" / "left.mp4", even(24), gop=6), 8)
    pictures = [numbered(number, 1) for number in range(24)]
    pictures[5:8] = [np.zeros_like(pictures[0])] * 3
    pictures[10:18] = [pictures[10]] * 8
    write_video(tmp_path / "v" / "right.mkv", even(24), codec="ffv1", images=pictures)
    uneven = [0, 0.1, 0.2, 0.33, 0.41, 0.5, 0.62, 0.8, 0.83, 0.91, 1.02, 1.1]
    write_video(tmp_path / "v" / "top.mkv", uneven, shade=2, size=(128, 160))
    rows = [(camera, k, 0.1 * k + late) for camera, late in (("left", 0), ("right", 0.008)) for k in range(24)]
    rows = [row for row in rows if row[:2] not in (("right", 3), ("right", 20), ("left", 12))]
    rows += [("top", k, time_s + 0.004) for k, time_s in enumerate(uneven)]
    np.random.default_rng(0).shuffle(rows)
    rows += [rows[0], ("left", 99, 9.9)]
    lines = ["camera,frame,time_s", *(f"{camera},{frame},{time_s}" for camera, frame, time_s in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    done = command(
        tmp_path, "source=videos", "source.path=v", "source.timestamps=t.csv", "stages=[reconstruct,report]", *SMALL
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "Traceback" not in text
    metrics = metrics_of(tmp_path)
    left, right, top = (metrics["source"]["cameras"][camera] for camera in ("left", "right", "top"))
    assert left["lost"] == {"damaged": 4}  # 8 to 11, to the next key frame
    assert (left["frames_without_time"], left["rows_without_frame"]) == (1, 1)
    assert (right["lost"], right["frozen"], right["frames_without_time"]) == ({"black": 3}, 7, 2)
    assert top["events"] == [{"what": "ends 1.204 s before the last camera", "at": 1.104}]
    assert (top["delivered"], top["period_ms_max"]) == (11, 180.0)
    assert left["delivered"] + right["delivered"] + top["delivered"] == metrics["frames_seen"] == 47
    assert {row["camera"] for row in metrics["frames"]} == {"left", "right", "top"}
    assert metrics["source"]["skew_ms"]["max"] <= 50
    assert metrics["from_source"]["image_sizes"]["top"] == [128, 160]
    (page,) = tmp_path.glob("outputs/runs/*/*/report.html")
    assert "Unit: arbitrary: no scale source was given." in page.read_text()
    assert "own: 3 of 3 views have no pose." in page.read_text()
    for words in (
        "left: first frame lost: damaged",
        "right: first frame lost: black",
        "right: frozen",
        "top: ends 1.2",
    ):
        assert words in text


@dataclass
class FillsUp(Synthetic):
    """Files may have only so many bytes from the seventh step to the last: a disk that is full, then freed."""

    bytes: int = 0

    def batches(self) -> Iterator[list[View]]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            for step, views in enumerate(super().batches()):
                if step == 6:  # after numba has stored what it compiles for the first frames
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, before[1]))
                yield views
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def reconstructed(folder: Path, source: Source, depth: Depth, **changes: Any) -> dict[str, Any]:
    """metrics.json of the reconstruct stage alone, with poses and bootstrap depth of the source."""
    config = Config(
        model=option("model", "recorded"),
        depth=depth,
        quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"),
        engine=option("engine", "torch"),
        source=source,
        fusion=replace(option("fusion", "surfel"), voxel=0.1),
        tracking=option("tracking", "none"),
        stages=["reconstruct"],
        output=str(folder / "outputs"),
    )
    place = folder / "outputs" / "runs" / "day" / "one"
    place.mkdir(parents=True)
    state = Run(replace(config, **changes), place, Store(replace(config, **changes)))
    run(state)
    finish(state)
    return metrics_of(folder)


def test_a_disk_that_is_full_while_streaming_costs_rows_and_images_but_not_the_map(tmp_path: Path) -> None:
    known = replace(option("source", "synthetic"), width=96, height=72, steps=20, moving=0).settings()
    metrics = reconstructed(
        tmp_path, FillsUp(**known, bytes=5000), option("depth", "recorded"), save_per_frame_depth=True
    )
    assert metrics["files_lost"].keys() == {"frames.jsonl", "depth of frames"}
    assert "File too large after" in metrics["files_lost"]["frames.jsonl"]
    assert (metrics["frames_file"], metrics["frames_seen"]) == (None, 80)
    (folder,) = tmp_path.glob("outputs/runs/*/*")
    assert 0 < len(list(folder.glob("depth_metric/*.npz"))) < metrics["frames_fused"]
    assert {"map_updated.ply", "calibration.json", "keyframes"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.name.startswith((".", "frames.jsonl"))]


def test_a_disk_too_full_for_the_map_ends_the_run_with_one_message(tmp_path: Path) -> None:
    done = command(tmp_path, *RECORDED, "source.steps=4", "stages=[reconstruct,report]", file_limit=60_000)
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert "remedy: raise `ulimit -f`" in text
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not {name for name in left if name.endswith((".ply", ".part", ".rrd", ".tmp"))}
    assert not left & {"metrics.json", "manifest.json", "calibration.json"}


@dataclass
class FailsOnce(Recorded):
    """Recorded depth whose worker fails on one frame."""

    def predict(self, view: View, session: object) -> DepthImage:
        if (view.camera, view.frame) == ("cam1", 2):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().predict(view, None)


def test_a_depth_worker_that_fails_costs_its_frame_and_is_reported(tmp_path: Path) -> None:
    source = replace(option("source", "synthetic"), width=96, height=72, steps=3, moving=0)
    metrics = reconstructed(tmp_path, source, FailsOnce(**option("depth", "recorded").settings()))
    reason = "no depth: RuntimeError: CUDA error: device-side assert triggered"
    assert metrics["frames_rejected"] == {reason: 1}
    assert (metrics["frames_seen"], metrics["frames_fused"], metrics["stream"]["depth_failures"]) == (12, 11, 1)
    (row,) = [row for row in metrics["frames"] if not row["accepted"]]
    assert (row["camera"], row["frame"], row["reason"]) == ("cam1", 2, reason)
    assert metrics["files_lost"] == {}


@pytest.mark.parametrize("stages", ["[depth]", "[reconstruct,handover]"])
def test_a_full_disk_in_other_stages_leaves_nothing_whole(tmp_path: Path, stages: str) -> None:
    """Videos outgrow the limit while they are written; of the hand-over, the model does."""
    limit = 30_000 if stages == "[depth]" else 150_000
    done = command(tmp_path, *RECORDED, "source.steps=25", f"stages={stages}", file_limit=limit)
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    assert "remedy:" in text
    left = {path.name for path in tmp_path.rglob("*")}
    assert not {name for name in left if name.endswith((".mp4", ".tmp", ".part", ".bin"))}
    assert not left & {"metrics.json", "manifest.json", "handover", "handover.json"}


def test_live_cameras_drop_what_comes_while_the_map_is_busy_until_somebody_stops_them(tmp_path: Path) -> None:
    """Two recordings played at 60 Hz, which no network here keeps up with, and Ctrl-C."""
    for name, shade in (("front", 0), ("left", 1)):
        write_video(tmp_path / f"{name}.mp4", even(1800, 60), shade=shade)
    words = [
        "source=webcams",
        "source.devices=[front=front.mp4,left=left.mp4]",
        "depth=da-mini",
        *SMALL[:3],
        *SMALL[5:],
    ]
    process = start(tmp_path, *words, "stages=[reconstruct,report]")
    wait_for_frames(tmp_path, process)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    metrics = metrics_of(tmp_path)
    assert metrics["stream"]["stopped_by"] == "SIGINT"
    seen = {name: [row["frame"] for row in metrics["frames"] if row["camera"] == name] for name in ("front", "left")}
    for name, frames in seen.items():
        row = metrics["source"]["cameras"][name]
        assert row["dropped"] > 0
        assert row["delivered"] + row["dropped"] <= row["captured"] < 1800
        assert all(later > earlier for earlier, later in pairwise(frames))
        assert frames[-1] - frames[0] + 1 > len(frames)  # the newest won
    assert metrics["source"]["skew_ms"]["max"] <= 50


KEEPER = """
import os, signal, sys, threading, time

def frames(innermost):
    while innermost is not None:
        yield innermost
        innermost = innermost.f_back

def frame_of(name):
    main, found = threading.main_thread().ident, None
    while found is None:
        time.sleep(0.001)
        found = next((one for one in frames(sys._current_frames().get(main)) if one.f_code.co_name == name), None)
    return found

def watch():
    kept = frame_of("_stream")
    if os.environ["WHAT"] == "interrupted":
        for restored in (False, True):  # the first ends the stream, which then listens no more; the second breaks off
            while (signal.getsignal(signal.SIGINT) is signal.default_int_handler) is not restored:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)  # while it runs, what it holds is never freed

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
threading.Thread(target=watch, daemon=True).start()
"""


@pytest.mark.parametrize(("what", "code"), [("finished", 0), ("interrupted", 130)])
def test_the_exit_status_stands_where_somebody_holds_the_frames_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int
) -> None:
    """As a debugger or a profiler does. Open3D would end the process with 1 while the map's tensors are alive."""
    (tmp_path / "sitecustomize.py").write_text(KEEPER)
    monkeypatch.setenv("WHAT", what)
    words = ["source.steps=3" if what == "finished" else "source.steps=300", "stages=[reconstruct]"]
    paths = f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-m", "recon", *RECORDED, *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert ("to break off" in done.stdout) == (what == "interrupted")
