"""When frames were taken, and which of several cameras' frames belong together."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon.errors import ReconError
from recon.geometry.rig import same_name

Times = NDArray[np.float64]  # seconds by frame number, NaN where a frame has no usable time

_CAMERA = ("camera", "cam_id", "cam", "port", "camera_name")
_FRAME = ("frame", "frame_index", "file", "image", "name")
_ORDER = ("sync_index", "index")
_TIME = ("time_s", "time", "timestamp", "frame_time", "timestamp_s")
_REMEDY = "columns: camera, frame (number or file name; may be missing), time_s in seconds"


@dataclass(frozen=True)
class Row:
    """One line of a time-stamp file: `frame` is a number, a file name, or empty; `order` a common number, or None."""

    frame: str
    order: int | None
    time_s: float


@dataclass(frozen=True)
class Moment:
    """Frames that belong together: frame number by camera. skew_s: latest less earliest, 0 for a single one."""

    frames: dict[str, int]
    time_s: float
    skew_s: float


@dataclass
class Timeline:
    """Times of every camera's frames, with what had to be put right to get them."""

    times: dict[str, Times]
    origin: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, int]] = field(default_factory=dict)


def read_timestamps(path: Path) -> dict[str, list[Row]]:
    """Rows of a time-stamp CSV by the camera's name in it, in the order of the file.

    Raises:
        ReconError: no file, no such columns, or a value that is no number, with its line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            head = [name.strip() for name in reader.fieldnames or []]
            camera, frame, order, time = (
                next((i for i, name in enumerate(head) if name.lower() in names), None)
                for names in (_CAMERA, _FRAME, _ORDER, _TIME)
            )
            if camera is None or time is None:
                raise ReconError(f"source.timestamps={path}: has the columns {head}", _REMEDY)
            found: dict[str, list[Row]] = {}
            for line, row in enumerate(reader, 2):
                cells = [str(cell or "").strip() for cell in row.values()]
                if any(cells):
                    found.setdefault(cells[camera], []).append(_row(cells, frame, order, time, f"{path}, line {line}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReconError(f"source.timestamps={path}: cannot be read: {error}", _REMEDY) from error
    if not found:
        raise ReconError(f"source.timestamps={path}: has no rows", _REMEDY)
    return found


def assign(rows: dict[str, list[Row]], frames: dict[str, list[str]], where: str) -> Timeline:
    """Times from CSV rows. frames: names (stems) of every camera's frames, in order; empty names for numbers alone.

    A row names its frame by number or file name. Without such a column a camera's rows, ordered by the common number
    where there is one, are its frames in order when there are as many of one as of the other; else the common number,
    counted from the smallest in the file, is the frame's number. Repeated rows count once; times that run backwards
    are put aside, as few as possible; frames without a row have no time. All of it is counted in `notes`.

    Raises:
        ReconError: a camera has no rows, or none that belongs to a frame.
    """
    timeline = Timeline({})
    first = min((row.order for own in rows.values() for row in own if row.order is not None), default=0)
    span = 1 + max((row.order for own in rows.values() for row in own if row.order is not None), default=-1) - first
    for camera, names in frames.items():
        key = same_name(camera, rows)
        if key is None:
            raise ReconError(
                f"{where}: has no rows for camera {camera!r}", f"it has {', '.join(rows)}; name the cameras alike"
            )
        numbers, ordered = _numbers(rows[key], names, first, span)
        timeline.times[camera], timeline.notes[camera] = _clean(numbers, ordered, len(names))
        if np.isnan(timeline.times[camera]).all():
            raise ReconError(
                f"{where}: none of the {len(rows[key])} rows of camera {camera!r} is for one of {len(names)} frames",
                "name frames by number from 0, by file name, or by a common sync_index",
            )
        timeline.origin[camera] = "csv"
    return timeline


def moments(times: dict[str, Times], max_skew_s: float) -> list[Moment]:
    """All frames with a time, put into moments: in each at most one frame per camera, `max_skew_s` apart at most.

    The oldest frame not yet used starts a moment; of every other camera its next frame joins, if it is near enough, and
    unless it makes a better partner for the following frame of the camera that started: nearer to that one than to
    the first, and than any other of its own camera. A frame without partner is a moment of its own: nothing is lost.
    """
    queues = {
        camera: [(float(t), i) for i, t in enumerate(values) if not math.isnan(t)] for camera, values in times.items()
    }
    heads = dict.fromkeys(queues, 0)
    found = []
    while live := {camera: queues[camera][at] for camera, at in heads.items() if at < len(queues[camera])}:
        start = min(live, key=lambda camera: live[camera][0])
        t0 = live[start][0]
        following = {c: queues[c][at + 1][0] if at + 1 < len(queues[c]) else math.inf for c, at in heads.items()}
        after = following[start]
        frames = {
            camera: (t, number)
            for camera, (t, number) in live.items()
            if t - t0 <= max_skew_s
            and (camera == start or t - t0 <= abs(after - t) or abs(following[camera] - after) < abs(t - after))
        }
        for camera in frames:
            heads[camera] += 1
        last = max(t for t, _ in frames.values())
        found.append(Moment({camera: frames[camera][1] for camera in times if camera in frames}, t0, last - t0))
    return found


def lockstep(counts: dict[str, int]) -> list[Moment]:
    """Moments by frame number alone, for recordings without time stamps, as far as the shortest camera goes."""
    return [Moment(dict.fromkeys(counts, number), math.nan, 0.0) for number in range(min(counts.values()))]


def between(found: list[Moment], start_s: float, end_s: float | None) -> list[Moment]:
    """The moments from `start_s` to `end_s` after the first one, seconds.

    Raises:
        ReconError: there are moments, but none in that span.
    """
    first = found[0].time_s if found else 0.0
    last = math.inf if end_s is None else first + end_s
    kept = [moment for moment in found if first + start_s <= moment.time_s <= last]
    if found and not kept:
        span = f"source.start_s={start_s:g}" + ("" if end_s is None else f" source.end_s={end_s:g}")
        raise ReconError(
            f"{span}: no frame is there then; the last one comes {found[-1].time_s - first:.3f} s after the first",
            "both count seconds after the first frame of the cameras in use",
        )
    return kept


def skew(found: Sequence[Moment], cameras: int, bound_ms: float) -> dict[str, Any]:
    """What a report says of moments: skew in ms over those with several cameras, and frames without partner."""
    values = [1e3 * moment.skew_s for moment in found if len(moment.frames) > 1]
    row: dict[str, Any] = {"moments": len(found), "incomplete_moments": sum(len(m.frames) < cameras for m in found)}
    row["frames_without_partner"] = sum(len(m.frames) == 1 for m in found) if cameras > 1 else 0
    if values and not math.isnan(found[0].time_s):
        p50, p95 = np.percentile(values, (50, 95))
        figures = {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "max": round(max(values), 3)}
        row["skew_ms"] = {"bound": bound_ms, **figures}
    return row


def _row(cells: list[str], frame: int | None, order: int | None, time: int, where: str) -> Row:
    try:
        value = float(cells[time])
        number = int(float(cells[order])) if order is not None else None
    except (ValueError, IndexError, OverflowError) as error:
        raise ReconError(f"source.timestamps={where}: {error}", _REMEDY) from error
    if not math.isfinite(value):
        raise ReconError(f"source.timestamps={where}: time {value}", "leave the row out where there is no time")
    return Row(cells[frame] if frame is not None else "", number, value)


def _numbers(rows: list[Row], names: list[str], first: int, span: int) -> tuple[list[tuple[int, float]], bool]:
    """(frame number, time) of every row, and whether rows stood in order; number -1 for one that names no frame."""
    stems = {name: number for number, name in enumerate(names) if name}
    numbered = [row.order for row in rows if row.order is not None]
    in_order = all(a <= b for a, b in pairwise(numbered))
    if any(row.frame for row in rows):
        found = [stems.get(Path(row.frame).stem, int(row.frame) if row.frame.isdigit() else -1) for row in rows]
        return [(n, row.time_s) for n, row in zip(found, rows, strict=True)], found == sorted(found)
    if not numbered:
        return [(number, row.time_s) for number, row in enumerate(rows)], True
    unique = {row.order: row for row in reversed(rows)}
    if len(unique) == len(names) and len(names) != span:
        ranked = {order: rank for rank, order in enumerate(sorted(number for number in unique if number is not None))}
        return [(ranked[row.order], row.time_s) for row in rows if row.order is not None], in_order
    return [(row.order - first, row.time_s) for row in rows if row.order is not None], in_order


def _clean(numbers: list[tuple[int, float]], ordered: bool, count: int) -> tuple[Times, dict[str, int]]:
    """Times by frame number, increasing, and what was put right."""
    times = np.full(count, np.nan)
    notes = {"rows_out_of_order": int(not ordered), "rows_repeated": 0, "rows_without_frame": 0}
    for number, time_s in numbers:
        if not 0 <= number < count:
            notes["rows_without_frame"] += 1
        elif not np.isnan(times[number]):
            notes["rows_repeated"] += 1
        else:
            times[number] = time_s
    notes["frames_without_time"] = int(np.isnan(times).sum())
    backwards = increasing(times)
    times[backwards] = np.nan
    notes["frames_back_in_time"] = len(backwards)
    return times, notes


def increasing(times: Times) -> list[int]:
    """Numbers of the fewest frames whose removal leaves times that increase (longest increasing subsequence)."""
    tails: list[float] = []
    at: list[int] = []
    before: dict[int, int] = {}
    for number, value in enumerate(times):
        if math.isnan(value):
            continue
        place = bisect_left(tails, value)
        before[number] = at[place - 1] if place else -1
        if place == len(tails):
            tails.append(float(value))
            at.append(number)
        else:
            tails[place], at[place] = float(value), number
    kept, number = set(), at[-1] if at else -1
    while number >= 0:
        kept.add(number)
        number = before[number]
    return [n for n, value in enumerate(times) if not math.isnan(value) and n not in kept]
