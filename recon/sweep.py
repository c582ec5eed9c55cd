"""The end of a sweep: one table of all jobs, refused and failed ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from recon.artifact import write_atomic
from recon.console import console
from recon.tracking import Record, Tracking

_failed: list[str] = []


def failed_jobs() -> list[str]:
    """Reasons of the jobs that failed in this process's sweep; refused pairs are not failures."""
    return _failed


class SweepTable(Callback):
    """Prints and writes the table when all jobs of a sweep have ended. Hydra builds it from `hydra.callbacks`."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Gather `result.json` of every job into `summary.json` and a table."""
        from recon.report import print_table

        folder = Path(config.hydra.sweep.dir)
        rows = [_row(job) for job in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name))]
        if not rows:
            return
        _failed.extend(row["reason"] for row in rows if row["status"] == "failed")
        write_atomic(folder / "summary.json", json.dumps(rows, indent=1) + "\n")
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if _tells(key, rows)]
        table = [{key: str(row.get(key, "")) for key in columns} for row in rows]
        print_table(f"Sweep {folder.name}", table)
        tables = {"leaderboard": table}
        if engines := _engines(folder):
            tables["engines"] = engines
        if not config.plan:
            _track(config, folder, tables)


def _engines(folder: Path) -> list[dict[str, str]]:
    """The table of engines, printed and written, where jobs built some; and what is to be said of equal rows."""
    from recon.benchmark.leaderboard import look_alikes, table, text

    files = sorted(folder.glob("[0-9]*/result.json"), key=lambda path: int(path.parent.name))
    jobs = [json.loads(file.read_text()) for file in files]
    if not any(job["engines"] for job in jobs):
        return []
    rows, said = table(jobs), list(look_alikes(jobs))
    write_atomic(folder / "engines.json", json.dumps({"engines": rows, "look_alikes": said}, indent=1) + "\n")
    for line in [f"Engines of sweep {folder.name}", *text(rows), *said]:
        console().print(line, markup=False, soft_wrap=True)
    return rows


def _track(config: DictConfig, folder: Path, tables: dict[str, list[dict[str, str]]]) -> None:
    """One extra run per sweep that holds the table, beside the flat runs of its jobs."""
    tracking = OmegaConf.to_object(config.tracking)
    assert isinstance(tracking, Tracking)
    tracking.open(config.name, f"summary {folder.name}", Path(config.output), {"sweep": folder.name, "summary": "true"})
    for line in tracking.close(Record(tables=dict(tables), files=[folder / "summary.json"]), "FINISHED"):
        console().print(line, markup=False)


def _row(job: Path) -> dict[str, str]:
    file = job / "result.json"
    if not file.exists():
        return {"job": job.name, "status": "failed", "reason": "ended without a result (killed?)"}
    data = json.loads(file.read_text())
    reason = data["reason"].partition("\n")[0]
    numbers = {key: f"{value:.4g}" for key, value in data["summary"].items()}
    return {"job": job.name, **_assignments(data["overrides"]), "status": data["status"], **numbers, "reason": reason}


def _tells(column: str, rows: list[dict[str, str]]) -> bool:
    """Whether a column says something: overrides that all jobs share do not."""
    return column in ("status", "reason") or len(rows) == 1 or len({row.get(column) for row in rows}) > 1


def _assignments(overrides: list[str]) -> dict[str, str]:
    return dict(item.lstrip("+").partition("=")[::2] for item in overrides if "=" in item)
