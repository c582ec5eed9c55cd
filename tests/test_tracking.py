"""The MLflow record by itself."""

import resource
from pathlib import Path

import pytest

from recon.config import option
from recon.errors import ReconError
from recon.tracking import Record


def test_names_that_mlflow_refuses_are_written_all_the_same(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    tracking = option("tracking", "mlflow")
    tracking.open("names", "run", tmp_path, {})
    record = Record()
    record.metrics = {"engine/da#1_ms": 1.0, "engine/da_1_ms": 2.0, "engine/da.engine": 3.0}
    record.series = {"camera é@0/scale": [4.0, 5.0]}
    tracking.close(record, "FINISHED")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("names").experiment_id])
    assert run.info.status == "FINISHED"
    assert sorted(run.data.metrics.values()) == [1.0, 2.0, 3.0, 5.0]
    assert run.data.metrics["engine/da.engine"] == 3.0


def test_a_full_disk_is_said_when_a_run_begins_and_when_it_ends(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    begun, late = option("tracking", "mlflow"), option("tracking", "mlflow")
    begun.open("full", "run", tmp_path, {})
    record = Record()
    record.series = {f"series {number}": [float(step) for step in range(1000)] for number in range(5)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ReconError, match="tracking=mlflow: the run cannot be recorded at sqlite:") as caught:
            begun.close(record, "FINISHED")
        assert "tracking=none" in caught.value.remedy
        with pytest.raises(ReconError, match="cannot be recorded"):
            late.open("full", "another", tmp_path / "new", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
