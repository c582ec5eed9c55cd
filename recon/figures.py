"""Pictures of one reconstruction: inputs, predicted depth, the map beside the true scene, alignment over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.geometry.world import to_source
from recon.mapview import intrinsics, map_image, viewpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recon.config import Config
    from recon.geometry.views import Image
    from recon.reconstruct import Reconstruction

WIDTH, GAP, HEAD = 12.0, 0.08, 0.32
"""Width of a page, gap between pictures and height of a heading, inches."""
BAR = 2.4
"""Length of a colour bar, inches."""
INK, QUIET = "#1c2430", "#5a6675"
DEPTH_COLOURS = "turbo_r"
MAP_SIZE = (960, 640)
MOST_VIEWS = 8


@dataclass(frozen=True)
class Row:
    """Pictures side by side under a heading. aspect: height / width of each; names: captions inside the pictures.

    bar: (low, high, unit) of a colour bar in the heading.
    """

    heading: str
    note: str
    cells: Sequence[Callable[[Axes], None]]
    aspect: float
    names: Sequence[str] = ()
    bar: tuple[float, float, str] | None = None


def input_rows(config: Config, result: Reconstruction) -> list[Row]:
    """Bootstrap images and depths in one colour scale, one column per camera, eight at most."""
    views = result.bootstrap.views[:MOST_VIEWS]
    depths = [np.where(view.depth > 0, view.depth, np.nan) for view in views]
    known = np.concatenate([depth[np.isfinite(depth)] for depth in depths])
    low, high = (float(value) for value in np.percentile(known, (1, 99))) if len(known) else (0.0, 1.0)
    unit = "m" if result.scale.unit == "m" else "units"
    learned = config.model.has_network
    heading = f"Depth predicted by {config.model.name}" if learned else "Depth of the bootstrap, as recorded"
    note = f"one pass over {len(views)} views" if learned else ""
    aspect = views[0].depth.shape[0] / views[0].depth.shape[1]
    return [
        Row("Input", "one frame of each camera", [_picture(view.image) for view in views], aspect,
            [view.camera for view in views]),
        Row(heading, note, [_depth(depth, low, high) for depth in depths], aspect, bar=(low, high, unit)),
    ]  # fmt: skip


def map_row(config: Config, result: Reconstruction, found: dict[str, Any]) -> Row:
    """The fused map beside the true scene from the same viewpoint; from two viewpoints where the truth is unknown.

    found: the evaluation, as in metrics.json; may be empty.
    """
    width, height = MAP_SIZE
    points = np.asarray(result.fused.points().points, np.float64)
    pose = viewpoint(points, result.bootstrap)
    aligned = to_source(result.bootstrap)
    truth = None
    if aligned is not None:
        truth = config.source.picture(intrinsics(width, height), aligned.pose(pose), width, height)
    if truth is not None:
        names, second = ("fused map", "true scene without what moves, same viewpoint"), truth
    else:
        above = viewpoint(points, result.bootstrap, raised=0.9, back=0.2)
        names, second = ("fused map", "from above"), map_image(result.fused, above, width, height)
    cells = [_picture(map_image(result.fused, pose, width, height)), _picture(second)]
    depth = f" with {config.depth.name}" if config.depth.has_network else ""
    steps = f"{result.log.accepted} of {result.log.seen} frames{depth}, seen from where no camera stands"
    return Row("Fused map", ". ".join([steps, *_figures(found)]), cells, height / width, names)


def draw_alignment(figure: Figure, result: Reconstruction) -> None:
    """Median residual by frame, one line per camera; crosses are frames that were not fused."""
    axis = figure.add_subplot(1, 1, 1)
    fitted = [frame for frame in result.frames if frame.get("resid_med_pct") is not None]  # frames without depth: none
    for camera in dict.fromkeys(frame["camera"] for frame in fitted):
        rows = [frame for frame in fitted if frame["camera"] == camera]
        axis.plot([row["frame"] for row in rows], [row["resid_med_pct"] for row in rows], marker=".", label=camera)
        held = [row for row in rows if not row["accepted"]]
        axis.plot([row["frame"] for row in held], [row["resid_med_pct"] for row in held], "kx")
    axis.set(xlabel="frame", ylabel="median |residual|, %", title="Alignment to the bootstrap map (x = not fused)")
    axis.set_ylim(bottom=0)
    if fitted:
        axis.legend(ncols=4, fontsize=8)


def compose(rows: Sequence[Row]) -> Figure:
    """A page as high as its rows need, with nothing around them."""
    from matplotlib.figure import Figure

    heights = [HEAD + _cell_width(row) * row.aspect for row in rows]
    total = sum(heights) + GAP * (len(rows) + 1)
    figure = Figure(figsize=(WIDTH, total))
    top = total - GAP
    for row, height in zip(rows, heights, strict=True):
        _place(figure, row, top, height, total)
        top -= height + GAP
    return figure


def _place(figure: Figure, row: Row, top: float, height: float, total: float) -> None:
    width = _cell_width(row)
    figure.text(GAP / WIDTH, (top - HEAD * 0.68) / total, row.heading, fontsize=13, fontweight="bold", color=INK)
    if row.note:
        where = (GAP + 0.106 * len(row.heading) + 0.2) / WIDTH
        figure.text(where, (top - HEAD * 0.68) / total, row.note, fontsize=10.5, color=QUIET)
    for column, draw in enumerate(row.cells):
        left, bottom = GAP + column * (width + GAP), top - height
        axis = figure.add_axes((left / WIDTH, bottom / total, width / WIDTH, (height - HEAD) / total))
        axis.axis("off")
        draw(axis)
        if column < len(row.names):
            axis.text(0.012, 0.97, row.names[column], transform=axis.transAxes, va="top", fontsize=10, color="white",
                      bbox={"facecolor": "black", "alpha": 0.55, "pad": 2.5, "edgecolor": "none"})  # fmt: skip
    if row.bar is not None:
        _colour_bar(figure, row.bar, top, total)


def _colour_bar(figure: Figure, bar: tuple[float, float, str], top: float, total: float) -> None:
    """Right in the heading: near colour, bar, far colour."""
    low, high, unit = bar
    left, middle = WIDTH - GAP - BAR - 0.66, top - HEAD * 0.55
    axis = figure.add_axes((left / WIDTH, (middle - 0.06) / total, BAR / WIDTH, 0.12 / total))
    axis.imshow(np.linspace(0, 1, 256)[None], cmap=DEPTH_COLOURS, aspect="auto")
    axis.axis("off")
    style: dict[str, Any] = {"fontsize": 10, "color": QUIET, "va": "center"}
    figure.text((left - 0.08) / WIDTH, middle / total, f"{low:.1f}", ha="right", **style)
    figure.text((left + BAR + 0.08) / WIDTH, middle / total, f"{high:.1f} {unit}", ha="left", **style)


def _cell_width(row: Row) -> float:
    free = WIDTH - GAP * (len(row.cells) + 1)
    return free / len(row.cells)


def _picture(image: Image) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        axis.imshow(image, aspect="auto")

    return draw


def _depth(depth: Any, low: float, high: float) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        axis.imshow(depth, cmap=DEPTH_COLOURS, vmin=low, vmax=high, aspect="auto")

    return draw


def _figures(found: dict[str, Any]) -> list[str]:
    """The three figures that a reader compares first."""
    unit, parts = "m" if found.get("unit") == "m" else "units", []
    if "depth_absrel" in found:
        parts.append(f"Depth AbsRel {found['depth_absrel']:.3f}")
    if "map_f_score" in found:
        parts.append(f"F-score {found['map_f_score']:.2f} at {found['map_threshold']:g} {unit}")
    if "plane_rms" in found:
        parts.append(f"planes {found['plane_rms']:.3f} {unit} RMS")
    return [", ".join(parts)] if parts else []
