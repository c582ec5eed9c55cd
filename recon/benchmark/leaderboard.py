"""One table of engines over all jobs of a sweep: what each is, what it costs and what it gives.

Rows that look the same are the sign of a mode without effect: the public ancestor of this table had six modes with the
same latency, because its exporter had skipped them. So rows of equal latency and error are set beside each other with
the difference of their certificates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

AXES = ("quant_mode", "precision", "engine")
REASON_RULE = 10  # dashes under a column that is as wide as its longest reason
SAME_LATENCY = 0.05  # relative; CPU timings on a shared machine repeat to about this
SAME_ERROR = 1e-3  # relative; another rounding anywhere changes the error by far more
COMPARED = ("layers", "bits_per_weight", "operands", "computed_in", "stored_as", "kernels")


def engine_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of one run, one per network, from its metrics: plain data for `result.json`."""
    rows = []
    for network, entry in metrics.get("engines", {}).items():
        facts = entry["facts"]
        certificate, accuracy = facts.get("certificate", {}), facts.get("accuracy", {})
        timing = metrics.get("benchmark", {}).get(network, {}).get("summary", {})
        rows.append(
            {
                "network": network,
                "verdict": certificate.get("verdict", ""),
                "share": certificate.get("share"),
                "sentence": certificate.get("sentence", ""),
                "size_mb": facts.get("bytes", 0) / 1e6 or None,
                "p50_ms": timing.get("latency_ms_p50"),
                "p99_ms": timing.get("latency_ms_p99"),
                "absrel": accuracy.get("absrel"),
                "rotation_deg": accuracy.get("rotation_deg_max"),
                "translation_deg": accuracy.get("translation_deg_max"),
                "rel_l2": accuracy.get("rel_l2_max"),
                "not_measured": accuracy.get("not_measured", ""),
                "without_effect": certificate.get("without_effect", ""),
                "certificate": _compact(certificate),
            }
        )
    return rows


def table(jobs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of all jobs as text, refused and failed jobs with their reason. jobs: contents of `result.json`."""
    found = []
    for job in jobs:
        axes = {axis: str(job.get("choices", {}).get(axis, "")) for axis in AXES}
        if job["status"] != "ok":
            found.append({**axes, "network": "", "verdict": job["status"], "reason": _first_line(job["reason"])})
        for row in job.get("engines", []) if job["status"] == "ok" else []:
            found.append({**axes, **_shown(row)})
    columns = list(dict.fromkeys(key for row in found for key in row))
    columns = [column for column in columns if column != "reason"] + ["reason"] * ("reason" in columns)
    return [{column: row.get(column, "") for column in columns} for row in found]


def text(rows: list[dict[str, str]]) -> list[str]:
    """The table as aligned lines. Reasons come last and are as long as they are: in a column they would be folded."""
    if not rows:
        return []
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [
        {key: key for key in rows[0]},
        {key: "-" * (REASON_RULE if key == "reason" else width) for key, width in widths.items()},
        *rows,
    ]
    return ["  ".join(row[key].ljust(0 if key == "reason" else widths[key]) for key in row).rstrip() for row in lines]


def look_alikes(jobs: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every two engines of one network with the same latency and error: how their certificates differ."""
    rows = [
        (" ".join(str(job.get("choices", {}).get(axis, "")) for axis in AXES), row)
        for job in jobs
        if job["status"] == "ok"
        for row in job.get("engines", [])
    ]
    for (first, one), (second, other) in combinations(rows, 2):
        if one["network"] == other["network"] and _alike(one, other):
            yield f"{one['network']}: {first} and {second} have the same latency and error: {_difference(one, other)}"


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(
        one[key] is not None
        and other[key] is not None
        and abs(one[key] - other[key]) <= limit * max(abs(one[key]), abs(other[key]))
        for key, limit in (("p50_ms", SAME_LATENCY), ("rel_l2", SAME_ERROR))
    )


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    a, b = one["certificate"], other["certificate"]
    parts = [f"{key} {_told(a.get(key))} / {_told(b.get(key))}" for key in COMPARED if a.get(key) != b.get(key)]
    if parts:
        return "; ".join(parts)
    return f"their certificates are the same, they are the same engine: {one['sentence']}"


def _compact(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """What tells engines apart, without the list of layers."""
    if not certificate:
        return {}
    graph, engine = certificate["graph"], certificate["engine"]
    bits = [row["bits_per_weight"] for row in graph.get("layers", {}).values()]
    return {
        "layers": certificate["requested"]["layers"],
        "bits_per_weight": round(sum(bits) / len(bits), 2) if bits else None,
        "operands": {name: round(share, 3) for name, share in graph.get("operands", {}).items()},
        **{key: engine[key] for key in ("computed_in", "stored_as", "kernels")},
    }


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    share = row["share"]
    verdict = row["verdict"] + (f" {share:.0%}" if row["verdict"] == "partial" and share is not None else "")
    numbers = {
        "size MB": (row["size_mb"], ".2f"),
        "p50 ms": (row["p50_ms"], ".2f"),
        "p99 ms": (row["p99_ms"], ".2f"),
        "depth AbsRel": (row["absrel"], ".2e"),
        "rotation deg": (row["rotation_deg"], ".2g"),
        "translation deg": (row["translation_deg"], ".2g"),
        "rel L2": (row["rel_l2"], ".2e"),
    }
    shown = {name: "" if value is None else format(value, form) for name, (value, form) in numbers.items()}
    reason = "; ".join(said for said in (row["not_measured"], row.get("without_effect", "")) if said)
    return {"network": row["network"], "verdict": verdict, **shown, "reason": reason}


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return str(value)


def _first_line(text: str) -> str:
    """Without the pair, which has columns of its own."""
    line = text.partition("\n")[0]
    return line.partition(" engine=")[2].partition(": ")[2] or line
