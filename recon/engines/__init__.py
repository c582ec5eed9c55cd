"""Engines: an ONNX file (or a torch module) becomes a running session with torch tensors in and out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from recon.component import Component
from recon.errors import ReconError
from recon.formats import Inspection, LayerFormat, Recipe, RestFormat
from recon.network import Network, TensorSpec

if TYPE_CHECKING:
    import torch


class Session(ABC):
    """A loaded engine. A context manager: memory is taken on enter (or construction) and freed on exit."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    device: str = "cpu"
    """Where outputs lie: `cpu` or `cuda[:N]`. Benchmarks choose their clock by it."""
    threads: int = 0
    """Threads that one inference uses on the CPU; 0 = not known."""

    def infer(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Check names, shapes and dtypes of `feeds`, then run. Raises ReconError naming the offending input."""
        if problem := mismatch(self.inputs, feeds):
            raise ReconError(problem, f"this engine takes {self.inputs}")
        return self._run(feeds)

    @abstractmethod
    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The engine's own call, on checked feeds."""

    def buffers(self) -> dict[str, torch.Tensor]:
        """Tensors of the engine's own, by input: filled by the caller and given to `infer`, they are read where they
        lie instead of copied first. Empty where the engine has none."""
        return {}

    def sibling(self) -> Session | None:
        """A further session over the same weights, to run in another thread at the same time; each is closed on its
        own. None where the engine has to be opened again for that."""
        return None

    @abstractmethod
    def memory_mib(self) -> float:
        """Memory the session holds, MiB."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; a later `infer` raises ReconError."""

    def closed_error(self) -> ReconError:
        """What `infer` raises on a closed session."""
        return ReconError("this engine session is closed", "open a new one, and use it inside its `with` block")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def mismatch(specs: dict[str, TensorSpec], feeds: dict[str, torch.Tensor]) -> str:
    """What is wrong with the feeds, or an empty string."""
    if missing := sorted(specs.keys() ^ feeds.keys()):
        return f"inputs {sorted(feeds)}: the engine's are {sorted(specs)}, so {missing} do not match"
    for name, spec in specs.items():
        got = TensorSpec(tuple(feeds[name].shape), str(feeds[name].dtype).removeprefix("torch."))
        if got != spec:
            return f"input {name!r} is {got.dtype}{list(got.shape)}: the engine takes {spec.dtype}{list(spec.shape)}"
    return ""


@dataclass(frozen=True)
class Build:
    """What an engine is built from. `recipe()` loads weights and quantises them: call it only where they are needed.

    onnx: the written graph, precision and Q/DQ included; None for engines that start from the torch module.
    """

    network: Network
    onnx: Path | None
    recipe: Callable[[], Recipe]


@dataclass
class Engine(Component):
    """How a network runs. `builds` tells whether there is a file between network and running."""

    builds: ClassVar[bool] = True
    needs_onnx: ClassVar[bool] = True  # built from the written graph; False: from the torch module and the recipe
    suffix: ClassVar[str] = ".engine"  # after the precision; engines that may lie side by side differ in it

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        """Why this engine, on the device that it is set to, cannot carry out these formats; empty when it can.

        Asked before any work, so it may look at the device but at no file and no network.
        """
        return ""

    def runs_here(self) -> str:
        """Why a built file cannot be run on this machine; empty when it can. Such a file is built, but not compared."""
        return ""

    @abstractmethod
    def build(self, source: Build, out: Path) -> dict[str, Any]:
        """Write the engine file `out`; returns facts for the manifest: what is in it, versions, times."""

    @abstractmethod
    def load(self, path: Path) -> Session:
        """Open a built engine file."""

    @abstractmethod
    def inspect(self, path: Path) -> Inspection:
        """Format and kernel of every layer of a built file, as the engine itself reports them."""

    def look(self, network: Network, recipe: Recipe) -> Inspection:
        """As `inspect`, of an engine that builds no file: what its session computes in."""
        raise AssertionError(f"engine={self.name} builds a file: inspect it")

    def versions(self) -> dict[str, str]:
        """Tool and device versions that a built file depends on: part of its cache key."""
        return {}

    def session(self, network: Network, path: Path | None, recipe: Callable[[], Recipe] = Recipe) -> Session:
        """A running session: from the built file, or straight from the network where the engine builds none."""
        assert path is not None, "an engine that builds needs its file"
        return self.load(path)


__all__ = ["Build", "Engine", "Session"]
