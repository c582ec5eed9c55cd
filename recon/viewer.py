"""`viewer=rerun`: cameras, images, aligned depth, residuals and the growing map, recorded to `recon.rrd` and, if asked,
shown while the run goes on.

Entities: `world/map`; per camera `world/cameras/<name>` (pose) with `image` and `depth` (pinholes); `align/<name>`
(median residual, per cent). Timelines: `step`, and `time` where frames have time stamps. Lengths are in map units.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.artifact import atomic_file
from recon.errors import Unwritable
from recon.geometry.cameras import scale_intrinsics
from recon.geometry.views import Array, Bootstrap, DepthImage, Image, View
from recon.keyframes import camera_of
from recon.options import RerunOptions

if TYPE_CHECKING:
    from recon.fusion import Map

log = logging.getLogger(__name__)
FILE = "recon.rrd"
FOOTER = b"RRF2FOOT"
"""The last bytes of a complete .rrd file hold these."""
MILLIMETRES = 1000.0
FLUSH_S = 10.0


class Viewer:
    """Shows nothing: what `viewer=none` is, and the interface of the others."""

    name = "none"
    files: tuple[Path, ...] = ()
    lost = ""
    """Why there is no recording, where one could not be completed."""

    def frame(self, view: View, depth: DepthImage | None, row: Mapping[str, Any]) -> None:
        """One frame of the stream: depth [H,W] aligned (None: rejected), `row` as in metrics.json."""

    def step(self, step: int, fused: Map) -> None:
        """The map after a time step."""


def open_viewer(kind: str, folder: Path, bootstrap: Bootstrap, options: RerunOptions) -> AbstractContextManager[Viewer]:
    """The viewer of this name, open while the context lasts. `lost` says why a recording could not be completed, e.g.
    because the disk is full: that costs the recording, not the run.
    """
    return nullcontext(Viewer()) if kind == "none" else _rerun(folder, bootstrap, options)


@contextmanager
def _rerun(folder: Path, bootstrap: Bootstrap, options: RerunOptions) -> Iterator[Viewer]:
    import rerun

    viewer = None
    try:
        with atomic_file(folder / FILE) as temporary:
            recording = rerun.RecordingStream("recon", recording_id=folder.name)
            blueprint = _blueprint([view.camera for view in bootstrap.views])
            sinks: list[Any] = [rerun.FileSink(str(temporary))]
            if options.spawn:
                rerun.spawn(connect=False)
                sinks.append(rerun.GrpcSink())
            recording.set_sinks(*sinks, default_blueprint=blueprint)
            viewer = RerunViewer(recording, bootstrap, options)
            try:
                yield viewer
                viewer.finish()
            finally:
                _flush(recording, options.spawn)
            viewer.ended = True
            _require_complete(temporary)
        viewer.files = (folder / FILE,)
    except Unwritable as error:
        if viewer is None or not viewer.ended:
            raise
        viewer.lost = error.problem


class RerunViewer(Viewer):
    """Logs into a rerun recording. Pictures are scaled down, the map comes at a bounded rate, the total is bounded."""

    name = FILE
    ended = False

    def __init__(self, recording: Any, bootstrap: Bootstrap, options: RerunOptions) -> None:
        self.recording, self.bootstrap, self.options = recording, bootstrap, options
        self.bytes = 0
        self._step, self._map_s = 0, -np.inf
        self._map: Map | None = None
        self._cameras: dict[str, bytes] = {}
        self._full = False
        self._world()
        self._at(0, None)
        for view in bootstrap.views:
            self._camera(view.camera, view.K, view.T_world_cam, view.depth.shape[1::-1])
            self._pictures(view.camera, view.image, view.depth)

    def frame(self, view: View, depth: DepthImage | None, row: Mapping[str, Any]) -> None:
        import rerun

        camera = camera_of(self.bootstrap, view)
        if camera is None or self._is_full():
            return
        self._at(self._step + 1, view.time_s)
        self._camera(view.camera, *camera, view.size)
        self._pictures(view.camera, view.image, depth)
        if (residual := row.get("resid_med_pct")) is not None:
            self.recording.log(f"align/{view.camera}", rerun.Scalars(float(residual)))

    def step(self, step: int, fused: Map) -> None:
        self._step, self._map = step, fused
        now = time.monotonic()
        if now - self._map_s >= self.options.map_period_s and not self._is_full():
            self._map_s = now
            self._log_map(fused)

    def finish(self) -> None:
        """The map as it is at the end, whatever the budget."""
        if self._map is not None:
            self._log_map(self._map)

    def _world(self) -> None:
        """The axis that the cameras hold upwards, for the viewer's own camera."""
        import rerun

        up = -np.mean([view.T_world_cam[:3, 1] for view in self.bootstrap.views], axis=0)
        axis = int(np.argmax(np.abs(up)))
        name = f"RIGHT_HAND_{'XYZ'[axis]}_{'UP' if up[axis] > 0 else 'DOWN'}"
        self.recording.log("world", getattr(rerun.ViewCoordinates, name), static=True)

    def _at(self, step: int, time_s: float | None) -> None:
        self.recording.set_time("step", sequence=step)
        if time_s is not None:
            self.recording.set_time("time", duration=time_s)

    def _camera(self, name: str, K: Array, T_world_cam: Array, size: tuple[int, int]) -> None:
        """Pose and pinholes, logged when they change."""
        import rerun

        key = K.tobytes() + T_world_cam.tobytes() + bytes(str(size), "ascii")
        if self._cameras.get(name) == key:
            return
        self._cameras[name] = key
        path = f"world/cameras/{name}"
        pose = rerun.Transform3D(translation=T_world_cam[:3, 3], mat3x3=T_world_cam[:3, :3])
        self.recording.log(path, pose)
        for part, width in (("image", self.options.image_width), ("depth", self.options.depth_width)):
            shown = _shrunk(size, width)
            centred = scale_intrinsics(K, size, shown)
            centred[:2, 2] += 0.5  # rerun's pixel centres lie at +0.5
            axes = rerun.ViewCoordinates.RDF
            self.recording.log(
                f"{path}/{part}", rerun.Pinhole(image_from_camera=centred, resolution=shown, camera_xyz=axes)
            )

    def _pictures(self, name: str, image: Image, depth: DepthImage | None) -> None:
        import cv2
        import rerun

        path, size = f"world/cameras/{name}", image.shape[1::-1]
        small = cv2.resize(image, _shrunk(size, self.options.image_width), interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.options.jpeg_quality])
        contents = data.tobytes()
        self.recording.log(f"{path}/image", rerun.EncodedImage(contents=contents, media_type="image/jpeg"))
        self.bytes += len(contents)
        if depth is None:
            self.recording.log(f"{path}/depth", rerun.Clear(recursive=False))
            self._cameras.pop(name, None)  # clearing takes the pinhole along
            return
        shown = cv2.resize(depth, _shrunk(size, self.options.depth_width), interpolation=cv2.INTER_NEAREST)
        if self.bootstrap.scale.unit == "m":
            shown = np.clip(np.nan_to_num(shown) * MILLIMETRES, 0, 65535).astype(np.uint16)
        meter = MILLIMETRES if shown.dtype == np.uint16 else 1.0
        self.recording.log(f"{path}/depth", rerun.DepthImage(shown, meter=meter))
        self.bytes += shown.nbytes

    def _log_map(self, fused: Map) -> None:
        import rerun

        cloud = fused.points()
        keep = np.arange(len(cloud.points))
        if len(keep) > self.options.map_points:
            keep = np.random.default_rng(0).choice(len(keep), self.options.map_points, replace=False)
        radius = 0.5 * fused.stats().get("voxel", 0.02)
        self._at(self._step, None)
        points = rerun.Points3D(cloud.points[keep], colors=cloud.colors[keep], radii=radius)
        self.recording.log("world/map", points)
        self.bytes += 15 * len(keep)

    def _is_full(self) -> bool:
        full = self.bytes > self.options.max_mib * 2**20
        if full and not self._full:
            log.warning(
                "recon.rrd has reached rerun.max_mib=%d: only the last map is added to it", self.options.max_mib
            )
        self._full = full
        return full


def _flush(recording: Any, spawned: bool) -> None:
    """Write out what is pending. A viewer that a person has closed must not cost the file.

    Where rerun's writing thread has died of a full disk, `disconnect` waits for it without end: it is left behind, and
    so is what rerun does when the process ends, which waits for the same thread.
    """
    try:
        recording.flush(timeout_sec=FLUSH_S)
    except RuntimeError as error:
        if spawned:
            log.warning("the spawned viewer does not answer, only %s is written: %s", FILE, error)
    ending = threading.Thread(target=recording.disconnect, name="rerun-disconnect", daemon=True)
    ending.start()
    ending.join(FLUSH_S)
    if ending.is_alive():
        import rerun

        rerun.unregister_shutdown()


def _shrunk(size: tuple[int, int], width: int) -> tuple[int, int]:
    """(width, height) of a picture scaled down to `width` at most."""
    factor = min(1.0, width / size[0])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _blueprint(cameras: list[str]) -> Any:
    """The map large, images and depths beside it, residuals below."""
    import rerun.blueprint as rrb

    pictures = [
        rrb.Spatial2DView(origin=f"world/cameras/{name}/{part}", name=f"{name} {part}")
        for name in cameras[:8]
        for part in ("image", "depth")
    ]
    below = rrb.TimeSeriesView(origin="align", name="median residual, %")
    left = rrb.Vertical(rrb.Spatial3DView(origin="world", name="map"), below, row_shares=[4, 1])
    return rrb.Blueprint(rrb.Horizontal(left, rrb.Grid(*pictures, grid_columns=2), column_shares=[3, 2]))


def _require_complete(path: Path) -> None:
    """rerun writes from a thread of its own, which reports no error: a file cut short shows in its end."""
    whole = False
    if path.is_file():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            whole = FOOTER in file.read()
    if not whole:
        raise Unwritable(f"{FILE}: the recording was cut short", "free some disk space, or use viewer=none")
