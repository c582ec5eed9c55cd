"""Faults through the real command: the run goes on where it can, says what it lost, and leaves no half file."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from video_files import even, numbered, spoil, write_video

from recon.artifact import read_manifest, verify
from recon.config import Config, option
from recon.geometry.views import View
from recon.options import HandoverOptions
from recon.pipeline import Run, finish, run
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


def test_a_disk_that_is_full_while_streaming_costs_rows_and_images_but_not_the_map(tmp_path: Path) -> None:
    known = replace(option("source", "synthetic"), width=96, height=72, steps=20, moving=0).settings()
    config = Config(
        model=option("model", "recorded"),
        depth=option("depth", "recorded"),
        quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"),
        engine=option("engine", "torch"),
        source=FillsUp(**known, bytes=5000),
        fusion=replace(option("fusion", "surfel"), voxel=0.1),
        tracking=option("tracking", "none"),
        handover=HandoverOptions(keyframe_shift=0.0),
        stages=["reconstruct"],
        save_per_frame_depth=True,
        output=str(tmp_path / "outputs"),
    )
    folder = tmp_path / "outputs" / "runs" / "day" / "one"
    folder.mkdir(parents=True)
    state = Run(config, folder, Store(config))
    run(state)
    finish(state)
    metrics = metrics_of(tmp_path)
    assert metrics["files_lost"].keys() == {"frames.jsonl", "depth of frames"}
    assert "File too large after" in metrics["files_lost"]["frames.jsonl"]
    assert (metrics["frames_file"], metrics["frames_seen"]) == (None, 80)
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
