"""Accuracy of a built engine against the FP32 torch module on frames that calibration did not see."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recon.config import Config
    from recon.network import Network


@dataclass
class AccuracyOptions:
    """What is compared after every build, and the limit beyond which an engine is refused."""

    batches: int = 4
    """Inputs of the network that are compared."""

    def check(self) -> None:
        """Refuse impossible values."""


def judge(config: Config, network: Network, role: str, file: Path) -> dict[str, Any]:
    """Errors of a built file against the FP32 torch module, for its manifest."""
    from recon.compare import compare
    from recon.engines.torch import TorchSession

    if reason := config.engine.runs_here():
        return {"not_measured": reason}
    feeds = [network.example(seed) for seed in range(config.accuracy.batches)]
    with config.engine.load(file) as session:
        errors = compare(TorchSession(network, network.load()), session, feeds)
    return {"errors": {name: asdict(error) for name, error in errors.items()}}
