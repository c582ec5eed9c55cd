"""Quantised trained networks against the truth: vggt-mini and da-mini in every mode, on rooms that nothing has seen.

    python benchmarks/quant_trained.py --out FILE.json [--scenes 24] [--keep vggt.json da.json] [--pairs none:int8 ...]

Engines are those of sweeps/quant-trained.yaml (ONNX Runtime on the CPU, what int8 and fp8 leave alone in FP32),
calibrated on room 1000; rooms 0..scenes-1 are judged, as in benchmarks/mini.py. FP8 and four-bit engines are
rounded exactly and multiplied in FP32 there, so their quality is that of any engine and their speed is not. --keep:
keep-lists of stages=[sensitivity] for the two networks; the pairs that calibrate are measured with and without them.
Exit code 1 when INT8 or FP8 with the keep-lists (without, where none are given) lose more than 2 % of AbsRel or one
point of AUC@30.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as recon.app does
sys.path.insert(0, str(Path(__file__).parent.parent))  # training/ is no part of the package

import torch
from hydra import compose, initialize_config_dir

from recon.config import CONF, Config, register, to_config
from recon.engines import Session
from recon.store import Store, built
from training.evaluate import judge_da, judge_vggt

PAIRS = (
    "none:fp32", "none:int8", "none:fp8", "torch-int8-dynamic:fp32", "bitsandbytes-8bit:fp32",
    "bitsandbytes-nf4:fp32", "bitsandbytes-fp4:fp32", "modelopt-fp8:fp32",
)  # fmt: skip
CALIBRATED = ("none:int8", "none:fp8", "modelopt-fp8:fp32")
LIMITS = {"absrel": 0.02, "auc30": 0.01}  # relative loss of AbsRel, absolute loss of AUC@30 (one point of 100)


def main() -> None:
    """Build, measure, print the table, write raw samples; exit 1 on a miss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--keep", type=Path, nargs=2, metavar=("VGGT", "DA"))
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    parser.add_argument("--output", default="outputs", help="folder of the artifact store")
    options = parser.parse_args()
    register()
    begin, rows = time.monotonic(), []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for pair in options.pairs:
            for keep in [[], [str(file) for file in options.keep]] if options.keep and pair in CALIBRATED else [[]]:
                rows.append(measured(pair, keep, options))
                print(line(rows[-1]), flush=True)
    misses = list(missed(rows, bool(options.keep)))
    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    raw = {"machine": machine, "scenes": options.scenes, "seconds": time.monotonic() - begin, "rows": rows}
    options.out.write_text(json.dumps({**raw, "misses": misses}, indent=1) + "\n")
    for text in ["", *table(rows), "", *(misses or ["every limit is kept"])]:
        print(text)
    sys.exit(1 if misses else 0)


def measured(pair: str, keep: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One row: verdicts, errors against FP32 and against the truth."""
    mode, _, precision = pair.partition(":")
    overrides = ["+sweep=quant-trained", f"quant_mode={mode}", f"precision={precision}", f"output={options.output}"]
    config = composed([*overrides, *([f"quant_mode.keep=[{','.join(keep)}]"] if keep else [])])
    store, seeds, cpu = Store(config), range(options.scenes), torch.device("cpu")
    row: dict[str, Any] = {"quant_mode": mode, "precision": precision, "keep": bool(keep)}
    for role, network in store.networks().items():
        artifact = built(store, network)
        facts = artifact.manifest.facts
        with config.engine.load(artifact.path) as session:
            judge, call = (judge_vggt, as_vggt(session)) if role == "model" else (judge_da, as_da(session))
            summary, samples = judge(call, seeds, cpu)
        certificate = {key: facts["certificate"][key] for key in ("verdict", "share", "sentence")}
        against_fp32 = {key: value for key, value in facts["accuracy"].items() if isinstance(value, float)}
        row[role] = {"summary": summary, "samples": samples, "against_fp32": against_fp32, "mb": facts["bytes"] / 1e6}
        row[role] |= certificate
    return row


def composed(overrides: list[str]) -> Config:
    """The configuration as the command would compose it."""
    from omegaconf import OmegaConf, open_dict

    found = compose("config", overrides=overrides, return_hydra_config=True)
    choices = OmegaConf.to_container(found.hydra.runtime.choices)
    with open_dict(found):
        del found["hydra"]
    assert isinstance(choices, dict)
    config = to_config(found, {str(key): value for key, value in choices.items()})
    engine = replace(config.engine, spinning=False, threads=1)  # nothing is timed: the same numbers on busy cores
    return replace(config, stages=["build"], engine=engine)


def as_vggt(session: Session) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The session as the module that it was built from."""
    return lambda images: tuple(session.infer({"images": images.contiguous()}).values())


def as_da(session: Session) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """One image after another: the engine takes one."""
    return lambda images: (torch.cat([session.infer({"pixel_values": one[None]})["disparity"] for one in images]),)


def missed(rows: Sequence[dict[str, Any]], kept: bool) -> list[str]:
    """What INT8 and FP8 lose beyond the limits, in words. None without an FP32 row to compare with."""
    plain = next((row for row in rows if (row["quant_mode"], row["precision"]) == ("none", "fp32")), None)
    found = []
    for row in rows if plain is not None else ():
        name = f"{row['quant_mode']}:{row['precision']}"
        if name not in CALIBRATED or row["keep"] != kept:
            continue
        for role, key in (("model", "absrel"), ("depth", "absrel"), ("model", "auc30")):
            before, after = (one[role]["summary"][key] for one in (plain, row))
            lost = after / before - 1 if key == "absrel" else before - after
            if lost > LIMITS[key]:
                found.append(f"{name} {role}: {key} {before:.4f} -> {after:.4f}, beyond {LIMITS[key]:.0%}")
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    head = "| quant_mode | precision | kept | verdicts | MB | VGGT AbsRel | AUC@30 | rotation | DA AbsRel | delta1 |"
    return [head, "|---|---|---|---|---|---|---|---|---|---|", *(line(row) for row in rows)]


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    model, depth = row["model"], row["depth"]
    a, b = model["summary"], depth["summary"]
    return (
        f"| {row['quant_mode']} | {row['precision']} | {'list' if row['keep'] else '-'} |"
        f" {model['verdict']}, {depth['verdict']} | {model['mb']:.1f} + {depth['mb']:.1f} | {a['absrel']:.4f} |"
        f" {a['auc30']:.4f} | {a['rotation_median_deg']:.2f} | {b['absrel']:.4f} | {b['delta1']:.4f} |"
    )


if __name__ == "__main__":
    main()
