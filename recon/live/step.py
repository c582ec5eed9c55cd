"""The work on one batch, from depth to the map: here on the host, view by view; `recon.live.device` has the other.

A step is made for one anchor map and is the only one to touch the live map.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from recon.errors import ReconError
from recon.geometry.views import Array, PosedDepth, View
from recon.live.align import Align, CameraAligner
from recon.live.frame import FrameResult
from recon.live.movers import MoverMask, residual
from recon.live.reader import Batch
from recon.live.reference import Reference

if TYPE_CHECKING:
    from recon.fusion import Map
    from recon.live.pool import DepthAnythingPool, PoolResult

Flight = list[Any]
"""What `submit` leaves for `finish`; empty where nothing was handed in."""


@dataclass
class Step(ABC):
    """camera: intrinsics and pose of a view in the map's frame. aligners: by camera, in order."""

    pool: DepthAnythingPool
    fused: Map
    anchor: Map
    options: Align
    aligners: dict[str, CameraAligner]
    camera: Callable[[View], tuple[Array, Array]]

    @abstractmethod
    def submit(self, batch: Batch) -> Flight:
        """Hand the images of a batch to the depth workers."""

    @abstractmethod
    def finish(self, batch: Batch, flight: Flight) -> list[FrameResult]:
        """Align and fuse a batch in camera order, once its depth is there."""

    def rehearsal(self, scratch: Map) -> Self:
        """The same work on another map and on copies of the aligners, with open gates: every batch goes all the way.

        What depends on no frame is this step's own, to be found there by its first batch.
        """
        options = replace(self.options, min_coverage=0.0, min_span=0.0, min_inlier=0.0, max_far=1.0)
        aligners = {camera: replace(aligner, options=options) for camera, aligner in self.aligners.items()}
        return replace(self, fused=scratch, options=options, aligners=aligners)


def step_for(
    pool: DepthAnythingPool,
    fused: Map,
    anchor: Map,
    options: Align,
    aligners: dict[str, CameraAligner],
    camera: Callable[[View], tuple[Array, Array]],
    graphs: bool = True,
) -> Step:
    """The step of the map's device. graphs: on CUDA, replay what can be replayed as a CUDA graph.

    Raises:
        ReconError: the depth engine runs on another device than the map.
    """
    if fused.device is None:
        return HostStep(pool, fused, anchor, options, aligners, camera)
    from recon.live.device import DeviceStep, same_device

    if pool.device is not None and not same_device(pool.device, fused.device):
        raise ReconError(
            f"the map is on {fused.device} (fusion.device), and the depth engine runs on {pool.device}",
            f"run both on {fused.device} (engine.device, engine.provider or engine=tensorrt), or set fusion.device=cpu",
        )
    return DeviceStep(pool, fused, anchor, options, aligners, camera, graphs)


@dataclass
class HostStep(Step):
    """View by view in NumPy, for maps on the host."""

    reference: Reference = field(init=False)
    movers: dict[str, MoverMask] = field(init=False)

    def __post_init__(self) -> None:
        o = self.options
        self.reference = Reference(self.anchor, self.fused, o.render_width)
        self.movers = {camera: MoverMask(o.moving_frames, o.moving_tolerance) for camera in self.aligners}

    def rehearsal(self, scratch: Map) -> Self:
        found = super().rehearsal(scratch)
        found.reference = self.reference
        return found

    def submit(self, batch: Batch) -> list[Future[PoolResult]]:
        return self.pool.submit_all(batch.views)

    def finish(self, batch: Batch, flight: list[Future[PoolResult]]) -> list[FrameResult]:
        return [self._one(batch, view, future.result()) for view, future in zip(batch.views, flight, strict=True)]

    def _one(self, batch: Batch, view: View, predicted: PoolResult) -> FrameResult:
        aligner, ms = self.aligners[view.camera], {"read": batch.read_ms, "wait": predicted.waited_ms}
        if predicted.depth is None:
            failed = aligner.skip(f"no depth: {predicted.error}")
            return FrameResult(view, failed, None, 0.0, {**ms, "depth": predicted.ms, "latency": batch.age_ms()})
        K, pose = self.camera(view)
        clock = [time.perf_counter()]
        rendered, known, anchored = self.reference.render(view.camera, K, pose, view.size)
        clock.append(time.perf_counter())
        result = aligner.update(predicted.depth, rendered, view.frame)
        depth, still, moving = None, None, None
        if result.accepted:
            depth = aligner.to_depth(predicted.depth)
            error = residual(result.diagnostics)
            still, moving = self.movers[view.camera].apply(depth, rendered, pose, error, known)
        clock.append(time.perf_counter())
        if still is not None:
            self.fused.integrate(PosedDepth(view.camera, view.image, still, K, pose), batch.step)
        clock.append(time.perf_counter())
        render, align, fuse = ((after - before) * 1e3 for before, after in pairwise(clock))
        ms |= {"depth": predicted.ms, "render": render, "align": align, "fuse": fuse, "latency": batch.age_ms()}
        return FrameResult(view, result, depth, anchored, ms, moving)
