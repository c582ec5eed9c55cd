"""The videos of one run: one per camera, and one with all cameras in a grid."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from recon.depthvideo.pictures import RunningRange, colourise, columns_of, even, side_by_side
from recon.depthvideo.writer import VideoFile, require_codec
from recon.geometry.views import DepthImage, DepthType, Image, View
from recon.options import DepthVideoOptions

LEGENDS: dict[str, str] = {
    "disparity": "disparity, relative: warm = near",
    "relative": "depth, relative: warm = near",
    "metric": "depth {low:.2f}-{high:.2f} m: warm = near",
}
Span = tuple[float, float]


class Recorder:
    """Draws frames and writes them. `draw` a camera's frame, `show` after all of a batch, `close` at the end.

    Leaving the context without `close` removes every unfinished file.
    """

    def __init__(self, folder: Path, cameras: list[str], kind: DepthType, options: DepthVideoOptions) -> None:
        require_codec(options.codec)
        self.kind, self.options = kind, options
        self.files = {camera: self._file(folder, _plain(camera)) for camera in cameras}
        self.grid = self._file(folder, "all")
        self._ranges = {
            camera: RunningRange(options.low_percentile, options.high_percentile, options.smooth) for camera in cameras
        }
        self._panels: dict[str, Image] = {}
        self._cell: tuple[int, int] | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for video in (*self.files.values(), self.grid):
            video.discard()

    def draw(self, view: View, depth: DepthImage | None) -> dict[str, float | None]:
        """Write one frame of one camera; depth None: shown as grey. Returns its percentiles and the range shown."""
        span: dict[str, float | None] = dict.fromkeys(("low", "high", "shown_low", "shown_high"))
        coloured, legend = None, "no depth"
        if depth is not None:
            found = self._ranges[view.camera].update(depth)
            shown = found["shown_low"], found["shown_high"]
            coloured = colourise(depth, shown, self.kind)
            legend = LEGENDS[self.kind].format(low=shown[0], high=shown[1])
            span = dict(found)
        when = f"  {view.time_s:.2f} s" if view.time_s is not None else ""
        title = f"{view.camera}  frame {view.frame}{when}"
        panel = side_by_side(view.image, coloured, even(self.options.width), (title, legend))
        panel = self._steady(view.camera, panel)
        self.files[view.camera].write(panel, view.time_s)
        self._panels[view.camera] = panel
        return span

    def show(self, views: list[View]) -> None:
        """Write the grid of all cameras; one that has no frame in this batch keeps its last picture."""
        if self._panels and len(self.files) > 1:
            times = [view.time_s for view in views if view.time_s is not None]
            self.grid.write(self._tiled(), min(times) if times else None)

    def close(self) -> list[Path]:
        """Finish all files; returns those that have a frame."""
        return [video.path for video in (*self.files.values(), self.grid) if video.close()]

    def _file(self, folder: Path, name: str) -> VideoFile:
        return VideoFile(folder / f"{name}.mp4", self.options.codec, self.options.fps)

    def _steady(self, camera: str, panel: Image) -> Image:
        """A camera whose image changes its shape keeps the size that its file began with."""
        before = self._panels.get(camera)
        return panel if before is None or before.shape == panel.shape else _boxed(panel, before.shape[1::-1])

    def _tiled(self) -> Image:
        if self._cell is None:
            height = max(panel.shape[0] for panel in self._panels.values())
            width = max(panel.shape[1] for panel in self._panels.values())
            columns = columns_of(len(self.files), width / height)
            factor = min(1.0, self.options.grid_width / (columns * width))
            self._columns, self._cell = columns, (even(width * factor), even(height * factor))
        width, height = self._cell
        rows = -(-len(self.files) // self._columns)
        out = np.zeros((rows * height, self._columns * width, 3), np.uint8)
        for number, camera in enumerate(self.files):
            if camera in self._panels:
                top, left = number // self._columns * height, number % self._columns * width
                out[top : top + height, left : left + width] = _boxed(self._panels[camera], self._cell)
        return out


def _boxed(picture: Image, size: tuple[int, int]) -> Image:
    """The picture scaled into (width, height) with its aspect kept, black around it."""
    import cv2

    width, height = size
    factor = min(width / picture.shape[1], height / picture.shape[0])
    inner = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    out = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    out[top : top + inner[1], left : left + inner[0]] = cv2.resize(picture, inner, interpolation=way)
    return out


def _plain(camera: str) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in camera)
    return f"camera_{name}" if name == "all" else name
