"""The command as a user types it, for tests."""

import os
import subprocess
import sys
from pathlib import Path

TINY = ["source.width=128", "source.height=96", "source.steps=3", "tracking=none", "fusion.voxel=0.05"]


def recon(
    *arguments: str, cwd: Path, check: int | None = 0, wrapper: tuple[str, ...] = (), seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    command = [*wrapper, sys.executable, "-m", "recon", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def newest_run(folder: Path) -> Path:
    return max((folder / "outputs" / "runs").glob("*/*"), key=lambda path: path.name)
