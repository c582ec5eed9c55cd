"""Runs that are killed leave nothing that a later one takes for complete."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import TINY, newest_run, recon

RECORDED = ["model=recorded", "depth=recorded"]
NETWORKS = ["model=vggt-twin", "depth=da2-twin", "model.width=84", "model.height=56", "benchmark.iterations=10"]


def killed(arguments: list[str], folder: Path, duration: float, times: int) -> None:
    """Start the command and kill it with SIGKILL so many times, at moments spread over its duration.

    A later start finds what earlier ones have finished and ends sooner: where it ends before its moment, nothing was
    killed, and the moments from there on are spread over its duration.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "recon", *arguments]
    for share in np.sort(np.random.default_rng(7).uniform(0.25, 1.0, times)):
        while True:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, env=environment, **quiet)
            try:
                code = process.wait(float(share) * duration)
            except subprocess.TimeoutExpired:
                process.kill()
                assert process.wait() == -signal.SIGKILL
                break
            assert code == 0
            duration = 0.95 * (time.perf_counter() - start)


def frames_without_times(run: Path) -> list[dict[str, object]]:
    rows = json.loads((run / "metrics.json").read_text())["frames"]
    return [{k: v for k, v in row.items() if "ms" not in k.split("_") or k == "resid_med_mm"} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("networks", "times"), [(NETWORKS, 7), (RECORDED, 5)], ids=["networks", "recorded"])
def test_killed_at_random_moments_then_rerun_gives_the_undisturbed_result(
    networks: list[str], times: int, tmp_path: Path
) -> None:
    """SIGKILLs spread over the run, then one run to the end: same map, same frames, same artifacts, nothing stray."""
    arguments = [*TINY, *networks, "save_per_frame_depth=true"]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    start = time.perf_counter()
    recon(*arguments, cwd=undisturbed)
    killed(arguments, disturbed, time.perf_counter() - start, times)
    incomplete = {run for run in (disturbed / "outputs/runs").glob("*/*") if not (run / "manifest.json").exists()}
    recon(*arguments, cwd=disturbed)
    final, wanted = newest_run(disturbed), newest_run(undisturbed)
    assert final not in incomplete
    for name in ("bootstrap_map.ply", "map_updated.ply", "mesh.ply", "tsdf_volume.npz"):
        assert (final / name).read_bytes() == (wanted / name).read_bytes(), name
    assert frames_without_times(final) == frames_without_times(wanted)
    made = [
        {
            str(path.relative_to(folder)): path
            for path in (folder / "outputs").rglob("*.json")
            if "runs" not in path.parts
        }
        for folder in (disturbed, undisturbed)
    ]
    assert made[0].keys() == made[1].keys()
    for name, path in made[0].items():
        assert json.loads(path.read_text())["key"] == json.loads(made[1][name].read_text())["key"], name
    assert not [path for path in (disturbed / "outputs").rglob("*") if path.name.endswith(".tmp")]
