"""What is checked before TensorRT sees a plan: its manifest, its hash, and whether it belongs to this machine.

A plan is a program: TensorRT trusts what it deserialises. So a plan is opened only when its manifest says that `recon`
built it, and its bytes are the ones that were built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recon.artifact import read_manifest, verify
from recon.engines.trt.library import Library, version_number
from recon.engines.trt.profiles import Profile
from recon.errors import Damaged, ReconError

CLASSIC = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")


@dataclass(frozen=True)
class PlanFacts:
    """What the manifest holds of a plan under `facts.plan`. targets: compute capabilities, e.g. `sm90`."""

    flavour: str
    version: str
    targets: tuple[str, ...]
    gpu: str = ""
    version_compatible: bool = False
    hardware_compatible: str = ""
    host_code: bool = False
    weight_streaming: bool = False
    profiles: tuple[Profile, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> PlanFacts:
        """From a manifest's plain data."""
        known = {name: data[name] for name in (item.name for item in fields(cls)) if name in data}
        known["targets"], known["profiles"] = tuple(known["targets"]), tuple(known.get("profiles", ()))
        return cls(**known)


_built: dict[str, PlanFacts] = {}  # SHA-256 of plans of this very process: compared before their manifest is written


def remember(sha256: str, facts: PlanFacts) -> None:
    """Note a plan that this process has just built."""
    _built[sha256] = facts


def vetted(path: Path) -> tuple[PlanFacts, bytes]:
    """The facts of a plan, and its bytes: those that were built.

    Raises:
        ReconError: no file, no manifest beside it, or the manifest of something else. Damaged: other bytes.
    """
    if not path.is_file():
        raise ReconError(f"{path}: no such file", "run stages=[export,build] first")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest in _built:
        return _built[digest], data
    manifest = read_manifest(path)
    verify(path.parent, manifest)
    plan = manifest.facts.get("plan")
    if manifest.kind != "engine" or path.name not in manifest.files or not isinstance(plan, dict):
        raise ReconError(
            f"{path}: its manifest is not that of a TensorRT plan", "give a plan that stages=[build] wrote"
        )
    if manifest.files[path.name]["sha256"] != digest:  # what was verified is not what was read
        raise Damaged(f"{path} changed while it was read")
    return PlanFacts.of(plan), data


def belongs(path: Path, facts: PlanFacts, library: Library, target: str, gpu: str, host_code: bool) -> None:
    """Refuse a plan that this TensorRT or this GPU cannot run, before it is deserialised.

    target, gpu: compute capability and name of the device. host_code: engine.allow_host_code.

    Raises:
        ReconError: another flavour, version or GPU, or host code that nobody allowed.
    """
    rebuild = "build it here: stages=[build]"
    if problem := _other_library(facts, library):
        raise ReconError(f"{path}: {problem}", rebuild)
    if problem := _other_gpu(facts, target, gpu):
        raise ReconError(f"{path}: {problem}", rebuild)
    if facts.host_code and not host_code:
        raise ReconError(
            f"{path}: this plan carries host code (its own lean runtime), which would run in this process",
            "engine.allow_host_code=true, for plans that you built yourself",
        )


def _other_library(facts: PlanFacts, library: Library) -> str:
    built, running = f"{facts.flavour} {facts.version}", f"{library.flavour} {library.version}"
    if (facts.flavour in CLASSIC) != (library.flavour in CLASSIC):
        return f"built by {built}; {running} cannot read its format"
    if facts.version_compatible:
        newer = version_number(facts.version)[:2] > library.number[:2]
        return f"built by {built}, which is newer than {running}: compatible plans only run forward" if newer else ""
    if library.flavour in CLASSIC[1:]:
        return f"built by {built} without engine.version_compatible=true, so {library.flavour} cannot run it"
    if version_number(facts.version) != library.number:
        return f"built by {built}; this is {running}, and plans belong to one version"
    return ""


def _other_gpu(facts: PlanFacts, target: str, gpu: str) -> str:
    built = ", ".join(facts.targets)
    if facts.flavour == "tensorrt_rtx":
        return "" if target in facts.targets else f"built for {built}; this GPU, {gpu}, is {target}"
    here, there = _number(target), min(_number(known) for known in facts.targets)
    if facts.hardware_compatible == "ampere_plus":
        return "" if here >= 80 else f"built for Ampere and newer; this GPU, {gpu}, is {target}"
    if here != there:
        return f"built for {built} ({facts.gpu}); this GPU, {gpu}, is {target}"
    if facts.hardware_compatible != "same_compute_capability" and facts.gpu != gpu:
        return f"built on {facts.gpu} and tuned for it alone; this GPU is {gpu}"
    return ""


def _number(target: str) -> int:
    return int(target.removeprefix("sm") or 0)
