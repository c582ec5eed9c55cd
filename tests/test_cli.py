"""The command as a user types it: exit codes, messages, files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import TINY, newest_run, recon

RECORDED = ["model=recorded", "depth=recorded"]
SMALL = [*TINY, *RECORDED]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, one message with the words and a remedy, no traceback."""
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text, text
    assert text.count("error:") == 1, text
    assert "remedy:" in text, text
    for word in words:
        assert word in text, text


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small demo has run once."""
    folder = tmp_path_factory.mktemp("demo")
    recon(*SMALL, "save_per_frame_depth=true", cwd=folder)
    return folder


def test_the_run_folder_holds_what_the_design_lists(demo: Path) -> None:
    run = newest_run(demo)
    names = {path.name for path in run.iterdir()}
    wanted = {
        "metrics.json",
        "report.html",
        "bootstrap_map.ply",
        "map_updated.ply",
        "tsdf_volume.npz",
        "mesh.ply",
        "depth_metric",
        "calibration.json",
        ".hydra",
    }
    assert wanted <= names, wanted - names
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"metrics.json", "map_updated.ply", "tsdf_volume.npz"} <= manifest["files"].keys()


def test_metrics_say_scale_frames_and_reasons(demo: Path) -> None:
    metrics = json.loads((newest_run(demo) / "metrics.json").read_text())
    assert metrics["scale"]["unit"] == "m"
    assert metrics["scale"]["source"] != "none"
    assert metrics["depth_type"] == "disparity"
    assert metrics["frames_seen"] == 4 * 3
    for frame in metrics["frames"]:
        assert {
            "camera",
            "frame",
            "s",
            "t",
            "inlier_5pct",
            "resid_med_pct",
            "accepted",
            "reason",
            "ms_align",
        } <= frame.keys()
        assert frame["accepted"] or frame["reason"]
    assert metrics["evaluation"]["depth_absrel"] < 0.1


def test_second_run_reuses_the_bootstrap_and_gives_the_same_map(demo: Path) -> None:
    first = newest_run(demo)
    recon(*SMALL, "save_per_frame_depth=true", cwd=demo)
    second = newest_run(demo)
    assert second != first
    assert json.loads((second / "metrics.json").read_text())["bootstrap"]["reused"] is True
    assert (second / "map_updated.ply").read_bytes() == (first / "map_updated.ply").read_bytes()


def test_plan_runs_nothing(tmp_path: Path) -> None:
    done = recon(*SMALL, "plan=true", cwd=tmp_path)
    assert "miss" in done.stdout
    assert not list(tmp_path.rglob("*.ply"))
    assert not list(tmp_path.glob("outputs/runs/*/*"))


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.argv=['recon','--help']\nfrom recon.app import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy={'torch','onnx','onnxruntime','open3d','mlflow','transformers','matplotlib','cv2','scipy','numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "+sweep" in done.stdout
    assert "source" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fusion=surfels"], ["surfels", "surfel"]),
        (["tracking=null"], ["tracking=null", "mlflow, none"]),
        (["stages=[export,", "build]"], ["stages=[export,", "without blanks"]),
        (["+fuson=1"], ["unknown key fuson", "fusion"]),
        (["source.width=wide"], ["wide"]),
        (["source=images", "source.path=/no/such/folder"], ["/no/such/folder", "remedy"]),
        (["source=images"], ["source.path"]),
        (["+quant=modelopt-fp8", "precision=bf16"], ["modelopt-fp8", "bf16", "remedy", "nearest pair"]),
        (["+quant=modelopt-fp8", "quant_mode=none"], ["contradicts"]),
        (["stages=[evaluate]"], ["reconstruct"]),
        (["+sweep=smoke"], ["+sweep=smoke without -m", "python -m recon -m +sweep=smoke"]),
        (["source.frame_step=0"], ["frame_step"]),
        (["source.views=[nobody]"], ["nobody"]),
    ],
)
def test_bad_requests_end_with_one_message(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(recon(*arguments, cwd=tmp_path, check=None), *words)
    assert not list(tmp_path.glob("outputs/runs/*/*"))


def namespace(script: str) -> tuple[str, ...]:
    """Run a command with its own mounts, as an unprivileged user may where the kernel allows it."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this system does not allow user namespaces, so no small or read-only disk can be mounted")
    return ("unshare", "-rm", "sh", "-c", f'{script} && exec "$@"', "sh")


@pytest.mark.parametrize("size", ["64k", "400k", "1500k"])
def test_full_disk(tmp_path: Path, size: str) -> None:
    (tmp_path / "outputs").mkdir()
    done = recon(
        *SMALL, cwd=tmp_path, check=None, wrapper=namespace(f"mount -t tmpfs -o size={size} tmpfs {tmp_path}/outputs")
    )
    refused(done, "full")


def test_read_only_output(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    done = recon(*SMALL, cwd=tmp_path, check=None, wrapper=namespace(f"mount -t tmpfs -o ro tmpfs {tmp_path}/outputs"))
    refused(done, "outputs", "ead-only")


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    refused(recon(*SMALL, cwd=tmp_path, check=None), "outputs")


@pytest.mark.parametrize("how", [[], ["-m"], ["hydra.run.dir=run"]], ids=["run", "sweep", "artifacts alone"])
def test_output_where_no_folder_can_be_made(tmp_path: Path, how: list[str]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("this system has no /proc, where every new folder is refused with ENOENT")
    refused(recon(*SMALL, "output=/proc/x", *how, cwd=tmp_path, check=None), "/proc/x", "cannot be made", "output=DIR")


def test_a_sweep_ends_with_one_table_and_refused_rows(tmp_path: Path) -> None:
    done = recon(
        "-m",
        "precision=fp32,bf16",
        "stages=[build]",
        "model=recorded",
        "depth=da2-twin",
        "tracking=none",
        "hydra.sweep.dir=outputs/sweep",
        cwd=tmp_path,
    )
    rows = json.loads((tmp_path / "outputs/sweep/summary.json").read_text())
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "precision=bf16" in rows[1]["reason"]
    assert "refused" in done.stdout


def test_a_job_without_a_value_that_it_needs_is_a_row_with_the_remedy(tmp_path: Path) -> None:
    done = recon(
        "-m", *RECORDED, "source=images,webcams", "source.random_views=7", "tracking=none", cwd=tmp_path, check=1
    )
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    assert "give source.path=..." in text
    assert "source.random_views=7: there are only 1 cameras" in text
    rows = json.loads(next(tmp_path.glob("outputs/sweeps/*/*/summary.json")).read_text())
    assert [row["status"] for row in rows] == ["failed", "failed"]


def test_a_sweep_that_is_only_planned_has_not_failed(tmp_path: Path) -> None:
    done = recon("-m", *RECORDED, "plan=true", "fusion.voxel=0.05,-1", "source.width=96", cwd=tmp_path, check=1)
    rows = json.loads(next(tmp_path.glob("outputs/sweeps/*/*/summary.json")).read_text())
    assert [row["status"] for row in rows] == ["planned", "failed"]
    assert "always runs" in done.stdout
    assert not list(tmp_path.rglob("mlflow.db"))
    recon("-m", *RECORDED, "plan=true", "fusion.voxel=0.05,0.06", "source.width=96", cwd=tmp_path)


def test_a_failed_job_does_not_stop_the_sweep_but_its_exit_code(tmp_path: Path) -> None:
    done = recon("-m", "source.frame_step=0,1", *SMALL, "hydra.sweep.dir=outputs/sweep", cwd=tmp_path, check=1)
    rows = json.loads((tmp_path / "outputs/sweep/summary.json").read_text())
    assert [row["status"] for row in rows] == ["failed", "ok"], done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_reader_that_leaves_gets_no_traceback(tmp_path: Path) -> None:
    """`python -m recon --help | head` ends without a word."""
    process = subprocess.Popen(
        [sys.executable, "-m", "recon", "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 1
