"""What a person reads: tables on the terminal and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.artifact import write_atomic
from recon.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recon.geometry.views import Array, Bootstrap, Image
    from recon.reconstruct import Reconstruction

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1c2430}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;border-radius:6px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;border-bottom:1px solid #dde3ea;text-align:left}
.note{color:#5a6675}
"""


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """Rows of equal keys as a table; the first row's keys are the head."""
    from rich.table import Table

    from recon.console import console

    table = Table(title=title, title_justify="left", header_style="bold")
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(value.replace("[", "\\[") for value in row.values()))
    console().print(table)


def write_report(config: Config, metrics: dict[str, Any], result: Reconstruction | None, folder: Path) -> Path:
    """`report.html`: settings, engines, the map, alignment over time, and what was measured."""
    parts = [f"<h1>{html.escape(config.name)}</h1>", _settings(config)]
    if "benchmark" in metrics:
        parts += ["<h2>Engines</h2>", _engines(metrics["benchmark"])]
    if result is not None:
        parts += ["<h2>Map</h2>", _image(map_figure(result)), _map_note(metrics)]
        parts += ["<h2>Alignment</h2>", _image(alignment_figure(result)), _image(depth_figure(result))]
    if metrics.get("evaluation"):
        parts += [
            "<h2>Evaluation</h2>",
            _rows([{"metric": key, "value": value} for key, value in metrics["evaluation"].items()]),
        ]
    page = (
        f"<!doctype html><meta charset=utf-8><title>recon {html.escape(config.name)}</title><style>{STYLE}</style>"
        + "\n".join(parts)
    )
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def map_figure(result: Reconstruction) -> Figure:
    """The fused map as the first camera's side of the room sees it, and from above; coloured points on dark ground."""
    from matplotlib.figure import Figure

    cloud = result.fused.points()
    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor="#10151c")
    for column, pose in enumerate(outlooks(np.asarray(cloud.points, np.float64), result.bootstrap)):
        axis = figure.add_subplot(1, 2, column + 1)
        axis.imshow(splat_image(cloud.points, cloud.colors, pose, 900, 760))
        axis.axis("off")
    return figure


def outlooks(points: Array, bootstrap: Bootstrap) -> list[Array]:
    """Two poses (T_world_cam) to look at a map from: raised behind the first camera, and steeply from above."""
    poses = np.stack([view.T_world_cam for view in bootstrap.views])
    up = -poses[:, :3, 1].mean(0)
    up /= np.linalg.norm(up)
    target = np.median(points, axis=0)
    radius = float(np.quantile(np.linalg.norm(points - target, axis=1), 0.9))
    away = poses[0, :3, 3] - target
    away -= up * (away @ up)
    away /= max(float(np.linalg.norm(away)), 1e-9)
    eyes = [target + radius * (back * away + rise * up) for back, rise in ((1.9, 1.0), (0.6, 2.4))]
    return [_look_at(eye, target, up) for eye in eyes]


def _look_at(eye: Array, target: Array, up: Array) -> Array:
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, up)
    right /= max(float(np.linalg.norm(right)), 1e-9)
    pose = np.eye(4)
    pose[:3, :4] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
    return pose


def splat_image(points: Any, colors: Any, T_world_cam: Array, width: int, height: int) -> Image:
    """[height,width,3] uint8: points as small squares, nearest in front, in a view of 67 degrees."""
    local = (np.asarray(points, np.float64) - T_world_cam[:3, 3]) @ T_world_cam[:3, :3]
    local, tint = local[local[:, 2] > 0.05], np.asarray(colors)[local[:, 2] > 0.05]
    order = np.argsort(-local[:, 2])
    local, tint = local[order], tint[order]
    square = np.array(list(np.ndindex(3, 3))) - 1
    u, v = (
        (np.rint(local[:, axis] / local[:, 2] * width * 0.75 + size / 2).astype(int)[:, None] + square[:, axis]).ravel()
        for axis, size in ((0, width), (1, height))
    )
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    image = np.full((height, width, 3), (16, 21, 28), np.uint8)
    image[v[inside], u[inside]] = np.repeat(tint, len(square), axis=0)[inside]
    return image


def alignment_figure(result: Reconstruction) -> Figure:
    """Residual and acceptance by frame, one line per camera."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    axis = figure.add_subplot(1, 1, 1)
    for camera in dict.fromkeys(frame["camera"] for frame in result.frames):
        rows = [frame for frame in result.frames if frame["camera"] == camera]
        axis.plot([row["frame"] for row in rows], [row["resid_med_pct"] for row in rows], marker=".", label=camera)
        held = [row for row in rows if not row["accepted"]]
        axis.plot([row["frame"] for row in held], [row["resid_med_pct"] for row in held], "kx")
    axis.set(xlabel="frame", ylabel="median |residual|, %", title="Alignment to the map (x = not fused)")
    if result.frames:
        axis.legend(ncols=4, fontsize=8)
    return figure


def depth_figure(result: Reconstruction) -> Figure:
    """Bootstrap images and depths, one column per camera (eight at most)."""
    from matplotlib.figure import Figure

    views = result.bootstrap.views[:8]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for column, view in enumerate(views):
        top, bottom = (figure.add_subplot(2, len(views), row * len(views) + column + 1) for row in (0, 1))
        top.imshow(view.image)
        top.set_title(view.camera, fontsize=9)
        bottom.imshow(np.where(view.depth > 0, view.depth, np.nan), cmap="turbo_r")
        top.axis("off")
        bottom.axis("off")
    return figure


def _engines(benchmark: dict[str, Any]) -> str:
    shown = (
        "latency_ms_p50",
        "latency_ms_p99",
        "throughput_items_per_s",
        "session_memory_mib",
        "error_rel_l2_max",
        "warnings",
    )
    return _rows(
        [{"engine": name, **{key: row["summary"].get(key, "") for key in shown}} for name, row in benchmark.items()]
    )


def _settings(config: Config) -> str:
    chosen = {
        group: getattr(config, group).name
        for group in ("model", "depth", "quant_mode", "precision", "engine", "source", "fusion")
    }
    return _rows([chosen])


def _map_note(metrics: dict[str, Any]) -> str:
    scale = metrics["scale"]
    unit = f"metres, from {scale['source']}" if scale["unit"] == "m" else "arbitrary: no scale source was given"
    held = ", ".join(f"{count} {reason}" for reason, count in metrics["frames_rejected"].items()) or "none"
    fused = f"{metrics['frames_fused']} of {metrics['frames_seen']} frames fused; not fused: {held}."
    return f"<p class=note>Unit: {html.escape(unit)}. {html.escape(fused)}</p>"


def _rows(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_show(value))}" for value in row.values()) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
