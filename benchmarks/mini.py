"""Quality of the networks that come with the package, on 200 procedural rooms they were never trained on.

    python benchmarks/mini.py --out FILE.json [--scenes 200] [--device cpu|cuda]

Seeds 0..199, the demo's rig (4 cameras, 66 degrees). vggt-mini: depth after one scale per scene, relative poses of all
pairs. da-mini: depth after scale and shift of disparity per image. Every scene is in the JSON. A quarter of an hour on
two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # training/ is no part of the package

from recon.models.nets.config import PRESETS
from recon.weights import resolve
from training.evaluate import evaluate_da, evaluate_vggt

TARGETS = (
    ("vggt-mini depth AbsRel", "vggt", "absrel", "<=", 0.08),
    ("vggt-mini depth delta1", "vggt", "delta1", ">=", 0.93),
    ("vggt-mini relative rotation, median, degrees", "vggt", "rotation_median_deg", "<=", 3.0),
    ("vggt-mini pose AUC@30", "vggt", "auc30", ">=", 0.75),
    ("da-mini depth AbsRel", "da", "absrel", "<=", 0.10),
    ("da-mini depth delta1", "da", "delta1", ">=", 0.90),
)


def main() -> None:
    """Measure, print the table, write raw samples; exit 1 on a miss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vggt", default="packaged:vggt-mini.safetensors", help="weights, as model.weights")
    parser.add_argument("--da", default="packaged:da-mini", help="weights, as depth.weights")
    options = parser.parse_args()
    device, seeds, begin = torch.device(options.device), range(options.scenes), time.monotonic()
    vggt, da = resolve(options.vggt).file, resolve(options.da).file
    assert vggt is not None
    assert da is not None
    found = {
        "vggt": evaluate_vggt(PRESETS["vggt-mini"], vggt, seeds, device),
        "da": evaluate_da(da.parent, seeds, device),
    }
    table = [
        {"figure": name, "target": f"{sign} {target}", "measured": found[net][0][key],
         "pass": found[net][0][key] <= target if sign == "<=" else found[net][0][key] >= target}
        for name, net, key, sign, target in TARGETS
    ]  # fmt: skip
    raw = {
        "machine": {"device": options.device, "python": platform.python_version(), "torch": torch.__version__},
        "seconds": time.monotonic() - begin,
        "table": table,
        **{net: {"summary": summary, "samples": rows} for net, (summary, rows) in found.items()},
    }
    options.out.write_text(json.dumps(raw, indent=1) + "\n")
    print(f"{'figure':<46} {'target':>9} {'measured':>9}  pass")
    for row in table:
        print(f"{row['figure']:<46} {row['target']:>9} {row['measured']:>9.4f}  {'yes' if row['pass'] else 'NO'}")
    if not all(row["pass"] for row in table):
        sys.exit(1)


if __name__ == "__main__":
    main()
