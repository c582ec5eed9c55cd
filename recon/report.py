"""What a person reads: tables on the terminal and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.artifact import atomic_file, write_atomic
from recon.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recon.reconstruct import Reconstruction

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1c2430}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;border-radius:6px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;border-bottom:1px solid #dde3ea;text-align:left}
.note{color:#5a6675}
"""

DOUBTS = {
    "pose_confidence": "Confidence in the depth's scale",
    "scale_confidence": "Confidence in the scale",
    "known_poses_unused": "The cameras are the network's own",
}
"""Notes of the bootstrap that say how far to trust the map's unit, with the words of the report."""


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


def write_report(config: Config, metrics: dict[str, Any], result: Reconstruction | None, folder: Path) -> list[Path]:
    """`report.html`: settings, engines, map, alignment over time, what was measured; `overview.png`: its pictures."""
    from recon.figures import compose, draw_alignment, input_rows, map_row

    parts = [f"<h1>{html.escape(config.name)}</h1>", _settings(config)]
    if "benchmark" in metrics:
        parts += ["<h2>Engines</h2>", _engines(metrics["benchmark"])]
    files = [folder / "report.html"]
    if result is not None:
        files.append(folder / "overview.png")
        with atomic_file(files[-1]) as temporary:
            inputs, fused = input_rows(config, result), map_row(config, result, metrics.get("evaluation", {}))
            compose([*inputs, fused]).savefig(temporary, dpi=100)
        parts += ["<h2>Map</h2>", _image(compose([fused])), _map_note(metrics)]
        parts += ["<h2>Bootstrap</h2>", _image(compose(inputs))]
        parts += ["<h2>Alignment</h2>", _image(_alignment(draw_alignment, result))]
    if found := metrics.get("evaluation"):
        units = metrics["evaluation_units"]
        rows = [{"figure": key, "value": value, "unit": units.get(key, "")} for key, value in found.items()]
        parts += ["<h2>Evaluation</h2>", _rows(rows)]
    head = f"<!doctype html><meta charset=utf-8><title>recon {html.escape(config.name)}</title><style>{STYLE}</style>"
    write_atomic(files[0], "\n".join([head, *parts]))
    return files


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
    doubts = [f"{what}: {metrics['bootstrap'][key]}." for key, what in DOUBTS.items() if key in metrics["bootstrap"]]
    lost = [f"Not written: {name} ({reason})." for name, reason in metrics["files_lost"].items()]
    return f"<p class=note>{html.escape(' '.join([f'Unit: {unit}.', fused, *doubts, *lost]))}</p>"


def _rows(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_show(value))}" for value in row.values()) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _alignment(draw: Callable[[Figure, Reconstruction], None], result: Reconstruction) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.0), layout="constrained")
    draw(figure, result)
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
