"""The whole matrix of quantisation modes and precisions, as a user asks for it: one sweep, one table."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
from command import recon

MODES = [
    "none", "torch-int8-dynamic", "bitsandbytes-8bit", "bitsandbytes-nf4", "bitsandbytes-fp4", "modelopt-fp8", "modelopt-nvfp4",
]  # fmt: skip
PRECISIONS = ["fp32", "fp16", "bf16", "int8", "fp8"]
NETWORKS = ("vggt-twin-", "da2-twin-")
MEASURED = ("size MB", "p50 ms", "p99 ms", "depth AbsRel", "rel L2")


@pytest.mark.slow
def test_every_pair_is_an_engine_with_its_figures_or_refused_with_its_reason(tmp_path: Path) -> None:
    """ONNX Runtime on the CPU has neither BF16 products nor E2M1 values; all other pairs run."""
    sweep = (
        "-m",
        "+sweep=all-quant-modes",
        "tracking=none",
        "benchmark.iterations=10",
        "engine.threads=1",
        "hydra.sweep.dir=outputs/sweep",
    )
    printed = recon(*sweep, cwd=tmp_path, seconds=900).stdout
    jobs = json.loads((tmp_path / "outputs/sweep/summary.json").read_text())
    assert [(job["quant_mode"], job["precision"]) for job in jobs] == list(product(MODES, PRECISIONS))
    for job in jobs:
        runs = job["precision"] != "bf16" and job["quant_mode"] != "modelopt-nvfp4"
        assert job["status"] == ("ok" if runs else "refused"), job
        assert bool(job["reason"]) is not runs, job

    table = json.loads((tmp_path / "outputs/sweep/engines.json").read_text())
    engines = [row for row in table["engines"] if row["verdict"] != "refused"]
    assert len(engines) == 2 * sum(job["status"] == "ok" for job in jobs)
    for row in engines:
        assert row["network"].startswith(NETWORKS)
        assert row["verdict"].partition(" ")[0] in ("achieved", "partial"), row
        assert all(float(row[name]) > 0 for name in MEASURED), row
        assert (float(row["rotation deg"]) > 0) if "vggt" in row["network"] else not row["rotation deg"]
        assert row["quant_mode"] in printed
    explained = (
        r"error: (their certificates are the same|(layers|bits_per_weight|operands|computed_in|stored_as|kernels) )"
    )
    assert all(re.search(explained, line) for line in table["look_alikes"]), table["look_alikes"]
    assert "depth AbsRel" in printed
    assert "no kernel" in next(row for row in table["engines"] if row["quant_mode"] == "modelopt-nvfp4")["reason"]
