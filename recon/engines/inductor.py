"""Inductor: the module compiled ahead of time, or recon's own kernels; FP8 and INT8 where hardware has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.errors import ReconError
from recon.formats import Inspection, LayerFormat, RestFormat
from recon.kernels import FORM_VERSION
from recon.lowbit.support import device_name, refusal
from recon.machine import require_device

KERNELS = ("auto", "recon", "inductor")


@dataclass
class Inductor(Engine):
    """Package (`.pt2`) for the CPU or CUDA, built from the torch module and the recipe: AOTInductor's, or weights for
    recon's kernels where these know the network, the recipe and the GPU.

    FP8 layers are scaled matrix products, INT8 layers integer matrix products, weight-only layers are stored in 8 or 4
    bits and dequantised in front of a product in the rest's format. Inductor's packages need a C++ compiler to build.
    """

    needs_onnx: ClassVar[bool] = False
    suffix: ClassVar[str] = ".pt2"

    device: str = "cpu"
    """cpu, cuda or cuda:N: packages run only on what they were compiled for."""
    kernels: str = "auto"
    """recon: the network's fast form with `recon.kernels` (compute capability 9.0; on the CPU their torch twins, for
    tests). inductor: the plain network, compiled. auto: recon on CUDA where that carries out all that is asked for,
    else inductor; which it was, and why, is in the manifest."""
    fp8_scores: bool = False
    """With recon's kernels and FP8 layers: attention's scores from FP8 queries and keys where the network normalises
    them (VGGT's trunk), and every second softmax weight to within 4 % of its power of two (docs/speed.md). Not part of
    what `precision` says, so it has to be asked for."""
    max_autotune: bool = False
    """Time several kernels per operator at build and keep the fastest: minutes longer."""
    cuda_graph: bool | None = None
    """Record an inference as a CUDA graph when a package is opened, and replay it; null: on CUDA. Not for the CPU."""
    allow_foreign: bool = False
    """Open packages that have no manifest of recon. They hold native code, which runs when they are opened."""

    def check(self) -> None:
        super().check()
        require_device(self.device, "engine.device")
        if self.cuda_graph and self.device == "cpu":
            raise ReconError("engine.cuda_graph=true with engine.device=cpu", "engine.cuda_graph=null, or device=cuda")
        if self.kernels not in KERNELS:
            raise ReconError(f"engine.kernels={self.kernels}: not known", f"choose one of {', '.join(KERNELS)}")
        if self.kernels == "inductor" and self.fp8_scores:
            raise ReconError(
                "engine.fp8_scores=true with engine.kernels=inductor: only recon's kernels have such scores",
                "engine.kernels=auto, or engine.fp8_scores=false",
            )
        if self.kernels == "recon" and self.max_autotune:
            raise ReconError(
                "engine.kernels=recon with engine.max_autotune=true: only Inductor's kernels are tuned",
                "engine.max_autotune=false, or engine.kernels=inductor",
            )

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        reason = refusal(formats, rest, self.device)
        if not reason and self.fp8_scores and all(asked.activation != "fp8" for asked in formats):
            reason = "engine.fp8_scores=true goes with FP8 layers, and none is asked for"
        if reason or (self.kernels != "recon" and not self.fp8_scores):
            return reason
        from recon.engines.aoti.form import why_not_on
        from recon.lowbit.fast import why_not_formats

        return why_not_formats(formats, rest) or why_not_on(self.device)

    def versions(self) -> dict[str, str]:
        import torch

        found = {"torch": str(torch.__version__), "device": device_name(self.device)}
        return found if self.kernels == "inductor" else found | {"form": FORM_VERSION}

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        """Compile, or convert for recon's kernels; then run once and see that the outputs are finite.

        Raises:
            ReconError: no C++ compiler, not enough memory, an operation that cannot be compiled, or a number format
                that overflows.
        """
        from recon.engines.aoti.compile import build, require_finite

        self.check()
        facts = build(source, out, self.device, self.max_autotune, self.kernels, self.fp8_scores)
        with self.load(out) as session:
            require_finite(session, source.network, facts["rest"])
        return facts

    def load(self, path: Path) -> Session:
        """Open a package: one with our manifest, compiled for this PyTorch and this device.

        On CUDA this takes as long as kernels take to compile (seconds, less where their caches on disk are warm), and
        no inference after it compiles anything.

        Raises:
            ReconError: the file is not ours, is damaged, or was compiled for another machine; it needs more memory than
                there is, or cannot be run here.
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
