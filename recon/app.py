"""The command: Hydra composes a configuration, the pipeline runs it, a tracker records it, a person reads a table."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recon.artifact import write_atomic
from recon.config import CONF, Config, register, to_config
from recon.errors import ReconError, Refused
from recon.sources.webcams import quote_devices

if TYPE_CHECKING:
    from recon.pipeline import Run

log = logging.getLogger(__name__)
# Read by libgomp when torch is first imported: threads wait busily for about 10 us, then sleep. With its default of
# milliseconds, small tensor work gets up to ten times slower as soon as anything else uses the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Read by PyTorch at the first product on a GPU. With a workspace, cuBLAS chooses kernels that want a cleared counter:
# one more launch before each of them, 0.9 ms of VGGT-1B's 8 views on an H200.
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")
logging.raiseExceptions = False  # a log file on a full disk must not print a traceback for every message
register()


def main() -> None:
    """Entry of `python -m recon` and `recon`. Exit code 0 when everything ran, 1 when something did not."""
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach this function instead of ending the process inside Hydra
    sys.argv[1:] = [quote_devices(argument) for argument in sys.argv[1:]]
    try:
        _hydra()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ReconError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        said = None if verbose else _explained(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: finished artifacts are kept, a rerun continues from them", file=sys.stderr)
        sys.exit(130)
    from recon.sweep import failed_jobs

    sys.exit(1 if failed_jobs() else 0)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra(composed: DictConfig) -> None:
    """One job. In a sweep an error is a row of the table and the other jobs go on."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    if settings.mode != RunMode.MULTIRUN:
        try:
            if (sweep := settings.runtime.choices.get("sweep")) is not None:
                remedy = f"python -m recon -m +sweep={sweep}"
                raise ReconError(f"+sweep={sweep} without -m would run one of its jobs", remedy)
            _job(composed, settings, folder)
        finally:
            _drop_empty(folder)
        return
    try:
        _job(composed, settings, folder)
    except Refused as error:
        _write_result(folder, composed, "refused", error)
    except Exception as error:
        said = _explained(error)
        if said is None:
            log.error("%s", traceback.format_exc())
        _write_result(folder, composed, "failed", said or error)


def _drop_empty(folder: Path) -> None:
    """A run that was refused, or only planned, leaves no folder: Hydra makes one before anything is looked at."""
    others = (path for path in folder.glob("*") if path.name != ".hydra")
    told = any(path.suffix != ".log" or path.stat().st_size for path in others)
    if not told and folder != Path.cwd():
        shutil.rmtree(folder, ignore_errors=True)


def _job(composed: DictConfig, settings: Any, folder: Path) -> None:
    config = to_config(composed, dict(settings.runtime.choices))
    if config.plan:
        from recon.plan import plan

        _table("Plan: nothing is run", plan(config))
        if settings.mode == RunMode.MULTIRUN:
            _write_result(folder, composed, "planned", None)
        return
    state, lines = run_job(config, composed, _tags(settings), folder)
    _write_result(folder, composed, "ok", None, state.metrics)
    rows = [{"stage": row.stage, "outcome": row.outcome, "seconds": f"{row.seconds:.2f}"} for row in state.rows]
    _table(run_name(config), rows)
    for line in [f"results {folder}", *lines]:
        _say(line)


def run_job(config: Config, composed: DictConfig, tags: dict[str, str], folder: Path) -> tuple[Run, list[str]]:
    """Run the stages under the tracker; returns what they found and the tracker's lines for the person.

    A run that fails is recorded with what it had found.
    """
    from recon import pipeline
    from recon.store import Store

    config.tracking.open(config.name, run_name(config), Path(config.output), tags)
    state = pipeline.Run(config, folder, Store(config))
    state.record.params = _flatten(OmegaConf.to_container(composed, resolve=True))
    state.record.tags = tags
    status = "FAILED"
    try:
        pipeline.run(state)
        state.record.files += [pipeline.finish(state), folder / ".hydra"]
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        lines = _close(config, state, status)
    return state, lines


def _close(config: Config, state: Run, status: str) -> list[str]:
    """Record the run. Of a run that failed, that it cannot be recorded is said beside the reason, not in its place."""
    try:
        return config.tracking.close(state.record, status)
    except ReconError as error:
        if status == "FINISHED":
            raise
        log.warning("%s", error.problem)
        return []


def run_name(config: Config) -> str:
    """Name of a run for people: what was asked of it."""
    return (
        f"{config.model.name} {config.depth.name} {config.quant_mode.name} {config.precision.name} {config.engine.name}"
    )


def _tags(settings: Any) -> dict[str, str]:
    from recon.doctor import machine_tags

    tags = machine_tags()
    if settings.mode == RunMode.MULTIRUN:
        tags["sweep"] = Path(settings.sweep.dir).name
    return tags


def _write_result(
    folder: Path, composed: DictConfig, status: str, error: Exception | None, metrics: dict[str, Any] | None = None
) -> None:
    """`result.json`: the row that the sweep's table is made of."""
    from recon.benchmark.leaderboard import AXES, engine_rows

    overrides = list(HydraConfig.get().overrides.task)
    choices = HydraConfig.get().runtime.choices
    row = {
        "overrides": overrides,
        "choices": {axis: choices.get(axis) for axis in AXES},
        "engines": engine_rows(metrics or {}),
        "status": status,
        "reason": str(error) if error else "",
        "summary": _summary(metrics or {}),
    }
    write_atomic(folder / "result.json", json.dumps(row, indent=1) + "\n")
    if error:
        _say(f"{status}: {' '.join(overrides)}: {error}")


def _summary(metrics: dict[str, Any]) -> dict[str, float]:
    """The few numbers that make rows of a sweep comparable."""
    found: dict[str, float] = {}
    for name, row in metrics.get("benchmark", {}).items():
        found[f"{name} p50 ms"] = row["summary"]["latency_ms_p50"]
    evaluation = metrics.get("evaluation", {})
    found |= {key: evaluation[key] for key in ("depth_absrel", "depth_delta1", "map_f_score") if key in evaluation}
    if "frames_seen" in metrics:
        found["frames fused"] = metrics["frames_fused"]
    return found


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _explained(error: Exception) -> ReconError | None:
    """What a user can mend, whoever noticed it; None for a bug."""
    known = isinstance(error, (ReconError, HydraException, OmegaConfBaseException)) or _about_output(error)
    if not known and not str(error).startswith("Config group override"):
        return None
    from recon.mistakes import explain

    return explain(error, sys.argv[1:])


def _about_output(error: Exception) -> bool:
    """Whether it says that the output folder cannot be written or made: the first to notice may be Hydra."""
    codes = (1, 13, 17, 20, 28, 30, 36)  # not permitted (twice), in the way (twice), full, read-only, too long a name
    if not isinstance(error, OSError) or error.filename is None:
        return False
    return error.errno in codes or traceback.extract_tb(error.__traceback__)[-1].name in ("mkdir", "makedirs")


def _table(title: str, rows: list[dict[str, str]]) -> None:
    from recon.report import print_table

    print_table(title, rows)


def _say(line: str) -> None:
    from recon.console import console

    console().print(line, markup=False)
