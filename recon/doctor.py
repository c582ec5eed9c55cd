"""`python -m recon.doctor`: what this machine can and cannot do with recon, and why."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from recon.component import Component
from recon.errors import ReconError, Refused
from recon.machine import cpu_name

PACKAGES = {
    "torch": "networks, export, the reference engine",
    "onnx": "export",
    "onnxscript": "export",
    "onnxsim": "simplified graphs; without it graphs stay as exported",
    "onnxruntime": "engine=onnxruntime and the check of every export",
    "transformers": "Depth Anything V2",
    "open3d": "fusion=tsdf, mesh evaluation",
    "mlflow": "tracking=mlflow; tracking=none works without",
    "rerun-sdk": "viewer=rerun",
    "av": "stages=[depth]: its videos",
    "hydra-joblib-launcher": "parallel sweeps with hydra/launcher=joblib",
    "tensorrt": "engine=tensorrt",
    "tensorrt-rtx": "engine=tensorrt with portable plans",
    "nvidia-modelopt": "quant_mode=modelopt-*",
    "bitsandbytes": "quant_mode=bitsandbytes-*",
}
ALTERNATIVE_NAMES = {
    "open3d": ("open3d-cpu",),
    "tensorrt": ("tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}


def main() -> None:
    """Print the report; exit 1 only when the default run cannot work."""
    from recon.report import print_table

    print_table("Machine", [{"what": name, "found": value} for name, value in machine().items()])
    print_table("Packages", packages())
    print_table("Options", option_rows())
    problems = [check() for check in (_open3d, _onnxruntime, _store)]
    for line in filter(None, problems):
        sys.stderr.write(f"problem: {line}\n")
    raise SystemExit(1 if any(problems) else 0)


def machine() -> dict[str, str]:
    """Interpreter, processor, GPU and driver."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": cpu_name()}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["gpu"] = "none (nvidia-smi not found or without answer): engines run on the CPU"
    return found


def packages() -> list[dict[str, str]]:
    """Every package that something depends on, with what its absence disables."""
    rows = []
    for name, purpose in PACKAGES.items():
        version = next(filter(None, (version_of(alias) for alias in (name, *ALTERNATIVE_NAMES.get(name, ())))), "")
        rows.append({"package": name, "version": version or "missing", "for": purpose})
    return rows


def option_rows() -> list[dict[str, str]]:
    """Every option of every group: usable, or refused and why; with the licence of its weights."""
    from recon.config import CONF, GROUPS, option

    rows = []
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            licence = ""
            try:
                found = option(group, path.stem)
                licence = str(getattr(found, "licence", ""))
                found.check()
                state = _weights_elsewhere(found) or "ok"
            except Refused as refusal:
                state = f"refused: {refusal.problem}"
            except ReconError as missing:
                state = missing.problem
            rows.append({"group": group, "option": path.stem, "state": state, "licence": licence})
    return rows


def _weights_elsewhere(found: Component) -> str:
    """What is to be said of weights that the first use fetches; empty where there is nothing to fetch."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from recon.weights import resolve

    reference = getattr(found, "weights", "")
    hub = resolve(reference, getattr(found, "revision", "main")).hub if reference else None
    if hub is None or (Path(HF_HUB_CACHE) / f"models--{hub[0].replace('/', '--')}").is_dir():
        return ""
    return f"ok; weights {hub[0]} are not here, the first run fetches them"


def version_of(package: str) -> str:
    """Installed version, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine_tags() -> dict[str, str]:
    """Tags of a tracked run: commit, dirty flag, processor."""
    tags = {"processor": cpu_name(), "python": platform.python_version()}
    git: Callable[[str], str] = lambda args: subprocess.run(  # noqa: E731
        ["git", *args.split()], capture_output=True, text=True, timeout=5, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    try:
        tags |= {
            "git_commit": git("rev-parse HEAD"),
            "git_dirty": str(bool(git("status --porcelain --untracked-files=no"))),
        }
    except (OSError, subprocess.SubprocessError):
        tags["git_commit"] = "not a git checkout"
    return tags


def _open3d() -> str:
    from recon.optional import open3d

    try:
        open3d()
    except ReconError as error:
        return str(error)
    return ""


def _onnxruntime() -> str:
    return (
        ""
        if version_of("onnxruntime") or version_of("onnxruntime-gpu")
        else "onnxruntime is missing: pip install onnxruntime"
    )


def _store() -> str:
    from recon.artifact import write_atomic

    probe = Path("outputs") / ".probe"
    try:
        write_atomic(probe, "")
        probe.unlink()
    except ReconError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
