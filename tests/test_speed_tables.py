"""The figures of docs/speed.md, docs/live.md and the README are those of committed benchmark results."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(pattern: str) -> list[dict[str, Any]]:
    """The rows of every result file that fits."""
    found = [row for path in sorted(RESULTS.glob(pattern)) for row in json.loads(path.read_text())["latency"]]
    assert found, pattern
    return found


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows below the heading that starts so."""
    text = (ROOT / page).read_text()
    body = text[text.index(heading) :].splitlines()[2:]
    lines = body[: next(i for i, line in enumerate(body) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cell: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", cell)


def measured(number: str, values: list[float]) -> bool:
    """Whether one of the values is this number, to its digits."""
    return any(abs(value - float(number)) <= 0.5001 * 10.0 ** -len(number.partition(".")[2]) for value in values)


def test_every_latency_of_vggt_has_been_measured() -> None:
    found = rows_of("vggt_gpu_h200*.json")
    for cells in table("docs/speed.md", "| views | mode | back to back |"):
        views, mode = int(cells[0]), cells[1].split(",")[0]
        ours = [row for row in found if row["views"] == views and row["mode"] == mode]
        peers = [row["p50_ms"] for row in found if row["views"] == views and row["mode"] == "peer"]
        for cell, key in zip(cells[2:5], ("p50_ms", "spaced_ms", "host_ms"), strict=True):
            assert numbers(cell)
            for number in numbers(cell):
                assert measured(number, [row[key] for row in ours if key in row]), (views, mode, key, number)
        if cells[5]:
            assert measured(cells[5], peers), (views, mode, cells[5])
            ratio = float(numbers(cells[2])[0]) / float(cells[5])
            assert abs(ratio - float(cells[6])) < 0.01, (views, mode, ratio)
        peak, *_ = numbers(cells[8])
        assert measured(peak, [row["peak_gib"] for row in ours]), (views, mode, peak)


def test_every_latency_of_depth_anything_has_been_measured() -> None:
    found = rows_of("depth_gpu_h200*.json")
    for cells in table("docs/speed.md", "| | batch | fp16 | bf16 | fp8 | peer |"):
        size, batch = cells[0].lower(), int(cells[1])
        for mode, cell in zip(("fp16", "bf16", "fp8", "peer"), cells[2:6], strict=True):
            number, *ratio = numbers(cell)
            values = [row["p50_ms"] for row in found if (row["size"], row["batch"], row["mode"]) == (size, batch, mode)]
            assert measured(number, values), (size, batch, mode, number)
            if ratio:
                assert abs(float(number) / float(cells[5]) - float(ratio[0])) < 0.01, (size, batch, mode)


def test_the_live_loop_was_measured_and_the_readme_repeats_what_the_pages_say() -> None:
    live = json.loads((RESULTS / "live_gpu_h200.json").read_text())
    first = table("docs/live.md", "| | frames fused | dropped | latency |")[0]
    assert first[1] == f"{live['frames_fused']:,} of {live['frames']:,}"
    assert int(first[2]) == live["dropped"] + live["dropped_late"] == 0
    for cell, figures in (
        (3, live["latency_ms"]),
        (4, live["ms"]["depth"]),
        (5, live["ms"]["align"]),
        (6, live["ms"]["fuse"]),
    ):
        median, high = numbers(first[cell])
        assert measured(median, [figures["p50"]]), first[cell]
        assert measured(high, [figures["p95"]]), first[cell]
    told = {cells[0]: cells[1:] for cells in table("README.md", "| on one H200, 518x518")}
    of_loop = next(cells[0] for name, cells in told.items() if name.startswith("live:"))
    assert numbers(of_loop)[0] == numbers(first[3])[0]
    assert numbers(of_loop)[2] == numbers(first[3])[1]
    pages = {tuple(cells[:2]): cells for cells in table("docs/speed.md", "| views | mode | back to back |")}
    for name, key in (("the same, fp16", ("8", "fp16")), ("the same, fp8 with FP8 scores", ("8", "fp8, FP8 scores"))):
        assert numbers(told[name][0])[:2] == [numbers(pages[key][2])[0], numbers(pages[key][3])[0]], name
