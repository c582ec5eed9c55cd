"""What a run would do, without doing it: stages, cache hits and misses, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from recon.artifact import find
from recon.config import STAGES, Config
from recon.reconstruct import bootstrap_key, bootstrap_path
from recon.store import Store


def plan(config: Config) -> list[dict[str, str]]:
    """One row per stage and artifact: what would be reused, what would be made, and the memory it would take.

    Raises:
        ReconError: the source's files would not pass its check.
    """
    if {"reconstruct", "evaluate"} & set(config.stages):
        config.source.validate()
    store = Store(config)
    rows: list[dict[str, str]] = []
    for stage in STAGES:
        if stage in config.stages:
            found = list(_rows(stage, store))
            rows += found or [{"stage": stage, "artifact": "-", "key": "-", "cache": "always runs", "memory": "-"}]
    return rows


def _rows(stage: str, store: Store) -> Iterator[dict[str, str]]:
    force = stage in store.config.force
    if stage == "export":
        for network in store.networks().values():
            yield _row(stage, store.onnx_path(network), "onnx", store.onnx_key(network), network.memory_mib, force)
    if stage == "build" and store.config.engine.builds:
        for network in store.networks().values():
            yield _row(
                stage, store.engine_path(network), "engine", store.engine_key(network), network.memory_mib, force
            )
    if stage == "reconstruct":
        key = bootstrap_key(store)
        fresh = force or store.config.fresh_bootstrap
        yield _row(stage, bootstrap_path(store, key), "bootstrap", key, 0.0, fresh)


def _row(stage: str, path: Path, kind: str, key: str, memory_mib: float, force: bool) -> dict[str, str]:
    cache = "redone (forced)" if force else "hit" if find(path, kind, key) else "miss"
    memory = f"about {memory_mib:.0f} MiB" if memory_mib else "-"
    return {"stage": stage, "artifact": path.name, "key": key[:12], "cache": cache, "memory": memory}
