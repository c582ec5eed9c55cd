"""The streaming loop: depth of every camera, aligned to the map as that camera sees it, fused where it is trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.geometry.views import Array, Bootstrap, DepthImage, PosedDepth, View
from recon.live.align import Align, AlignResult, CameraAligner
from recon.live.reference import Reference

if TYPE_CHECKING:
    from recon.depth import Depth
    from recon.engines import Session
    from recon.fusion import Map
    from recon.sources import Source


@dataclass(frozen=True)
class FrameResult:
    """One frame of one camera after the stream dealt with it.

    depth: [H,W] aligned, 0 = none; None when rejected. anchored: share of the reference that is the bootstrap's.
    """

    view: View
    align: AlignResult
    depth: DepthImage | None
    anchored: float
    ms: dict[str, float]

    def row(self) -> dict[str, Any]:
        """The frame as it stands in metrics.json."""
        ms = {f"ms_{part}": round(value, 3) for part, value in self.ms.items()}
        who = {"camera": self.view.camera, "frame": self.view.frame}
        return {**who, **self.align.row(), "anchored": self.anchored, **ms}


@dataclass
class Streamer:
    """Streams a source into a map. One aligner per camera, one thread per depth worker; the map has one owner: this."""

    source: Source
    depth: Depth
    session: Session | None
    bootstrap: Bootstrap
    fused: Map
    anchor: Map
    align: Align
    aligners: dict[str, CameraAligner] = field(init=False)

    def __post_init__(self) -> None:
        self.reference = Reference(self.anchor, self.fused, self.align.render_width)
        metric = self.bootstrap.scale.unit == "m"
        self.aligners = {
            camera: self.align.aligner(camera, self.depth.type, metric) for camera in self.source.cameras()
        }

    def run(self, observe: Callable[[FrameResult], None]) -> Iterator[int]:
        """Process all batches; `observe` sees every frame result. Yields the time step after each batch."""
        workers = self.depth.workers or len(self.aligners)
        with ThreadPoolExecutor(workers, thread_name_prefix="depth") as pool:
            for step, views in enumerate(self.source.batches(), 1):
                if (step - 1) % self.depth.every == 0:
                    for view, (disparity, ms) in zip(views, pool.map(self._predict, views), strict=True):
                        observe(self._align_and_fuse(view, disparity, ms, step))
                yield step

    def _predict(self, view: View) -> tuple[DepthImage, float]:
        start = time.perf_counter()
        prediction = self.depth.predict(view, self.session)
        return prediction, (time.perf_counter() - start) * 1e3

    def _align_and_fuse(self, view: View, prediction: DepthImage, depth_ms: float, step: int) -> FrameResult:
        K, pose = self._camera(view)
        clock = [time.perf_counter()]
        rendered, anchored = self.reference.render(view.camera, K, pose, view.size)
        clock.append(time.perf_counter())
        aligner = self.aligners[view.camera]
        result = aligner.update(prediction, rendered, view.frame)
        depth = aligner.to_depth(prediction) if result.accepted else None
        clock.append(time.perf_counter())
        if depth is not None:
            self.fused.integrate(PosedDepth(view.camera, view.image, depth, K, pose), step)
        clock.append(time.perf_counter())
        render, align, fuse = ((after - before) * 1e3 for before, after in pairwise(clock))
        ms = {"depth": depth_ms, "render": render, "align": align, "fuse": fuse}
        return FrameResult(view, result, depth, anchored, ms)

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
