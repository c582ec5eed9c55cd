"""Every command that the README shows runs, in its small form; and the installed wheel does what the checkout does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recording import write_recording

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.partition("  #")[0].strip() for line in README.splitlines() if line.startswith("python -m recon")]
FRAMES = "source.width=96 source.height=72 source.steps=2 benchmark.iterations=10"
NETWORKS = "model.width=84 model.height=56 depth.input_size=56"
SMALL = f"{FRAMES} {NETWORKS}"
SMALL_BY = {  # what makes a command quick without changing what it shows
    "source=images": "",
    "doctor": "",
    "--cfg": "",
    "stages=[benchmark]": "benchmark.iterations=10",
    "+sweep=smoke": FRAMES,
    "stages=[sensitivity]": f"{FRAMES} depth.input_size=56 model=recorded sensitivity.group=kind calibration.batches=1 sensitivity.batches=1",
}


def run(command: str, folder: Path) -> str:
    words = [sys.executable, *command.split()[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_opens_with_the_two_commands() -> None:
    block = README.split("```")[1].split("\n")
    assert [line.split("#")[0].strip() for line in block if line.strip()] == ["make demo", "make test"]
    assert README.index("make demo") < 40


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 10
    assert "python -m recon" in COMMANDS


@pytest.mark.slow
def test_every_readme_command(tmp_path: Path) -> None:
    """In the README's order, in one folder: later commands read what earlier ones left."""
    write_recording(tmp_path / "D", cameras=4)  # as many as the demo has: its exported networks are reused
    (tmp_path / "DIR").symlink_to(tmp_path / "D" / "images")
    known = "source.depth=D/depth source.intrinsics=D/intrinsics.npz source.poses=D/poses.npz"
    for command in COMMANDS:
        extra = next((text for key, text in SMALL_BY.items() if key in command), SMALL)
        if command == "python -m recon source=images source.path=DIR":  # the shown form is for model=vggt-1b's weights
            extra = f"{known} {NETWORKS} benchmark.iterations=10 model=vggt-mini depth=da-mini"
        printed = run(f"{command} {extra}", tmp_path)
        assert printed.strip(), command


@pytest.mark.slow
def test_the_installed_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    """conf/ and sweeps/ travel inside the wheel."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
        timeout=200,
    )
    (wheel,) = tmp_path.glob("recon-*.whl")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, timeout=200)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    probe = [sys.executable, "-c", "import recon; print(recon.__file__)"]
    where = subprocess.run(probe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert where.stdout.startswith(str(site))
    job = [sys.executable, "-m", "recon", "plan=true", "tracking=none"]
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reconstruct" in done.stdout
