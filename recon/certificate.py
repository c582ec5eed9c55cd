"""The precision certificate: what was asked for, what is in the graph, what the engine itself says, and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon.engines import Engine


def certify(engine: Engine, file: Path, source: dict[str, Any], requested: dict[str, Any]) -> dict[str, Any]:
    """The certificate of a built file, for its manifest."""
    seen = engine.inspect(file)
    verdict = "unverified" if seen.unseen else "achieved"
    return {"requested": requested, "graph": source.get("graph", {}), "verdict": verdict, "reason": seen.unseen}
