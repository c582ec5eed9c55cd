"""MLflow on a local SQLite file: parameters, metrics, series, tables and artifacts of every run.

Runs are flat and tagged by sweep, because MLflow 3.17 draws no charts for nested ones. Series go through `log_batch`:
1000 points in 0.1 s, where one `log_metric` call each takes 17 s.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.tracking import Record, Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
BATCH = 1000  # entities that one log_batch call may carry


@dataclass
class MLflow(Tracking):
    """MLflow tracking."""

    uri: str = ""
    """Tracking URI; empty = sqlite:///<output>/mlflow.db."""
    artifact_limit_mib: float = 64.0
    """Larger files are recorded by path instead of being copied into the store."""

    def __post_init__(self) -> None:
        self._client: Any = None  # set by open(); not a field, so that it is no knob

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("mlflow") is None:
            raise ReconError(
                "tracking=mlflow: the package mlflow is not installed", "pip install 'recon[mlflow]', or tracking=none"
            )

    def open(self, experiment: str, run: str, output: Path, tags: dict[str, str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a user's runs are the user's business
        from mlflow import MlflowClient

        for noisy in ("alembic", "mlflow"):  # a line per schema migration otherwise; importing mlflow sets its level
            logging.getLogger(noisy).setLevel(logging.WARNING)

        self._uri = self.uri or f"sqlite:///{(output / 'mlflow.db').resolve()}"
        with self._told():
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._experiment_id(experiment, output)
            self._run = self._client.create_run(self._experiment, run_name=run, tags=tags).info.run_id

    def close(self, record: Record, status: str) -> list[str]:
        if self._client is None:
            return []
        with self._told():
            self._record(self._client, record, status)
        return self._links()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what a full disk or a server that is down makes of the record into an error that says so."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ReconError(
                f"tracking=mlflow: the run cannot be recorded at {self._uri}: {first}",
                "free some disk space, check tracking.uri, or tracking=none; the run folder has what a run found",
            ) from error

    def _record(self, client: MlflowClient, record: Record, status: str) -> None:
        try:
            _log_values(client, self._run, record)
            for name, rows in record.tables.items():
                client.log_dict(
                    self._run,
                    {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]},
                    f"tables/{name}.json",
                )
            self._log_files(client, record.files)
        except BaseException:
            status = "FAILED"
            raise
        finally:
            client.set_terminated(self._run, status)

    def _experiment_id(self, name: str, output: Path) -> str:
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            location = (output / "mlartifacts").resolve().as_uri()
            return str(self._client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another worker of the sweep was first
            found = self._client.get_experiment_by_name(name)
            assert found is not None
            return str(found.experiment_id)

    def _log_files(self, client: MlflowClient, files: list[Path]) -> None:
        for file in files:
            if file.is_dir():
                client.log_artifacts(self._run, str(file), file.name)
            elif file.stat().st_size <= self.artifact_limit_mib * 2**20:
                client.log_artifact(self._run, str(file))
            else:
                client.set_tag(self._run, f"file.{file.name}", str(file.resolve()))

    def _links(self) -> list[str]:
        runs = f"http://127.0.0.1:5000/#/experiments/{self._experiment}/runs"
        return [
            f"MLflow  start: mlflow server --workers 1 --backend-store-uri {self._uri}",
            f"        run:    {runs}/{self._run}",
            f"        charts: {runs}?workflowType=machine_learning&compareRunsMode=CHART",
        ]


def _log_values(client: MlflowClient, run: str, record: Record) -> None:
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    key = _keys([*record.params, *record.metrics, *record.series, *record.tags])
    params = [Param(key[name], str(value)[:6000]) for name, value in record.params.items()]
    metrics = [Metric(key[name], float(value), now, 0) for name, value in record.metrics.items()]
    for name, values in record.series.items():
        metrics += [Metric(key[name], float(value), now, step) for step, value in enumerate(values)]
    tags = [RunTag(key[name], value) for name, value in record.tags.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run, params=params[start : start + 100])
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[start : start + BATCH])
    client.log_batch(run, tags=tags)


def _keys(names: list[str]) -> dict[str, str]:
    """Keys that MLflow takes, which refuses much of what names of files and cameras may hold; no two become one."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        key = plain = re.sub(r"[^A-Za-z0-9_./ -]", "_", name)
        number = 1
        while key in taken:
            number += 1
            key = f"{plain}_{number}"
        keys[name] = key
        taken.add(key)
    return keys
