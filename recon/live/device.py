"""The work on one batch where the map lies on a device: all cameras of it at once, and nothing large leaves the device.

The images go in once, in one copy, for the network and for the map's colours. Per batch the host waits for the figures
of the fits, twice while blocks are looked up, and for the end. Depth of a frame comes back only if somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from recon.geometry.cameras import scale_intrinsics
from recon.geometry.views import Array, PosedDepth, View
from recon.live.align import AlignResult
from recon.live.clock import Moments
from recon.live.device_align import DeviceAligner, to_depth, uploaded
from recon.live.device_movers import DeviceMovers
from recon.live.frame import FrameResult
from recon.live.movers import residual
from recon.live.reader import Batch
from recon.live.reference import ENOUGH, small_size
from recon.live.step import Step

if TYPE_CHECKING:
    from recon.fusion import Map
    from recon.live.pool import ImagesResult

Camera = tuple[Array, Array]


@dataclass(frozen=True)
class Run:
    """Neighbouring views of a batch that have one size: images [N,H,W,3] uint8 on the device, depth to come."""

    views: list[View]
    images: Tensor
    futures: list[Future[ImagesResult]]


@dataclass
class DeviceStep(Step):
    """See the module. Cameras of different sizes are worked on in runs of equal ones, in order.

    Differs from the host's step in what the live map adds to a reference (`DeviceReference`): that is the map before
    the batch, not with the cameras before it fused. graphs: replay the fits as one CUDA graph.
    """

    graphs: bool = True
    device: torch.device = field(init=False)
    reference: DeviceReference = field(init=False)
    aligner: DeviceAligner = field(init=False)
    movers: DeviceMovers = field(init=False)

    def __post_init__(self) -> None:
        assert self.fused.device is not None
        self.device = self.fused.device
        self.reference = DeviceReference(self.anchor, self.fused, self.options.render_width)
        self.aligner = DeviceAligner(next(iter(self.aligners.values())), self.graphs)
        self.movers = DeviceMovers(self.options.moving_frames, self.options.moving_tolerance)

    def rehearsal(self, scratch: Map) -> Self:
        found = super().rehearsal(scratch)
        found.reference, found.aligner = self.reference, self.aligner  # which holds the fits' recordings
        return found

    def submit(self, batch: Batch) -> list[Run]:
        runs = []
        with self._here():
            for _, equal in groupby(batch.views, key=lambda view: view.size):
                views = list(equal)
                images = _images(views, self.device)
                runs.append(Run(views, images, self.pool.submit_images(views, images)))
        return runs

    def finish(self, batch: Batch, flight: list[Run]) -> list[FrameResult]:
        with self._here():
            return [result for run in flight for result in self._run(batch, run)]

    def _here(self) -> AbstractContextManager[object]:
        """The map's device as the current one: graphs are replayed there."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def _run(self, batch: Batch, run: Run) -> list[FrameResult]:
        parts = [future.result() for future in run.futures]
        which = _owners(parts)
        ms = [{"read": batch.read_ms, "wait": parts[owner].waited_ms} for owner in which]
        good = [i for i, owner in enumerate(which) if parts[owner].depth is not None]
        results: dict[int, FrameResult] = {}
        work = _Work(self.device)
        if good:
            for part in parts:
                part.span.wait()
            prediction = torch.cat([part.depth for part in parts if part.depth is not None])
            if prediction.is_cuda:
                for part in parts:  # allocated on the worker's stream, and read on this one
                    if part.depth is not None:
                        part.depth.record_stream(torch.cuda.current_stream(self.device))
            self._fuse(batch, run, good, prediction, work)
        times = work.finish()
        latency = batch.age_ms()
        for part in parts:
            part.span.synchronise()
        depth_ms = [part.span.ms()[0] for part in parts]
        for i, owner in enumerate(which):
            ms[i] |= {"depth": depth_ms[owner], **(times if i in good else {}), "latency": latency}
        for row, i in enumerate(good):
            results[i] = work.result(row, run.views[i], ms[i])
        for i, owner in enumerate(which):
            if i not in results:
                failed = self.aligners[run.views[i].camera].skip(f"no depth: {parts[owner].error}")
                results[i] = FrameResult(run.views[i], failed, None, 0.0, ms[i])
        return [results[i] for i in range(len(run.views))]

    def _fuse(self, batch: Batch, run: Run, good: list[int], prediction: Tensor, work: _Work) -> None:
        """Reference, alignment, moving things and fusion of the views `good` that have a prediction."""
        views = [run.views[i] for i in good]
        cameras = [self.camera(view) for view in views]
        aligners = [self.aligners[view.camera] for view in views]
        work.moments.mark()
        reference, known, work.anchored = self.reference.render_all(views, cameras)
        work.moments.mark()
        work.aligned = self.aligner.update_all(aligners, prediction, reference, [view.frame for view in views])
        taken = [row for row, result in enumerate(work.aligned) if result.accepted]
        still: Tensor | None = None
        if taken:
            rows = uploaded(np.array([_used(work.aligned[row], self.movers.tolerance) for row in taken]), self.device)
            depth = to_depth(aligners[0], _chosen(prediction, taken), rows)
            names, poses = [views[row].camera for row in taken], [cameras[row][1] for row in taken]
            seen = _chosen(reference, taken), _chosen(known, taken)
            still, work.shares = self.movers.apply(names, depth, *seen, poses, rows[:, 2])
            work.taken, work.depth = taken, dict(zip(taken, depth, strict=True))
        work.moments.mark()
        if still is not None:
            posed = [_posed(views[row], run.images[good[row]], still[i], cameras[row]) for i, row in enumerate(taken)]
            self.fused.integrate_all(posed, batch.step)
        work.moments.mark()


class _Work:
    """What came of one run, gathered while its work is under way."""

    def __init__(self, device: torch.device) -> None:
        self.moments = Moments(device)
        self.anchored: list[float] = []
        self.aligned: list[AlignResult] = []
        self.taken: list[int] = []
        self.depth: dict[int, Tensor] = {}
        self.shares: Tensor | None = None
        self._moving: dict[int, float] = {}

    def finish(self) -> dict[str, float]:
        """Wait for the end; milliseconds of each part."""
        if self.shares is not None:
            shares = self.shares.cpu().tolist()
            self._moving = {row: share for row, share in zip(self.taken, shares, strict=True) if share == share}
        self.moments.synchronise()
        return dict(zip(("render", "align", "fuse"), self.moments.ms(), strict=False))

    def result(self, row: int, view: View, ms: dict[str, float]) -> FrameResult:
        return FrameResult(view, self.aligned[row], self.depth.get(row), self.anchored[row], ms, self._moving.get(row))


@dataclass
class DeviceReference:
    """As `Reference`, on the device. Cameras that have not moved are not rendered again."""

    anchor: Map
    live: Map
    width: int
    _last: dict[str, tuple[bytes, Tensor, float]] = field(default_factory=dict, init=False)

    @torch.inference_mode()
    def render_all(self, views: Sequence[View], cameras: Sequence[Camera]) -> tuple[Tensor, Tensor, list[float]]:
        """[C,h,w] float32 reference depth of views of one size, where it is the bootstrap's, and the shares of that."""
        small = small_size(self.width, views[0].size)
        scaled = [(scale_intrinsics(K, views[0].size, small), pose) for K, pose in cameras]
        self._refresh([view.camera for view in views], scaled, small)
        known = [self._last[view.camera] for view in views]
        found = torch.stack([depth for _, depth, _ in known])
        own = found > 0
        poor = [i for i, (_, _, covered) in enumerate(known) if covered < ENOUGH]
        anchored = [1.0] * len(views)
        if poor:
            seen = self.live.render_all([scaled[i] for i in poor], *small)
            for i, depth in zip(poor, seen, strict=True):
                found[i] = torch.where(found[i] > 0, found[i], depth)
            filled = _covered([found[i] for i in poor])
            for i, share in zip(poor, filled, strict=True):
                anchored[i] = known[i][2] / max(share, known[i][2], 1e-9)
        return found, own, anchored

    def _refresh(self, names: list[str], cameras: Sequence[Camera], small: tuple[int, int]) -> None:
        """Render the bootstrap map into the cameras that stand elsewhere than at their last frame."""
        keys = [K.tobytes() + pose.tobytes() + repr(small).encode() for K, pose in cameras]
        fresh = [i for i, name in enumerate(names) if name not in self._last or self._last[name][0] != keys[i]]
        if fresh:
            found = list(self.anchor.render_all([cameras[i] for i in fresh], *small))
            for i, depth, share in zip(fresh, found, _covered(found), strict=True):
                self._last[names[i]] = keys[i], depth, share


def same_device(one: str | torch.device, other: str | torch.device) -> bool:
    """Whether two names mean one device; `cuda` is the current one."""
    a, b = torch.device(one), torch.device(other)
    if a.type != b.type or a.type == "cpu":
        return a.type == b.type
    current = torch.cuda.current_device()
    return (current if a.index is None else a.index) == (current if b.index is None else b.index)


def _images(views: list[View], device: torch.device) -> Tensor:
    """[N,H,W,3] uint8 on `device`, by one copy from pinned memory."""
    shape, pinned = (len(views), *views[0].image.shape), device.type == "cuda"
    staging = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
    np.stack([view.image for view in views], out=staging.numpy())
    return staging.to(device, non_blocking=True)


def _owners(parts: list[ImagesResult]) -> list[int]:
    """For every view the result that it is in."""
    return [i for i, part in enumerate(parts) for _ in range(part.views)]


def _chosen(values: Tensor, rows: list[int]) -> Tensor:
    """Rows of `values`; itself where all are wanted."""
    return values if len(rows) == len(values) else torch.stack([values[row] for row in rows])


def _used(result: AlignResult, tolerance: float) -> tuple[float, float, float]:
    """The pair in use, and the relative difference below which two depths are the same."""
    assert result.s is not None
    assert result.t is not None
    return result.s, result.t, max(tolerance, 2 * residual(result.diagnostics))


def _posed(view: View, image: Any, depth: Any, camera: Camera) -> PosedDepth:
    return PosedDepth(view.camera, image, depth, *camera)


def _covered(depths: list[Tensor]) -> list[float]:
    """Share of each image that has depth."""
    found: list[float] = torch.stack([(depth > 0).to(torch.float64).mean() for depth in depths]).cpu().tolist()
    return found
