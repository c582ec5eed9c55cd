"""The streaming loop: depth of every camera, aligned to the map as that camera sees it, fused where it is trusted.

    reader thread -> depth workers -> this thread: render the reference, align, fuse (`recon.live.step`)

The three overlap: while one batch is fused, the depth of the next is computed and the one after is read. Batches are
finished in order, and the map has one owner, so the result does not depend on how the threads were scheduled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.geometry.views import Array, Bootstrap, View
from recon.live.align import Align, CameraAligner
from recon.live.calibration_file import require_size
from recon.live.frame import FrameResult
from recon.live.reader import Batch, Reader
from recon.live.step import Flight, Step, step_for

if TYPE_CHECKING:
    from recon.depth import Depth
    from recon.fusion import Map
    from recon.live.pool import DepthAnythingPool
    from recon.sources import Source

__all__ = ["FrameResult", "StreamOptions", "Streamer"]


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

    cuda_graph: bool = True
    """With the map on CUDA: replay the fits of a batch as one CUDA graph, instead of a thousand launches."""

    def check(self) -> None:
        """Raises ReconError for impossible values."""
        for name, least in (("ahead", 1), ("latency_budget_ms", 0), ("rebootstrap_after", 0)):
            if not getattr(self, name) >= least:
                default = type(self).__dataclass_fields__[name].default
                raise ReconError(
                    f"stream.{name}={getattr(self, name)}: must be at least {least}", f"the default is {default}"
                )


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
    step: Step = field(init=False)
    batches: int = field(default=0, init=False)
    dropped_late: int = field(default=0, init=False)
    most_ahead: int = field(default=0, init=False)
    rebootstraps: list[dict[str, Any]] = field(default_factory=list, init=False)
    _poor_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._anchor_to(self.bootstrap, self.anchor)

    def run(self, observe: Callable[[FrameResult], None]) -> Generator[int, None, None]:
        """Process all batches; `observe` sees every frame result. Yields the time step after each batch.

        Reading ends with the generator: close it where it may not come to its end.
        """
        flying: deque[tuple[Batch, Flight]] = deque()
        with Reader(self.source.batches, self.options.ahead) as reader:
            while not self.stop.is_set():
                while len(flying) < self.options.ahead and (batch := reader.get(wait=not flying)) is not None:
                    flying.append((batch, self._submit(batch)))
                if not flying:
                    break
                self.most_ahead = max(self.most_ahead, len(flying))
                batch, flight = flying.popleft()
                self._finish(batch, flight, observe)
                yield batch.step

    def report(self) -> dict[str, Any]:
        """What the loop itself has to say, as plain data."""
        return {
            "batches": self.batches,
            "dropped_late": self.dropped_late,
            "most_batches_ahead": self.most_ahead,
            "most_images_waiting": self.pool.most_waiting,
            "depth_failures": self.pool.failures,
            "depth_batches_retried": self.pool.retried,
            "rebootstraps": self.rebootstraps,
        }

    def _submit(self, batch: Batch) -> Flight:
        """Hand a batch to the depth workers; nothing where its turn is not this step, or where it came too late."""
        if (batch.step - 1) % self.depth.every:
            return []
        budget = self.options.latency_budget_ms
        if self.source.live and budget and batch.age_ms() > budget:
            self.dropped_late += len(batch.views)
            return []
        return self.step.submit(batch)

    def _finish(self, batch: Batch, flight: Flight, observe: Callable[[FrameResult], None]) -> None:
        """Align and fuse a batch in camera order."""
        self.batches += 1
        if not flight:
            return
        for view in batch.views:
            self._require_size(view)
        results = self.step.finish(batch, flight)
        for result in results:
            observe(result)
        self._watch_drift(batch, results)

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
        metric = bootstrap.scale.unit == "m"
        self.aligners = {
            camera: self.align.aligner(camera, self.depth.type, metric, self.starts.get(camera))
            for camera in self.source.cameras()
        }
        graphs = self.options.cuda_graph
        self.step = step_for(self.pool, self.fused, anchor, self.align, self.aligners, self._camera, graphs)
