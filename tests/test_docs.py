"""Every command that docs/ shows for sources, live runs, hand-over and viewer runs, in its small form; and figures."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_files import numbered, write_video

ROOT = Path(__file__).parent.parent
PAGES = ("sources.md", "live.md", "handover.md", "viewer.md")
CAMERAS = ("cam_0", "cam_1", "cam_2")
NETWORKS = ["model=vggt-twin", "model.width=56", "model.height=42", "depth=da2-twin", "depth.input_size=56",
            "engine=torch", "fusion=surfel", "fusion.max_depth=1e6"]  # fmt: skip
SCENE = ["source.width=96", "source.height=72", "source.steps=2"]
SMALL = [*SCENE, "model=recorded", "depth=recorded"]
RIG = """
[cameras.{number}]
size = [160, 120]
matrix = [[150.0, 0.0, 79.5], [0.0, 150.0, 59.5], [0.0, 0.0, 1.0]]
distortions = [-0.2, 0.02, 0.0, 0.0, 0.0]
rotation = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
translation = [{x}, 0.0, {z}]
"""


def commands() -> list[tuple[str, str]]:
    """(page, command without its comment)."""
    found = []
    for page in PAGES:
        for line in (ROOT / "docs" / page).read_text().splitlines():
            if line.startswith("python -m recon "):
                found.append((page, line.partition(" #")[0].strip()))
    return found


def write_inputs(folder: Path) -> None:
    """What the commands name: DIR with videos of 45 s, cameras.toml, times.csv, and folders of images."""
    times = [float(second) for second in range(45)]
    for number, camera in enumerate(CAMERAS):
        write_video(folder / "videos" / f"{camera}.mp4", times, shade=number)
        for name in ("images", "images2"):
            for frame in range(3):
                path = folder / name / camera / f"{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(numbered(frame, number)).save(path)
    rig = [RIG.format(number=number, x=-0.4 * number, z=0.1 * number**2) for number in range(len(CAMERAS))]
    (folder / "cameras.toml").write_text("".join(rig))
    rows = [f"{camera},{frame},{frame}" for camera in CAMERAS for frame in range(45)]
    (folder / "times.csv").write_text("\n".join(["camera,frame,time_s", *rows]))


def small(command: str, folder: Path) -> list[str]:
    """The command on the inputs above and the smallest networks, with everything else as it is shown."""
    words = [word for word in command.split()[3:] if not word.startswith("depth=da2")]
    runs = sorted((folder / "outputs" / "runs").glob("*/*/manifest.json"))
    given = {"DIR": "images" if "source=images" in words else "videos", "DIR2": "images2",
             "outputs/runs/DATE/RUN": str(runs[-1].parent) if runs else ""}  # fmt: skip
    named = [f"{word.partition('=')[0]}={given[word.partition('=')[2]]}" if word.partition("=")[2] in given else word
             for word in words]  # fmt: skip
    if not any(word.startswith("source=") for word in words):
        return [*named, *([] if "handover.run" in command else SMALL)]
    return [*named, *NETWORKS, *([] if "stages=[depth]" in words else ["stages=[reconstruct,report]"])]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "recon", *words, "tracking=none"],
        cwd=folder, capture_output=True, text=True, timeout=280, env=environment, check=False,
    )  # fmt: skip


def test_commands_are_found() -> None:
    assert {page for page, _ in commands()} == {"sources.md", "handover.md", "viewer.md"}
    assert len(commands()) >= 9


def table(page: str, heading: str) -> dict[str, list[str]]:
    """Cells by the first cell of every row of the table whose head begins with `heading`; '-' rows are left out."""
    lines = (ROOT / "docs" / page).read_text().split(f"| {heading}")[1].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {row[0]: row[1:] for row in rows}


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def test_fusion_quotes_its_raw_output() -> None:
    raw = results("fusion_cpu")
    speed = table("fusion.md", "per 640x480 frame")
    accuracy = table("fusion.md", "accuracy: P / R / F")
    rendered = table("fusion.md", "depth rendered into 40 frames")
    for column, voxel in enumerate(("20mm", "10mm")):
        for name, cells in speed.items():
            times = raw[voxel]["speed"][name]
            assert cells[column] == f"{np.median(times['cpu_ms']):.1f} / {min(times['wall_ms']):.1f}", (name, voxel)
        for name, cells in accuracy.items():
            for place, frames in enumerate(("bootstrap_8_frames_w1", "all_160_frames_w1")):
                found = raw[voxel]["accuracy"][frames][name]
                said = " / ".join(f"{found[key]:.3f}" for key in ("precision", "recall", "f_score"))
                assert cells[2 * column + place] == said, (name, voxel, frames)
        for name, cells in rendered.items():
            found = raw[voxel]["held_out"][name]
            times = f"{np.median(found['render_ms'][1:]):.1f} ms, median error {found['median_abs_mm']:.1f} mm"
            assert cells[column].startswith(times), (name, voxel)


def test_live_and_alignment_quote_their_raw_output() -> None:
    names = ("live_gpu_h200", "live_gpu_h200_surfel", "live_gpu_h200_mini")
    for name, cells in zip(names, list(table("live.md", "| frames fused").values()), strict=True):
        raw = results(name)
        assert cells[0] == f"{raw['frames_fused']:,} of {raw['frames']:,}"
        assert cells[2].strip("*") == f"{raw['latency_ms']['p50']:.1f} / {raw['latency_ms']['p95']:.1f}"
        said = [f"{raw['ms'][part]['p50']:.3g} / {raw['ms'][part]['p95']:.3g}" for part in ("depth", "align", "fuse")]
        for cell, number in zip(" / ".join(cells[3:6]).split(" / "), " / ".join(said).split(" / "), strict=True):
            assert float(cell) == pytest.approx(float(number), abs=0.011)
    figures = {row["figure"]: row["measured"] for row in results("alignment_cpu")["rows"]}
    cost = [figures[f"A4 {how}: CPU ms, median"] for how in ("RANSAC, 5000 pixels", "prior, 5000 pixels")]
    assert f"| {cost[0]:.1f} / {cost[1]:.2f} ms |" in (ROOT / "docs" / "alignment.md").read_text()


def test_quantisation_quotes_its_raw_output() -> None:
    text = (ROOT / "docs" / "quantisation.md").read_text()
    for row in results("quant_trained_cpu")["rows"]:
        model, depth = row["model"], row["depth"]
        kept = "list" if row["keep"] else "-"
        said = [
            row["quant_mode"], row["precision"], kept, model["verdict"], f"{model['mb']:.1f} + {depth['mb']:.1f}",
            f"{model['summary']['absrel']:.4f}", f"{model['summary']['auc30']:.4f}",
            f"{model['summary']['rotation_median_deg']:.2f} deg",
            f"{depth['summary']['absrel']:.4f}", f"{depth['summary']['delta1']:.4f}",
        ]  # fmt: skip
        assert f"| {' | '.join(said)} |" in text, said


@pytest.mark.slow
def test_every_command(tmp_path: Path) -> None:
    """In one folder and in order: later commands read what earlier ones left."""
    write_inputs(tmp_path)
    for page, command in commands():
        if "rerun" in command and (shutil.which("rerun") is None or "spawn" in command):
            continue  # opening a viewer needs a screen: tests/test_viewer.py has what can be tested without
        done = run(small(command, tmp_path), tmp_path)
        text = done.stdout + done.stderr
        if "source=webcams" in command and not Path("/dev/video0").exists():
            assert done.returncode == 1
            assert "camera front: 0 cannot be opened" in text
            continue
        assert done.returncode == 0, f"{page}: {command}\n{text}"
        assert "results " in done.stdout, command
    assert list(tmp_path.glob("outputs/runs/*/*/handover/sparse/0/points3D.bin"))
    assert list(tmp_path.glob("outputs/runs/*/*/depth_video/all.mp4"))


@pytest.mark.slow
def test_the_pool_s_example(tmp_path: Path) -> None:
    """The Python block of live.md, word for word, on an engine that the command built."""
    done = run(["stages=[export,build]", "model=recorded", "depth=da-mini", *SCENE], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    block = (ROOT / "docs" / "live.md").read_text().split("```python\n")[1].split("```")[0]
    images = np.stack([numbered(0), numbered(1)])
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(
            compile(block + "\n        seen.append(result)", "live.md", "exec"),
            {"images": images, "seen": (seen := [])},
        )
    finally:
        os.chdir(before)
    assert [result.depth.shape for result in seen] == [(120, 160)] * 2
