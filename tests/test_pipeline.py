"""All stages on real (small, seeded) networks: caching, damage, benchmarks of files and folders, tracking."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recon.artifact import manifest_path
from recon.benchmark.contract import BenchmarkOptions
from recon.config import Config, option
from recon.errors import ReconError
from recon.pipeline import Run, finish, run
from recon.plan import plan
from recon.store import Store
from recon.tracking.mlflow import MLflow

ENGINES = ["export", "calibrate", "build", "benchmark"]


def config(output: Path, stages: list[str], **changes: object) -> Config:
    """Small networks on a small scene."""
    source = replace(option("source", "synthetic"), width=96, height=72, steps=2, moving=0)
    found = Config(
        model=option("model", "recorded"),
        depth=option("depth", "da2-twin"),
        quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"),
        engine=option("engine", "onnxruntime"),
        source=source,
        fusion=replace(option("fusion", "tsdf"), voxel=0.06),
        tracking=option("tracking", "none"),
        benchmark=BenchmarkOptions(iterations=50, warmup=2),
        stages=stages,
        output=str(output),
    )
    return replace(found, **changes)


def ran(settings: Config, folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    state = Run(settings, folder, Store(settings))
    run(state)
    finish(state)
    return state


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder in which every stage has run once."""
    output = tmp_path_factory.mktemp("built")
    ran(config(output, [*ENGINES, "reconstruct", "evaluate", "report"]), output / "runs" / "first")
    return output


def test_every_stage_leaves_its_part(built: Path) -> None:
    metrics = json.loads((built / "runs" / "first" / "metrics.json").read_text())
    name = "da2-twin-1x3x84x112"
    assert metrics["onnx"][name]["opset"] == 20
    facts = metrics["engines"][name]["facts"]
    assert all(error["rel_l2"] < 1e-4 for error in facts["accuracy"]["outputs"].values())
    assert facts["certificate"]["verdict"] == "achieved"
    assert len(metrics["benchmark"][name]["latency_samples_ms"]) == 50
    assert metrics["stages"][0]["stage"] == "export"
    assert {"report.html", "overview.png"} <= {path.name for path in (built / "runs" / "first").iterdir()}


def test_an_engine_that_takes_the_torch_module_needs_no_onnx_at_all(tmp_path: Path) -> None:
    precision = replace(option("precision", "int8"), rest="fp32")
    settings = config(tmp_path, ENGINES, engine=option("engine", "torch"), precision=precision)
    assert [row["cache"] for row in plan(settings)] == ["not needed", "miss", "not needed", "always runs"]
    state = ran(settings, tmp_path / "runs" / "one")
    assert state.rows[0].outcome == "not needed: engine=torch takes the torch module; stages=[export] writes it"
    assert "calibrated" in state.rows[1].outcome
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["da2-twin-1x3x84x112_layers.npz"]
    assert not list(tmp_path.rglob("*.onnx"))
    ran(replace(settings, stages=["export"]), tmp_path / "runs" / "two")
    assert len(list(tmp_path.rglob("*.onnx"))) == 1


def test_everything_is_reused_and_plan_says_so(built: Path) -> None:
    settings = config(built, ["export", "build", "reconstruct"])
    assert [row["cache"] for row in plan(settings)] == ["hit", "hit", "hit"]
    state = ran(settings, built / "runs" / "second")
    assert "reused" in state.rows[0].outcome
    assert "reused" in state.rows[1].outcome
    assert state.reconstruction is not None
    assert state.reconstruction.bootstrap_reused


def test_force_and_fresh_bootstrap_redo(built: Path) -> None:
    settings = config(built, ["export", "build", "reconstruct"], force=["build"], fresh_bootstrap=True)
    assert [row["cache"] for row in plan(settings)] == ["hit", "redone (forced)", "redone (forced)"]
    state = ran(settings, built / "runs" / "third")
    assert "reused" in state.rows[0].outcome
    assert "built" in state.rows[1].outcome
    assert state.reconstruction is not None
    assert not state.reconstruction.bootstrap_reused


def artifacts(built: Path) -> dict[str, Path]:
    engines = built / "engines" / "none"
    found = {path.name.partition("_fp32")[2]: path for path in engines.iterdir() if not path.name.startswith(".")}
    found["bootstrap"] = next((built / "cache" / "bootstrap").glob("*.npz"))
    found["bootstrap manifest"] = manifest_path(found["bootstrap"])
    return found


def test_a_flipped_byte_in_any_artifact_is_named_and_rebuilt(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file that the stages cached, one after the other."""
    settings = config(built, ["export", "build", "reconstruct"])
    kinds = artifacts(built)
    assert len(kinds) == 7, sorted(kinds)  # onnx, its data, its manifest, engine, its manifest, bootstrap, its manifest
    for kind, path in kinds.items():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x08
        path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ran(settings, built / "runs" / f"damaged {kind}")
        assert path.name in caplog.text, kind
        assert [row["cache"] for row in plan(settings)] == ["hit", "hit", "hit"], kind


def test_benchmark_of_a_file_and_of_a_folder(built: Path) -> None:
    engine = next((built / "engines").rglob("*.onnxruntime.engine"))
    for options in (BenchmarkOptions(engine=str(engine)), BenchmarkOptions(root=str(built / "engines"))):
        state = ran(config(built, ["benchmark"], benchmark=options), built / "runs" / "bench")
        assert list(state.metrics["benchmark"]) == [engine.name]
    rows = list(csv.DictReader((built / "benchmarks.csv").open()))
    assert len(rows) >= 3
    assert {row["engine"] for row in rows} == {"onnxruntime"}
    assert all(float(row["latency_ms_p50"]) > 0 for row in rows)


def test_benchmark_refuses_what_is_no_engine(built: Path, tmp_path: Path) -> None:
    onnx = next((built / "engines").rglob("*.onnx"))
    with pytest.raises(ReconError, match="not an engine"):
        ran(config(built, ["benchmark"], benchmark=BenchmarkOptions(engine=str(onnx))), built / "runs" / "bench")
    with pytest.raises(ReconError, match="no engine with a manifest"):
        ran(config(built, ["benchmark"], benchmark=BenchmarkOptions(root=str(tmp_path))), built / "runs" / "bench")


def test_torch_engine_needs_no_build(built: Path) -> None:
    state = ran(config(built, ["build", "benchmark"], engine=option("engine", "torch")), built / "runs" / "torch")
    assert "not needed" in state.rows[0].outcome
    summary = next(iter(state.metrics["benchmark"].values()))["summary"]
    assert summary["error_rel_l2_max"] == 0.0


def test_other_weights_make_another_artifact(built: Path) -> None:
    depth = replace(option("depth", "da2-twin"), weights="seeded:5")
    rows = plan(config(built, ["export", "build"], depth=depth))
    assert [row["cache"] for row in rows] == ["miss", "miss"]


def test_mlflow_holds_parameters_series_tables_and_files(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from recon.app import run_job

    tracking = option("tracking", "mlflow")
    assert isinstance(tracking, MLflow)
    settings = config(tmp_path, [*ENGINES, "reconstruct", "report"], tracking=tracking, name="question")
    from omegaconf import OmegaConf

    folder = tmp_path / "runs" / "tracked"
    (folder / ".hydra").mkdir(parents=True)
    run_job(settings, OmegaConf.create({"name": "question", "align": {"smooth_scale": 0.1}}), {"sweep": "s1"}, folder)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("question")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["align.smooth_scale"] == "0.1"
    assert found.data.tags["sweep"] == "s1"
    assert found.data.metrics["recon/points"] > 100
    samples = client.get_metric_history(found.info.run_id, "engine/da2-twin-1x3x84x112_latency_ms")
    assert [sample.step for sample in samples] == list(range(50))
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"metrics.json", "map_updated.ply", "report.html", "tables"} <= names


def test_a_failing_run_is_closed_as_failed(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from omegaconf import OmegaConf

    from recon.app import run_job

    settings = config(tmp_path, ["evaluate"], tracking=option("tracking", "mlflow"), name="fails")
    with pytest.raises(ReconError, match="add reconstruct"):
        run_job(settings, OmegaConf.create({"name": "fails"}), {}, tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("fails").experiment_id])
    assert found.info.status == "FAILED"


def test_depth_by_a_network_is_deterministic_through_the_stream(built: Path) -> None:
    clouds = []
    for name in ("a", "b"):
        state = ran(config(built, ["reconstruct"]), built / "runs" / name)
        assert state.reconstruction is not None
        clouds.append(state.reconstruction.fused.points().points)
    assert np.array_equal(*clouds)
