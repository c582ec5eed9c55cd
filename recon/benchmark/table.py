"""The rolling summary of all timings, one line each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from recon.artifact import locked, writable, write_atomic
from recon.benchmark.contract import BenchmarkResult
from recon.errors import ReconError


def csv_row(result: BenchmarkResult, identity: Mapping[str, str | float]) -> dict[str, str | float]:
    """One line of the rolling summary: who was timed (`identity`, columns first), then the figures.

    Every row has the same columns for the same identity columns; what could not be measured is empty.
    """
    optional = (
        "device_memory_mib", "cpu_mhz_before", "cpu_mhz_after", "error_rel_l2_max", "error_cosine_min",
        "combined_per_s", "frames_per_s", "host_ms_p50", "host_ms_p99", "end_to_end_ms_p50", "end_to_end_ms_p99",
    )  # fmt: skip
    figures: dict[str, str | float] = {**dict.fromkeys(optional, ""), **result.summary()}
    return {**identity, **{name: figures[name] for name in sorted(figures)}}


def append_csv(path: Path, row: Mapping[str, str | float]) -> None:
    """Append a line so that a reader, or a kill at any moment, sees the whole table without it or with it.

    Raises:
        ReconError: the file has other columns, or cannot be written.
    """
    with writable(path.parent), locked(path):
        old = path.read_text() if path.exists() else ""
        header = next(csv.reader(io.StringIO(old)), None)
        if header is not None and header != list(row):
            differing = sorted(set(header) ^ set(row)) or "their order"
            raise ReconError(
                f"{path}: its columns are not the ones of this version (they differ in {differing})",
                "move the file away; a new one is started",
            )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header is None:
            writer.writerow(row)
        writer.writerow(row.values())
        write_atomic(path, old + text.getvalue())
