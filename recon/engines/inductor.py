"""Inductor: torch.export and an ahead-of-time compiled package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.errors import Refused
from recon.formats import Inspection


@dataclass
class Inductor(Engine):
    """AOTInductor package (`.pt2`) for the CPU or CUDA."""

    not_built: ClassVar[str] = "compiling packages with AOTInductor is not part of this version"
    suffix: ClassVar[str] = ".pt2"

    device: str = "cpu"
    """cpu or cuda: packages run only where they were compiled for."""
    max_autotune: bool = False
    """Time several kernels per operator at build and keep the fastest: minutes longer."""

    def check(self) -> None:
        raise Refused(
            f"engine={self.name}: {self.not_built}",
            "engine=torch runs the module itself, engine=onnxruntime a built file",
        )

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        self.check()
        return {}

    def inspect(self, path: Path) -> Inspection:
        self.check()
        raise AssertionError

    def load(self, path: Path) -> Session:
        self.check()
        raise AssertionError
