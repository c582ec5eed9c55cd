"""Reconstruction: a bootstrap that is cached, a map, a stream, and the files that a run leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.artifact import Artifact, atomic_file, content_key, obtain
from recon.config import Config
from recon.console import busy, track
from recon.errors import ReconError
from recon.geometry.bootstrap_file import read_bootstrap, write_bootstrap
from recon.geometry.ply import write_mesh, write_points
from recon.geometry.preprocess import PixelPath, Placement
from recon.geometry.scale import metric
from recon.geometry.views import Bootstrap, Scale, View
from recon.keyframes import KeyframeWriter, camera_of
from recon.live.boardscores import BoardScores, read_board
from recon.live.calibration_file import Provenance, read_calibration, write_calibration
from recon.live.framelog import FrameLog
from recon.live.losses import Losses
from recon.live.scores import DepthScores
from recon.live.stopping import stop_on_signals
from recon.live.stream import FrameResult, Streamer
from recon.live.warmup import warm_up
from recon.sources.state import totals
from recon.store import Store
from recon.viewer import open_viewer

if TYPE_CHECKING:
    from recon.engines import Session
    from recon.fusion import Map
    from recon.live.pool import DepthAnythingPool

log = logging.getLogger(__name__)
BOOTSTRAP_VERSION = "bootstrap.2"


@dataclass
class Reconstruction:
    """What the reconstruct stage found out. `fused` is the live map, for evaluation in the same process."""

    scale: Scale
    depth_type: str
    map_type: str
    bootstrap: Bootstrap
    bootstrap_reused: bool
    fused: Map
    depth_scores: DepthScores
    log: FrameLog
    provenance: Provenance
    board: BoardScores | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    map_stats: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    pixels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Way of the pixels of a camera's frames into every network, as `PixelPath` records it."""

    @property
    def frames(self) -> list[dict[str, Any]]:
        """Rows of the frames, the first ones of a long run; frames.jsonl has all."""
        found: list[dict[str, Any]] = self.log.metrics()["frames"]
        return found

    def metrics(self) -> dict[str, Any]:
        """The part of metrics.json that this stage answers for."""
        return {
            "scale": asdict(self.scale),
            "depth_type": self.depth_type,
            "map_type": self.map_type,
            "map": self.map_stats,
            "bootstrap": {
                "cameras": len(self.bootstrap.views),
                "reused": self.bootstrap_reused,
                **self.bootstrap.notes,
            },
            "seconds": self.seconds,
            "stream": self.stream,
            "source": self.source,
            "files_lost": self.losses.told,
            "pixels": self.pixels,
            **self.log.metrics(),
        }

    def summary(self) -> dict[str, float]:
        """Single values for the tracker."""
        seen = max(self.log.seen, 1)
        values = {"align/accepted_share": self.log.accepted / seen, "recon/frames": float(self.log.seen)}
        values |= {f"recon/{name}": value for name, value in self.map_stats.items()}
        times = self.log.metrics()["ms"]
        values |= {f"stream/{part}_ms_{name}": value for part, found in times.items() for name, value in found.items()}
        values |= {f"source/{name}": value for name, value in totals(self.source).items()}
        return values | {f"time/{name}_s": value for name, value in self.seconds.items()}

    def series(self) -> dict[str, list[float]]:
        """Values by frame for the tracker, one series per camera and quantity."""
        return self.log.series()


def bootstrap_key(store: Store) -> str:
    """Key of the cached bootstrap: the model, the exact frames, and the engine that ran it."""
    config = store.config
    network = store.networks().get("model")
    engine = store.engine_key(network) if network else None
    depth = store.networks().get("depth") if config.depth.type == "metric" else None
    unit = store.engine_key(depth) if depth else None
    scale = [config.source.scale(), config.source.baseline(), config.scale, unit]
    return content_key([BOOTSTRAP_VERSION, config.model.settings(), config.source.content_key(), scale, engine])


def bootstrap_path(store: Store, key: str) -> Path:
    """Where the cached bootstrap with this key lies."""
    return store.root / "cache" / "bootstrap" / f"{store.config.model.name}-{key[:12]}.npz"


def bootstrap_artifact(store: Store, session: Session | None, pool: DepthAnythingPool) -> tuple[Artifact, Bootstrap]:
    """The bootstrap of this configuration, from the cache where nothing that it depends on has changed.

    pool: depth workers, used where a metric depth model gives the unit.
    """
    config, key = store.config, bootstrap_key(store)
    path = bootstrap_path(store, key)

    def make(folder: Path) -> dict[str, Any]:
        views = config.source.bootstrap()
        with busy(f"Bootstrapping from {len(views)} cameras with {config.model.name}"):
            found = config.model.bootstrap(views, config.source.scale(), session)
            learned = partial(_with_depth, views, pool) if config.depth.type == "metric" else None
            found = metric(found, views, config.source.baseline(), config.scale, learned)
        write_bootstrap(folder / path.name, found)
        return {"cameras": [view.camera for view in views], "scale": asdict(found.scale), **found.notes}

    fresh = config.fresh_bootstrap or "reconstruct" in config.force
    requested = {"model": config.model.settings(), "source": config.source.settings()}
    artifact = obtain(path, "bootstrap", key, make, requested=requested, force=fresh)
    return artifact, read_bootstrap(path)


def _with_depth(views: list[View], pool: DepthAnythingPool) -> list[View]:
    return [replace(view, depth=result.depth) for view, result in zip(views, pool.map(views), strict=True)]


def reconstruct_scene(
    config: Config,
    found: tuple[Artifact, Bootstrap],
    pool: DepthAnythingPool,
    again: Callable[[list[View]], Bootstrap],
    folder: Path,
) -> Reconstruction:
    """Fuse the bootstrap, stream the rest, write the maps and the calibration into the run folder.

    pool: depth workers. again: bootstraps anew from posed views, used only with stream.rebootstrap_after.
    """
    artifact, bootstrap = found
    provenance = _provenance(config, bootstrap, artifact.key)
    starts = _starts(config, bootstrap, provenance)
    start = time.perf_counter()
    fused, anchor = (_bootstrap_map(config, bootstrap) for _ in range(2))
    with FrameLog(folder / "frames.jsonl") as frames:
        result = Reconstruction(
            bootstrap.scale,
            config.depth.type,
            config.fusion.name,
            bootstrap,
            artifact.reused,
            fused,
            DepthScores(bootstrap),
            frames,
            provenance,
        )
        result.seconds["bootstrap_fuse"] = time.perf_counter() - start
        _write_points(result, folder / "bootstrap_map.ply")
        streamer = Streamer(
            config.source, config.depth, pool, bootstrap, fused, anchor, config.align, config.stream, starts=starts
        )
        streamer.again = lambda views: _bootstrap_again(config, streamer, views, again)
        _stream(config, streamer, result, folder)
        result.source = config.source.report()
        with busy("Writing the map"):
            _write_outputs(config, streamer, result, folder)
    return result


def _bootstrap_map(config: Config, bootstrap: Bootstrap) -> Map:
    found = config.fusion.create()
    found.integrate_all(bootstrap.views, 0)
    return found


def _bootstrap_again(
    config: Config, streamer: Streamer, views: list[View], again: Callable[[list[View]], Bootstrap]
) -> tuple[Bootstrap, Map] | None:
    """A new anchor in the frame of the map: the cameras' present poses tie the new bootstrap to it.

    None, with a warning, where the network's cameras do not fit those poses: then the cameras themselves have moved.
    """
    old = streamer.bootstrap
    known = [
        replace(view, K=old.K_source[view.camera], T_world_cam=old.T_world_cam[view.camera], pose_trusted=False)
        if view.T_world_cam is None
        else view
        for view in views
        if view.T_world_cam is not None or view.camera in old.T_world_cam
    ]
    try:
        found = again(known)
    except ReconError as error:
        log.warning("bootstrapping anew failed: %s", error)
        return None
    if not found.in_source_frame:
        log.warning("bootstrapping anew failed: the cameras no longer stand where the map has them")
        return None
    found = replace(found, scale=old.scale, depth_type=old.depth_type, in_source_frame=old.in_source_frame)
    streamer.fused.integrate_all(found.views, streamer.batches)
    return found, _bootstrap_map(config, found)


def _stream(config: Config, streamer: Streamer, result: Reconstruction, folder: Path) -> None:
    keyframes = KeyframeWriter(folder, config.handover, result.bootstrap)
    if config.evaluate.board is not None:
        result.board = read_board(Path(config.evaluate.board), config.source.cameras())
    board, attempt = result.board, result.losses.attempt

    def observe(frame: FrameResult) -> None:
        attempt("keyframes", lambda: keyframes.offer(frame.view))
        if frame.view.camera not in result.pixels:
            result.pixels[frame.view.camera] = _pixels(config, frame.view)
        if config.viewer != "none":  # depth is copied from the device only where somebody looks at it
            viewer.frame(frame.view, frame.depth, frame.align.row())
        if board is not None and (camera := camera_of(streamer.bootstrap, frame.view)) is not None:
            board.add(frame.view, frame.depth, *camera)
        result.log.add(frame)
        result.depth_scores.add(frame)
        if config.save_per_frame_depth and frame.depth is not None:
            path = attempt("depth of frames", lambda: _write_depth(frame, result.scale, folder))
            result.files += [path] if path is not None else []

    with (
        stop_on_signals() as stop,
        open_viewer(config.viewer, folder, result.bootstrap, config.rerun) as viewer,
        closing(streamer.run(observe)) as batches,
    ):
        streamer.stop = stop
        with busy("Getting ready for the first frame"):
            result.seconds["warm_up"] = warm_up(streamer, config.fusion.create)
        start = time.perf_counter()
        for step in track(batches, "Streaming", len(config.source)):
            viewer.step(step, streamer.fused)
        seconds = result.seconds["stream"] = time.perf_counter() - start
    result.files += [*(attempt("index of keyframes", keyframes.close) or []), *viewer.files]
    if viewer.lost:
        result.losses.add(viewer.name, viewer.lost)
    result.stream = {
        **streamer.report(),
        "stopped_by": stop.by,
        "frames_per_s": result.log.seen / seconds if seconds else 0.0,
        "latency_budget_ms": config.stream.latency_budget_ms,
    }
    _tell_of_an_empty_stream(result)


def _tell_of_an_empty_stream(result: Reconstruction) -> None:
    """Where nothing was fused: the commonest reason, and what speaks against the bootstrap."""
    if result.log.seen and not result.log.accepted:
        reason, count = result.log.rejected.most_common(1)[0]
        doubt = result.bootstrap.notes.get("pose_confidence", "")
        log.warning(
            "no frame of the stream was fused, the map is that of the bootstrap; most often: %s (%d of %d)%s",
            reason, count, result.log.seen, f"; confidence in the bootstrap: {doubt}" if doubt else "",
        )  # fmt: skip


def _pixels(config: Config, view: View) -> dict[str, Any]:
    """Good for every frame of the camera: its images all have one size."""
    asis = Placement(view.size, view.size, (0, 0), view.size)
    placed = {"view": asis, "model": config.model.placement(view.size), "depth": config.depth.placement(view.size)}
    return {role: PixelPath(view.origin, found).record() for role, found in placed.items() if found is not None}


def _write_depth(frame: FrameResult, scale: Scale, folder: Path) -> Path:
    assert frame.depth is not None
    kind = "metric" if scale.unit == "m" else "relative"
    path = folder / f"depth_{kind}" / f"{frame.view.camera}_{frame.view.frame:06d}.npz"
    with atomic_file(path) as temporary:
        np.savez_compressed(temporary, depth=frame.depth, unit=scale.unit)
    return path


def _write_outputs(config: Config, streamer: Streamer, result: Reconstruction, folder: Path) -> None:
    """Rows of frames, `map_updated.ply`, `mesh.ply`, what only this map type has, and `calibration.json`."""
    if (rows := result.log.close()) is not None:
        result.files.append(rows)
    else:
        result.losses.told[result.log.path.name] = result.log.lost
    points = _write_points(result, folder / "map_updated.ply")
    result.map_stats = {**result.fused.stats(), "points": float(points)}
    mesh = result.fused.mesh()
    if mesh is not None:
        with atomic_file(folder / "mesh.ply") as temporary:
            write_mesh(temporary, mesh.vertices, mesh.triangles, mesh.colors)
        result.files.append(folder / "mesh.ply")
    result.files += result.fused.save(folder)
    states = {name: aligner.state() for name, aligner in streamer.aligners.items()}
    known = streamer.bootstrap.K_source
    write_calibration(folder / "calibration.json", result.provenance, states, streamer.sizes, known)
    result.files.append(folder / "calibration.json")


def _write_points(result: Reconstruction, path: Path) -> int:
    cloud = result.fused.points()
    if not len(cloud.points):
        raise ReconError(
            f"{path.name}: the map is empty, no depth within fusion.max_depth was fused",
            "raise fusion.max_depth, or check the depth and the poses of the source",
        )
    with atomic_file(path) as temporary:
        write_points(temporary, cloud.points, cloud.normals, cloud.colors)
    result.files.append(path)
    return len(cloud.points)


def _provenance(config: Config, bootstrap: Bootstrap, key: str) -> Provenance:
    how = ("workers", "every", "batch")
    depth = {name: value for name, value in config.depth.settings().items() if name not in how}
    numbers = {"quant_mode": config.quant_mode.name, "precision": config.precision.name}
    return Provenance({**depth, **numbers}, config.depth.type, bootstrap.scale.unit, key)


def _starts(config: Config, bootstrap: Bootstrap, provenance: Provenance) -> dict[str, dict[str, Any]]:
    """Entries of the calibration to start from, by camera; empty where none is asked for."""
    if config.align.per_camera_calib is None:
        return {}
    path, cameras = Path(config.align.per_camera_calib), config.source.cameras()
    return read_calibration(path, provenance, cameras, bootstrap.K_source)
