"""Stage `depth`: the depth network over a source, without map and poses, shown as video beside its input.

`depth_video/<camera>.mp4` has input and coloured depth side by side, `depth_video/all.mp4` every camera at once. The
type of the depth is kept: disparity is shown as disparity, without inversion. Colours follow running percentiles.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.config import Config
from recon.console import track
from recon.depthvideo.keep import DepthFiles
from recon.depthvideo.recorder import Recorder
from recon.errors import ReconError
from recon.geometry.views import View
from recon.live.framelog import RowFile
from recon.live.stopping import stop_on_signals

if TYPE_CHECKING:
    from recon.live.pool import DepthAnythingPool, PoolResult

log = logging.getLogger(__name__)
FAILURES_IN_A_ROW = 20
"""So many frames in a row without depth end the run: the network is broken, not the frame."""


@dataclass
class DepthResult:
    """What the stage found out: one row per camera and frame in `log`; files written; the signal that ended it, if any.

    lost: frames without depth by reason. times_ms: of the network, for the others.
    """

    type: str
    log: RowFile
    lost: Counter[str] = field(default_factory=Counter)
    times_ms: array[float] = field(default_factory=lambda: array("f"))
    lost_in_a_row: int = 0
    why: str = ""
    """Of the last frame that was lost."""
    seconds: float = 0.0
    stopped: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Count one frame and write its row."""
        self.log.write(row)
        if row["lost"]:
            self.why = row["lost"]
            self.lost[self.why] += 1
            self.lost_in_a_row += 1
        else:
            self.times_ms.append(row["ms_depth"])
            self.lost_in_a_row = 0

    def metrics(self) -> dict[str, Any]:
        """The part of metrics.json that this stage answers for."""
        return {
            "depth_type": self.type,
            "frames_seen": self.log.seen,
            "frames_lost": dict(self.lost),
            "files_lost": {self.log.path.name: self.log.lost} if self.log.lost else {},
            "stopped_by": self.stopped,
            "source": self.source,
            "seconds": self.seconds,
            **{name.removeprefix("depth/"): value for name, value in self.summary().items()},
            **self.log.metrics(),
        }

    def summary(self) -> dict[str, float]:
        """Single values for the tracker: latency of the depth network per frame, frames per second of the stage."""
        found = {"depth/frames": float(len(self.times_ms))}
        if self.times_ms:
            found |= {f"depth/latency_ms_p{p}": float(np.percentile(self.times_ms, p)) for p in (50, 99)}
            found["depth/frames_per_s"] = len(self.times_ms) / max(self.seconds, 1e-9)
        return found

    def outcome(self) -> str:
        """One line for the table at the end."""
        lost = self.lost.total()
        rate = self.summary().get("depth/frames_per_s", 0.0)
        ended = f", stopped by {self.stopped}" if self.stopped else ""
        return f"{self.log.seen - lost} frames of {self.type}, {lost} lost, {rate:.1f} frames/s{ended}"


def depth_videos(config: Config, pool: DepthAnythingPool, folder: Path) -> DepthResult:
    """Run the depth network over the bootstrap frames and the stream of the source, and write the videos.

    A frame that the network fails on is shown without depth, counted and named. Ctrl-C and SIGTERM end the stage after
    the batch in hand and leave finished files: a live source has no other end.

    Raises:
        ReconError: the source gives no frame, the network fails on every frame, or the disk is full.
    """
    source = config.source
    cameras = source.cameras()
    start = time.perf_counter()
    with ExitStack() as stack:
        result = DepthResult(config.depth.type, stack.enter_context(RowFile(folder / "depth_frames.jsonl")))
        recorder = stack.enter_context(Recorder(folder / "depth_video", cameras, config.depth.type, config.depth_video))
        keep = DepthFiles(folder / "depth_raw", config.depth.type, config.depth_video.save)
        stop = stack.enter_context(stop_on_signals())
        total = (len(source) + 1 + config.depth.every - 1) // config.depth.every if len(source) else 0
        for views, predictions in track(_predicted(_batches(config), pool, stop), "Depth", total):
            _one_batch(views, predictions, recorder, keep, result)
        _require_depth(result)
        rows = result.log.close()
        result.files = [*recorder.close(), *keep.close(), *([rows] if rows is not None else [])]
    result.stopped, result.source = stop.by, source.report()
    result.seconds = time.perf_counter() - start
    return result


def _batches(config: Config) -> Iterator[list[View]]:
    everything = chain([config.source.bootstrap()], config.source.batches())
    return (views for step, views in enumerate(everything) if step % config.depth.every == 0)


def _predicted(
    batches: Iterator[list[View]], pool: DepthAnythingPool, stop: Event
) -> Iterator[tuple[list[View], list[PoolResult]]]:
    """Batches with their depth. The next one is in the network while this one is drawn and encoded."""
    waiting: tuple[list[View], list[Future[PoolResult]]] | None = None
    for views in batches:
        sent = views, pool.submit_all(views)
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]
        waiting = sent
        if stop.is_set():
            break
    if waiting is not None:
        yield waiting[0], [future.result() for future in waiting[1]]


def _one_batch(
    views: list[View], predictions: list[PoolResult], recorder: Recorder, keep: DepthFiles, result: DepthResult
) -> None:
    shown = []
    for view, found in zip(views, predictions, strict=True):
        depth, why = found.depth, found.error
        if depth is not None and not np.isfinite(depth).any():
            depth, why = None, "no finite value"
        if why:
            log.warning("camera %s, frame %d: no depth: %s", view.camera, view.frame, why)
        span = recorder.draw(view, depth)
        if depth is not None:
            keep.add(view, depth)
        row = {"camera": view.camera, "frame": view.frame, "time_s": view.time_s, "ms_depth": round(found.ms, 3)}
        result.add({**row, "lost": why, **span})
        shown.append(view)
    recorder.show(shown)
    if result.lost_in_a_row >= FAILURES_IN_A_ROW:
        raise ReconError(
            f"the depth network failed on {result.lost_in_a_row} frames in a row, last with: {result.why}",
            "compare with engine=torch precision=fp32, or choose another depth=",
        )


def _require_depth(result: DepthResult) -> None:
    if not result.log.seen:
        raise ReconError(
            "the source gave no frame", "check source.views, source.frame_step and the files of the source"
        )
    if not result.times_ms:
        raise ReconError(
            f"no frame got depth; the last failed with: {result.why}",
            "compare with engine=torch precision=fp32, or choose another depth=",
        )


__all__ = ["DepthResult", "depth_videos"]
