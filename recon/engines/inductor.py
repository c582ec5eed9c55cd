"""Inductor: torch.export and an ahead-of-time compiled package; FP8 and INT8 products where hardware has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.errors import ReconError
from recon.formats import Inspection, LayerFormat, RestFormat
from recon.lowbit.support import device_name, refusal, require_device


@dataclass
class Inductor(Engine):
    """AOTInductor package (`.pt2`) for the CPU or CUDA, built from the torch module and the recipe.

    FP8 layers are scaled matrix products, INT8 layers integer matrix products, weight-only layers are stored in 8 or 4
    bits and dequantised in front of a product in the rest's format. Building needs a C++ compiler.
    """

    needs_onnx: ClassVar[bool] = False
    suffix: ClassVar[str] = ".pt2"

    device: str = "cpu"
    """cpu, cuda or cuda:N: packages run only on what they were compiled for."""
    max_autotune: bool = False
    """Time several kernels per operator at build and keep the fastest: minutes longer."""
    cuda_graph: bool | None = None
    """Record the first inference as a CUDA graph and replay it; null: on CUDA. Not for the CPU."""
    allow_foreign: bool = False
    """Open packages that have no manifest of recon. They hold native code, which runs when they are opened."""

    def check(self) -> None:
        super().check()
        require_device(self.device)
        if self.cuda_graph and self.device == "cpu":
            raise ReconError("engine.cuda_graph=true with engine.device=cpu", "engine.cuda_graph=null, or device=cuda")

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        return refusal(formats, rest, self.device)

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__), "device": device_name(self.device)}

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        """Compile; then run once and see that the outputs are finite.

        Raises:
            ReconError: no C++ compiler, not enough memory, an operation that cannot be compiled, or a number format
                that overflows.
        """
        from recon.engines.aoti.compile import build, require_finite

        self.check()
        facts = build(source, out, self.device, self.max_autotune)
        with self.load(out) as session:
            require_finite(session, source.network, facts["rest"])
        return facts

    def load(self, path: Path) -> Session:
        """Open a package: one with our manifest, compiled for this PyTorch and this device.

        Raises:
            ReconError: the file is not ours, is damaged, or was compiled for another machine.
        """
        from recon.engines.aoti.package import read, require_fitting, require_trusted
        from recon.engines.aoti.session import InductorSession

        self.check()
        if not self.allow_foreign:
            require_trusted(path)
        identity, _ = read(path)
        require_fitting(path, identity, self.device)
        graphs = self.device != "cpu" if self.cuda_graph is None else self.cuda_graph
        return InductorSession(path, identity, self.device, graphs)

    def inspect(self, path: Path) -> Inspection:
        from recon.engines.aoti.inspection import inspect

        return inspect(path)
