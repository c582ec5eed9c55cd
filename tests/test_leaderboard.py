"""The table of a sweep: engines in rows, refused pairs too, and rows that look the same explained."""

from typing import Any

from recon.benchmark.leaderboard import engine_rows, look_alikes, table, text


def job(mode: str, precision: str, **row: Any) -> dict[str, Any]:
    """A job's `result.json` with one engine."""
    metrics = {
        "engines": {
            "net": {
                "facts": {
                    "bytes": 2_500_000,
                    "accuracy": {"absrel": 0.01, "rel_l2_max": row.get("rel_l2", 0.02), "rotation_deg_max": 1.5},
                    "certificate": {
                        "verdict": row.get("verdict", "achieved"),
                        "share": row.get("share", 1.0),
                        "sentence": "all of it",
                        "without_effect": row.get("idle", ""),
                        "requested": {"layers": {"int8 w8a8": 4}},
                        "graph": {"operands": {"fp32": 1.0}, "layers": {"a": {"bits_per_weight": 8.5}}},
                        "engine": {"computed_in": {"int8": row.get("int8", 4)}, "stored_as": {}, "kernels": {}},
                    },
                }
            }
        },
        "benchmark": {"net": {"summary": {"latency_ms_p50": row.get("p50", 10.0), "latency_ms_p99": 12.0}}},
    }
    choices = {"quant_mode": mode, "precision": precision, "engine": "onnxruntime"}
    return {"status": "ok", "reason": "", "choices": choices, "engines": engine_rows(metrics)}


REFUSED = {
    "status": "refused",
    "reason": "quant_mode=none precision=bf16 engine=onnxruntime: no kernel: none\n  remedy: another",
    "choices": {"quant_mode": "none", "precision": "bf16", "engine": "onnxruntime"},
    "engines": [],
}


def test_engines_and_refused_pairs_are_rows_of_one_table() -> None:
    rows = table([job("none", "int8", verdict="partial", share=0.82), REFUSED])
    first, second = rows
    assert (first["verdict"], first["size MB"], first["p50 ms"], first["p99 ms"]) == (
        "partial 82%",
        "2.50",
        "10.00",
        "12.00",
    )
    assert (first["depth AbsRel"], first["rotation deg"]) == ("1.00e-02", "1.5")
    assert (second["verdict"], second["reason"]) == ("refused", "no kernel: none")
    assert first.keys() == second.keys()
    lines = text(rows)
    assert len(lines) == 4
    assert lines[3].endswith("no kernel: none")
    assert lines[0].split()[:4] == ["quant_mode", "precision", "engine", "network"]
    assert text([]) == []


def test_a_precision_without_effect_is_said_in_its_row() -> None:
    idle = "int8 is in no layer: this is the engine of precision=fp32"
    (row,) = table([job("modelopt-fp8", "int8", verdict="partial", idle=idle)])
    assert (row["verdict"], row["reason"]) == ("partial 100%", idle)


def test_a_run_without_engines_has_no_rows() -> None:
    assert engine_rows({}) == []


def test_rows_that_look_the_same_are_set_beside_each_other() -> None:
    plain, other = job("none", "int8"), job("modelopt-fp8", "int8", p50=10.3)
    (line,) = look_alikes([plain, other, REFUSED])
    assert "none int8 onnxruntime and modelopt-fp8 int8 onnxruntime" in line
    assert "their certificates are the same" in line
    (line,) = look_alikes([plain, job("modelopt-fp8", "int8", int8=0)])
    assert "computed_in 4 int8 / 0 int8" in line


def test_rows_that_differ_in_latency_or_error_are_left_alone() -> None:
    plain = job("none", "int8")
    assert not list(look_alikes([plain, job("modelopt-fp8", "int8", p50=11.0)]))
    assert not list(look_alikes([plain, job("modelopt-fp8", "int8", rel_l2=0.021)]))
