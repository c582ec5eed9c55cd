"""The stages, as plain functions in reading order. They see neither Hydra nor a tracker.

    export -> calibrate -> sensitivity -> build -> benchmark -> depth -> reconstruct -> handover -> evaluate -> report

`run` calls those that were asked for. Each leaves an artifact or a file in the run folder and adds to the `Record`.
What a stage needs from an earlier one it obtains from the artifact store, so any single stage can be asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from recon.accuracy import figures
from recon.artifact import seal, write_atomic
from recon.config import STAGES, Config
from recon.errors import ReconError
from recon.live.pool import DepthAnythingPool
from recon.preflight import preflight
from recon.reconstruct import Reconstruction, bootstrap_artifact, reconstruct_scene
from recon.report import write_report
from recon.store import Store, built, calibrated, certified, exported
from recon.tracking import Record


@dataclass
class StageRow:
    """One line of the table that a person sees at the end."""

    stage: str
    outcome: str
    seconds: float


@dataclass
class Run:
    """What the stages share: the configuration, the run folder, and what has been found so far."""

    config: Config
    folder: Path
    store: Store
    rows: list[StageRow] = field(default_factory=list)
    record: Record = field(default_factory=Record)
    metrics: dict[str, Any] = field(default_factory=lambda: {"schema_version": 1})
    reconstruction: Reconstruction | None = None


def run(state: Run) -> None:
    """Run the stages asked for, in order; what they find is in `state` even when a later one fails.

    Raises:
        ReconError: what a user can mend; artifacts finished before it are kept.
    """
    config = state.config
    preflight(config)
    for name in STAGES:
        if name in config.stages:
            start = time.perf_counter()
            outcome = STAGE_FUNCTIONS[name](state)
            state.rows.append(StageRow(name, outcome, time.perf_counter() - start))


def finish(run: Run) -> Path:
    """Write metrics.json, then the manifest of the run folder: its presence means that the run is complete."""
    path = run.folder / "metrics.json"
    run.metrics["stages"] = [asdict(row) for row in run.rows]
    run.metrics["from_source"] = run.store.from_source
    write_atomic(path, json.dumps(run.metrics, indent=1, default=float) + "\n")
    seal(run.folder, "run", [path, *run.record.files])
    return path


def export(run: Run) -> str:
    """Networks to ONNX."""
    if not run.store.exports:
        return f"not needed: engine={run.config.engine.name} takes the torch module; stages=[export] writes it"
    outcomes = []
    for network in run.store.networks().values():
        artifact = exported(run.store, network)
        outcomes.append(f"{artifact.path.name} {'reused' if artifact.reused else 'exported'}")
        run.metrics.setdefault("onnx", {})[network.name] = artifact.manifest.facts
    return _joined(outcomes, run)


def calibrate(run: Run) -> str:
    """Ranges of inputs and values over real frames, for INT8, FP8 and FP16."""
    if not run.store.needs_calibration:
        return f"not needed: precision={run.config.precision.name}, quant_mode={run.config.quant_mode.name}"
    outcomes = []
    for network in run.store.networks().values():
        artifact = calibrated(run.store, network)
        outcomes.append(f"{artifact.path.name} {'reused' if artifact.reused else 'calibrated'}")
        run.metrics.setdefault("calibration", {})[network.name] = artifact.manifest.facts
    return _joined(outcomes, run)


def sensitivity(run: Run) -> str:
    """Blocks ranked by the error that quantising them causes, and the list of those to keep."""
    from recon.sensitivity import analyse, draw, write_keep_list

    outcomes = []
    for network in run.store.networks().values():
        found = analyse(run.store, network)
        keep, plot = run.folder / f"keep_{network.name}.json", run.folder / f"sensitivity_{network.name}.png"
        write_keep_list(found, run.store, keep)
        draw(found).savefig(plot, dpi=150)
        run.record.files += [keep, plot]
        run.record.tables[f"sensitivity_{network.name}"] = found.rows()
        run.metrics.setdefault("sensitivity", {})[network.name] = found.rows()
        outcomes.append(f"{keep.name}: {found.verdict(run.config.sensitivity.budget)}")
    return _joined(outcomes, run)


def build(run: Run) -> str:
    """ONNX to engines, each compared with the FP32 torch module."""
    if not run.config.engine.builds:
        return _looked_into(run)
    outcomes = []
    for network in run.store.networks().values():
        artifact = built(run.store, network)
        facts = artifact.manifest.facts
        certificate = facts["certificate"]
        how = "reused" if artifact.reused else "built"
        outcomes.append(f"{artifact.path.name} {how}, {certificate['verdict']}")
        run.metrics.setdefault("engines", {})[network.name] = {"facts": facts, "effective": artifact.manifest.effective}
        run.record.metrics[f"engine/{network.name}_size_mb"] = facts.get("bytes", artifact.path.stat().st_size) / 1e6
        run.record.metrics[f"certificate/{network.name}_share"] = certificate["share"]
        accuracy = figures(facts["accuracy"])
        run.record.metrics |= {f"accuracy/{network.name}_{key}": value for key, value in accuracy.items()}
        run.record.tags |= {f"verdict/{network.name}": f"{certificate['verdict']}: {certificate['sentence']}"[:500]}
    return _joined(outcomes, run)


def _looked_into(run: Run) -> str:
    """Certificates of an engine that builds no file; the FP32 module needs none, others are compared with it."""
    how = f"engine={run.config.engine.name} runs the torch module itself"
    if run.store.plain:
        return f"not needed: {how}, in FP32; no certificate, it is what others are compared with"
    outcomes = []
    for network in run.store.networks().values():
        certificate = certified(run.store, network)
        effective = {"engine": run.config.engine.settings(), "verdict": certificate["verdict"]}
        facts = {"certificate": certificate, "accuracy": {}}
        run.metrics.setdefault("engines", {})[network.name] = {"facts": facts, "effective": effective}
        run.record.metrics[f"certificate/{network.name}_share"] = certificate["share"]
        run.record.tags |= {f"verdict/{network.name}": f"{certificate['verdict']}: {certificate['sentence']}"[:500]}
        outcomes.append(f"{network.name} {certificate['verdict']}: {certificate['sentence']}")
    return f"{how}: " + "; ".join(outcomes)


def benchmark(run: Run) -> str:
    """Latency, throughput, memory and error of engines under one timing contract."""
    from recon.benchmark.contract import as_plain
    from recon.benchmark.stage import benchmark_engines

    results = benchmark_engines(run.store)
    summaries = {name: result.summary() for name, result in results.items()}
    for name, result in results.items():
        run.metrics.setdefault("benchmark", {})[name] = as_plain(result)
        figures = {f"engine/{name}_{key}": value for key, value in summaries[name].items() if isinstance(value, float)}
        run.record.metrics |= figures
        run.record.series[f"engine/{name}_latency_ms"] = result.latency_samples_ms
    if results:
        run.record.tables["benchmark"] = [{"engine": name, **summary} for name, summary in summaries.items()]
    return _joined([f"{name} p50 {summary['latency_ms_p50']:.2f} ms" for name, summary in summaries.items()], run)


def depth(run: Run) -> str:
    """Depth alone: no map, no poses; videos of input and depth side by side."""
    from recon.depthvideo import depth_videos

    cameras = len(run.config.source.cameras())
    engine, option = partial(run.store.open, "depth"), run.config.depth
    with DepthAnythingPool(
        engine,
        workers=option.workers_for(cameras),
        waiting=2 * cameras,
        predict=option.predict,
        predict_several=option.predict_several,
    ) as pool:
        found = depth_videos(run.config, pool, run.folder)
    run.metrics["depth"] = found.metrics()
    run.record.metrics |= found.summary()
    run.record.files += found.files
    return found.outcome()


def reconstruct(run: Run) -> str:
    """Bootstrap a map from one view per camera, then stream, align and fuse the rest."""
    config, store = run.config, run.store
    workers = config.depth.workers_for(len(config.source.cameras()))
    with ExitStack() as stack:
        session = store.session("model", stack)
        depth = partial(store.open, "depth")
        # room for all batches in flight, so that handing one in never waits
        waiting = max(2, config.stream.ahead) * len(config.source.cameras())
        pool = stack.enter_context(
            DepthAnythingPool(
                depth,
                workers=workers,
                waiting=waiting,
                predict=config.depth.predict,
                predict_several=config.depth.predict_several,
                predict_all=config.depth.predict_all,
            )
        )
        found = bootstrap_artifact(store, session, pool)
        again = partial(config.model.bootstrap, scale=found[1].scale, session=session)
        result = reconstruct_scene(config, found, pool, again, run.folder)
    run.reconstruction = result
    run.metrics |= result.metrics()
    run.record.metrics |= result.summary()
    run.record.series |= result.series()
    run.record.files += result.files
    fused, seen, points = result.log.accepted, result.log.seen, result.map_stats["points"]
    stopped = f", stopped by {by}" if (by := result.stream["stopped_by"]) else ""
    return f"{fused} of {seen} frames fused, {points:.0f} points, unit {result.scale.unit}{stopped}"


def handover(run: Run) -> str:
    """COLMAP, nerfstudio and Gaussian files of this run or of an earlier one."""
    from recon.handover import hand_over
    from recon.keyframes import require_complete

    options = run.config.handover
    if options.run is not None:
        require_complete(Path(options.run))
    files, facts = hand_over(Path(options.run or run.folder), run.folder, options)
    run.metrics["handover"] = facts
    run.record.files += files
    return f"{facts['images']} images and {facts['points']} points to {run.folder.name}/handover, unit {facts['unit']}"


def evaluate(run: Run) -> str:
    """Depth and map against what the source knows to be true."""
    from recon.evaluate import evaluate_map, units

    if run.reconstruction is None:
        raise ReconError("stage evaluate judges the map of the same run", "add reconstruct to stages")
    found = evaluate_map(run.config, run.reconstruction)
    run.metrics["evaluation"], run.metrics["evaluation_units"] = found, units(found)
    flat = {f"quality/{key}": value for key, value in found.items() if isinstance(value, float)}
    run.record.metrics |= flat
    if not found:
        return "the source has no recorded depth and no reference surface: nothing to judge against"
    shown = ("depth_absrel", "depth_delta1", "map_f_score", "plane_rms", "pose_auc30")
    return ", ".join(f"{key} {found[key]:.3g}" for key in shown if key in found) or "see metrics.json"


def report(run: Run) -> str:
    """One self-contained HTML page."""
    files = write_report(run.config, run.metrics, run.reconstruction, run.folder)
    run.record.files += files
    return ", ".join(path.name for path in files)


STAGE_FUNCTIONS: dict[str, Callable[[Run], str]] = {
    "export": export,
    "calibrate": calibrate,
    "sensitivity": sensitivity,
    "build": build,
    "benchmark": benchmark,
    "depth": depth,
    "reconstruct": reconstruct,
    "handover": handover,
    "evaluate": evaluate,
    "report": report,
}


def _joined(outcomes: list[str], run: Run) -> str:
    if outcomes:
        return ", ".join(outcomes)
    return f"nothing to do: model={run.config.model.name} and depth={run.config.depth.name} have no network"
