"""The streaming loop: depth of every camera, aligned to the map as that camera sees it, fused where it is trusted.

    reader thread -> depth workers -> this thread: render the reference, align, fuse

The three overlap: while one batch is fused, the depth of the next is computed and the one after is read. Batches are
finished in order, and the map has one owner, so the result does not depend on how the threads were scheduled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.geometry.views import Array, Bootstrap, DepthImage, PosedDepth, View
from recon.live.align import Align, AlignResult, CameraAligner
from recon.live.calibration_file import require_size
from recon.live.movers import MoverMask
from recon.live.reader import Batch, Reader
from recon.live.reference import Reference

if TYPE_CHECKING:
    from recon.depth import Depth
    from recon.fusion import Map
    from recon.live.pool import DepthAnythingPool, PoolResult
    from recon.sources import Source


@dataclass
class StreamOptions:
    """How the live loop treats time."""

    ahead: int = 2
    """Batches that are read or have their depth computed ahead of the one that is fused."""
    latency_budget_ms: float = 0.0
    """From arrival to fused map. A live source's batch that is older before its depth starts is dropped and counted; a
    file's is only counted. 0 = no budget."""
    rebootstrap_after: int = 0
    """Bootstrap anew after so many time steps in a row in which most cameras failed the gates; 0 = never."""

    def check(self) -> None:
        """Raises ReconError for impossible values."""
        for name, least in (("ahead", 1), ("latency_budget_ms", 0), ("rebootstrap_after", 0)):
            if not getattr(self, name) >= least:
                default = type(self).__dataclass_fields__[name].default
                raise ReconError(
                    f"stream.{name}={getattr(self, name)}: must be at least {least}", f"the default is {default}"
                )


@dataclass(frozen=True)
class FrameResult:
    """One frame of one camera after the stream dealt with it.

    depth: [H,W] aligned, 0 = none; None when rejected. anchored: share of the reference that is the bootstrap's.
    moving: share of the image that was not fused because it moves; None where that was not judged. ms: time in each
    part; `read` and `latency` (arrival to fused) are those of the frame's batch.
    """

    view: View
    align: AlignResult
    depth: DepthImage | None
    anchored: float
    ms: dict[str, float]
    moving: float | None = None

    def row(self) -> dict[str, Any]:
        """The frame as it stands in metrics.json."""
        ms = {f"ms_{part}": round(value, 3) for part, value in self.ms.items()}
        who = {"camera": self.view.camera, "frame": self.view.frame}
        return {**who, **self.align.row(), "anchored": self.anchored, "moving": self.moving, **ms}


@dataclass
class Streamer:
    """Streams a source into a map: one aligner per camera; the map and the reference belong to the thread of `run`.

    again: bootstraps anew from the views of one batch, in the frame of the map; None when it could not.
    stop: set by a signal, ends the stream after the batch in hand. starts: calibration entries by camera.
    """

    source: Source
    depth: Depth
    pool: DepthAnythingPool
    bootstrap: Bootstrap
    fused: Map
    anchor: Map
    align: Align
    options: StreamOptions = field(default_factory=StreamOptions)
    again: Callable[[list[View]], tuple[Bootstrap, Map] | None] | None = None
    stop: Event = field(default_factory=Event)
    starts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    aligners: dict[str, CameraAligner] = field(init=False)
    batches: int = field(default=0, init=False)
    dropped_late: int = field(default=0, init=False)
    most_ahead: int = field(default=0, init=False)
    rebootstraps: list[dict[str, Any]] = field(default_factory=list, init=False)
    _poor_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._anchor_to(self.bootstrap, self.anchor)

    def run(self, observe: Callable[[FrameResult], None]) -> Iterator[int]:
        """Process all batches; `observe` sees every frame result. Yields the time step after each batch."""
        flying: deque[tuple[Batch, list[Future[PoolResult]]]] = deque()
        with Reader(self.source.batches, self.options.ahead) as reader:
            while not self.stop.is_set():
                while len(flying) < self.options.ahead and (batch := reader.get(wait=not flying)) is not None:
                    flying.append((batch, self._submit(batch)))
                if not flying:
                    break
                self.most_ahead = max(self.most_ahead, len(flying))
                batch, futures = flying.popleft()
                self._finish(batch, futures, observe)
                yield batch.step

    def report(self) -> dict[str, Any]:
        """What the loop itself has to say, as plain data."""
        return {
            "batches": self.batches,
            "dropped_late": self.dropped_late,
            "most_batches_ahead": self.most_ahead,
            "most_images_waiting": self.pool.most_waiting,
            "depth_failures": self.pool.failures,
            "rebootstraps": self.rebootstraps,
        }

    def _submit(self, batch: Batch) -> list[Future[PoolResult]]:
        """Hand a batch to the depth workers; nothing where its turn is not this step, or where it came too late."""
        if (batch.step - 1) % self.depth.every:
            return []
        budget = self.options.latency_budget_ms
        if self.source.live and budget and batch.age_ms() > budget:
            self.dropped_late += len(batch.views)
            return []
        return [self.pool.submit(view) for view in batch.views]

    def _finish(self, batch: Batch, futures: list[Future[PoolResult]], observe: Callable[[FrameResult], None]) -> None:
        """Align and fuse a batch in camera order."""
        self.batches += 1
        if not futures:
            return
        results = [
            self._align_and_fuse(batch, view, future.result())
            for view, future in zip(batch.views, futures, strict=True)
        ]
        for result in results:
            observe(result)
        self._watch_drift(batch, results)

    def _align_and_fuse(self, batch: Batch, view: View, predicted: PoolResult) -> FrameResult:
        aligner, ms = self.aligners[view.camera], {"read": batch.read_ms, "wait": predicted.waited_ms}
        self._require_size(view)
        if predicted.depth is None:
            failed = aligner.skip(f"no depth: {predicted.error}")
            return FrameResult(view, failed, None, 0.0, {**ms, "depth": predicted.ms, "latency": batch.age_ms()})
        K, pose = self._camera(view)
        clock = [time.perf_counter()]
        rendered, anchored = self.reference.render(view.camera, K, pose, view.size)
        clock.append(time.perf_counter())
        result = aligner.update(predicted.depth, rendered, view.frame)
        depth, still, moving = None, None, None
        if result.accepted:
            residual = float(result.diagnostics.get("resid_p90_pct") or 0.0) / 100
            depth = aligner.to_depth(predicted.depth)
            still, moving = self.movers[view.camera].apply(depth, rendered, pose, residual)
        clock.append(time.perf_counter())
        if still is not None:
            self.fused.integrate(PosedDepth(view.camera, view.image, still, K, pose), batch.step)
        clock.append(time.perf_counter())
        render, align, fuse = ((after - before) * 1e3 for before, after in pairwise(clock))
        ms |= {"depth": predicted.ms, "render": render, "align": align, "fuse": fuse, "latency": batch.age_ms()}
        return FrameResult(view, result, depth, anchored, ms, moving)

    def _require_size(self, view: View) -> None:
        """Refuse images of another size than the calibration's, which its pair does not fit."""
        if self.sizes.setdefault(view.camera, view.size) == view.size and view.camera in self.starts:
            require_size(str(self.align.per_camera_calib), view.camera, self.starts[view.camera], view.size)

    def _camera(self, view: View) -> tuple[Array, Array]:
        """Intrinsics and pose of a frame: the source's own where the map is in its frame, else the bootstrap's."""
        K = view.K if view.K is not None else self.bootstrap.K_source[view.camera]
        if self.bootstrap.in_source_frame and view.T_world_cam is not None:
            return K, view.T_world_cam
        if view.camera not in self.bootstrap.T_world_cam:
            raise ReconError(
                f"camera {view.camera!r} has no pose: it was not part of the bootstrap",
                "give source.poses, or bootstrap with it",
            )
        return K, self.bootstrap.T_world_cam[view.camera]

    def _watch_drift(self, batch: Batch, results: list[FrameResult]) -> None:
        """Bootstrap anew once most cameras have failed the gates for long enough."""
        poor = 2 * sum(result.align.accepted for result in results) < len(results)
        self._poor_steps = self._poor_steps + 1 if poor else 0
        if self.again is None or not 0 < self.options.rebootstrap_after <= self._poor_steps:
            return
        self._poor_steps = 0
        self.starts = {}  # found for a map that no longer fits
        found = self.again(batch.views)
        self.rebootstraps.append({"step": batch.step, "accepted": found is not None})
        if found is not None:
            self._anchor_to(*found)

    def _anchor_to(self, bootstrap: Bootstrap, anchor: Map) -> None:
        """Align to `anchor` from now on, with fresh aligners."""
        self.bootstrap, self.anchor = bootstrap, anchor
        self.reference = Reference(anchor, self.fused, self.align.render_width)
        metric = bootstrap.scale.unit == "m"
        self.aligners = {
            camera: self.align.aligner(camera, self.depth.type, metric, self.starts.get(camera))
            for camera in self.source.cameras()
        }
        self.movers = {
            camera: MoverMask(self.align.moving_frames, self.align.moving_tolerance) for camera in self.source.cameras()
        }
