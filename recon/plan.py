"""What a run would do, without doing it: stages, cache hits and misses, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recon.artifact import find
from recon.config import STAGES, Config
from recon.preflight import preflight
from recon.reconstruct import bootstrap_key, bootstrap_path
from recon.store import Store


def plan(config: Config) -> list[dict[str, str]]:
    """One row per stage and artifact: what would be reused, what would be made, and the memory it would take.

    Raises:
        ReconError: the run would be refused for the source's files, or for what other options say of its cameras.
    """
    preflight(config)
    store = Store(config)
    rows: list[dict[str, str]] = []
    for stage in STAGES:
        if stage in config.stages:
            found = list(_rows(stage, store))
            rows += found or [
                {"stage": stage, "artifact": "-", "key": "-", "cache": _without(stage, store), "memory": "-"}
            ]
    return rows


def _rows(stage: str, store: Store) -> Iterator[dict[str, str]]:
    force = stage in store.config.force
    networks = store.networks().values()
    if stage == "export" and store.exports:
        for network in networks:
            yield _row(stage, store.base_path(network), "onnx", store.base_key(network), network.memory_mib, force)
    if stage == "calibrate" and store.needs_calibration:
        for network in networks:
            key = store.ranges_key(network, store.role(network))
            yield _row(stage, store.ranges_path(network), "calibration", key, network.memory_mib, force)
    if stage == "sensitivity":
        for network in networks:
            memory = f"about {2 * network.memory_mib:.0f} MiB" if network.memory_mib else "-"
            keep = f"keep_{network.name}.json"
            yield {"stage": stage, "artifact": keep, "key": "-", "cache": "always runs", "memory": memory}
    if stage == "build" and store.config.engine.builds:
        for network in networks:
            if store.config.engine.needs_onnx and not store.plain:
                yield _row(stage, store.onnx_path(network), "onnx", store.onnx_key(network), network.memory_mib, force)
            key = store.engine_key(network)
            yield _row(stage, store.engine_path(network), "engine", key, network.memory_mib, force)
    if stage == "reconstruct":
        key = bootstrap_key(store)
        fresh = force or store.config.fresh_bootstrap
        yield _row(stage, bootstrap_path(store, key), "bootstrap", key, 0.0, fresh)


def _without(stage: str, store: Store) -> str:
    """What stands in the plan for a stage that makes no artifact."""
    if stage == "calibrate":
        return "not needed" if not store.needs_calibration else "no network"
    if stage in ("export", "sensitivity") and not store.networks():
        return "no network"
    return "not needed" if stage in ("build", "export") else "always runs"


def _row(stage: str, path: Path, kind: str, key: str, memory_mib: float, force: bool) -> dict[str, str]:
    cache = "redone (forced)" if force else "hit" if find(path, kind, key) else "miss"
    memory = f"about {memory_mib:.0f} MiB" if memory_mib else "-"
    return {"stage": stage, "artifact": path.name, "key": key[:12], "cache": cache, "memory": memory}
