"""TensorRT: strongly typed networks only, so precision lives in the ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recon.engines import Build, Engine, Session
from recon.engines.trt import profiles, targets
from recon.engines.trt.library import FLAVOURS, Library, library
from recon.errors import ReconError, Refused
from recon.formats import Inspection, LayerFormat, RestFormat

COMPATIBLE = ("", "ampere_plus", "same_compute_capability")


@dataclass
class TensorRT(Engine):
    """TensorRT (`tensorrt` 10.10 to 11.x), TensorRT for RTX (`tensorrt_rtx`), or a runtime that only runs plans."""

    flavour: str = "tensorrt"
    """Python module: tensorrt, tensorrt_rtx, or tensorrt_lean and tensorrt_dispatch, which run plans and build none."""
    workspace_mib: int = 0
    """Scratch memory that the builder may use, MiB; 0 = no limit."""
    optimization_level: int = 3
    """Builder effort, 0 to 5."""
    tf32: bool = True
    """FP32 products with TF32 inputs (10 bits of mantissa), TensorRT's own default; false = true FP32."""
    cuda_graph: bool = True
    """Replay the inference as one CUDA graph."""
    profiles: list[dict[str, dict[str, list[int]]]] = field(default_factory=list)
    """Ranges of dynamic shapes: per profile, input name -> {min, opt, max}. Empty: the graph's shapes are fixed."""
    compute_capability: list[str] | None = None
    """GPUs to build for, such as [sm86,sm89,sm120] (tensorrt_rtx only); None = all that the number formats allow."""
    version_compatible: bool = False
    """A plan that newer TensorRT runs too. It carries its own lean runtime: host code. Not for tensorrt_rtx."""
    hardware_compatible: str = ""
    """ampere_plus or same_compute_capability: a plan for more than the GPU it is built on. Not for tensorrt_rtx."""
    weight_streaming: bool = False
    """Keep weights in host memory and stream them through the GPU, for networks that do not fit."""
    weight_budget_mib: int | None = None
    """Weights that stay on the GPU while streaming, MiB; None = as much as TensorRT proposes."""
    allow_host_code: bool = False
    """Load plans that carry host code. Such a plan runs code on this machine: only for plans you built."""

    def __post_init__(self) -> None:
        if self.flavour == "tensorrt_rtx":
            self.suffix = ".rtx.engine"  # type: ignore[misc]  # may lie beside the plan of classic TensorRT

    def check(self) -> None:
        super().check()
        if self.flavour not in FLAVOURS:
            raise ReconError(f"engine.flavour={self.flavour}: no such flavour", f"choose from {', '.join(FLAVOURS)}")
        if self.workspace_mib < 0 or not 0 <= self.optimization_level <= 5:
            raise ReconError(
                f"engine.workspace_mib={self.workspace_mib} optimization_level={self.optimization_level}:"
                " at least 0, and 0 to 5",
                "0 and 3 are the defaults",
            )
        if self.weight_budget_mib is not None and (self.weight_budget_mib < 0 or not self.weight_streaming):
            raise ReconError(
                f"engine.weight_budget_mib={self.weight_budget_mib}: not negative, and only with weight_streaming",
                "leave it out, or engine.weight_streaming=true",
            )
        self._check_reach()
        profiles.check(self.profiles)
        library(self.flavour)

    def _check_reach(self) -> None:
        """Options that widen where a plan runs differ between the two kinds of TensorRT."""
        portable = self.flavour == "tensorrt_rtx"
        if self.hardware_compatible not in COMPATIBLE:
            raise ReconError(
                f"engine.hardware_compatible={self.hardware_compatible}: no such level", f"one of {COMPATIBLE[1:]}"
            )
        if portable and (self.version_compatible or self.hardware_compatible):
            raise ReconError(
                "engine.version_compatible and hardware_compatible are not for tensorrt_rtx",
                "its plans name their GPUs instead: engine.compute_capability=[sm86,sm89,sm120]",
            )
        if not portable and self.compute_capability is not None:
            raise ReconError(
                f"engine.compute_capability={self.compute_capability}: {self.flavour} builds for the GPU it runs on",
                "engine=tensorrt-rtx builds for others; engine.hardware_compatible=ampere_plus widens a plan",
            )
        for target in self.compute_capability or ():
            if target not in targets.RTX_TARGETS:
                raise ReconError(
                    f"engine.compute_capability: {target} is none of TensorRT for RTX's GPUs",
                    f"choose from {', '.join(targets.RTX_TARGETS)}",
                )
        if self.compute_capability is not None and len(set(self.compute_capability)) != len(self.compute_capability):
            raise ReconError(f"engine.compute_capability={self.compute_capability}: one named twice", "name each once")

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        found = targets.needs(formats, rest, portable=self.flavour == "tensorrt_rtx")
        if self.flavour == "tensorrt_rtx":
            able = targets.able(found)
            if not able:
                return f"no GPU that TensorRT for RTX knows has {' and '.join(need.what for need in found)}"
            return targets.lacking(self.compute_capability or able, found)
        try:
            classic = library(self.flavour)
        except Refused as refusal:
            return refusal.problem
        if not classic.builds:
            return f"{self.flavour} only runs plans; they are built with engine.flavour=tensorrt"
        here = targets.here()
        if not here:
            return "TensorRT builds on an NVIDIA GPU, and PyTorch sees none here; engine=tensorrt-rtx builds without"
        if any(layer.activation == "nvfp4-dynamic" for layer in formats) and classic.number < (11,):
            return f"TensorRT {classic.version} has no dynamic NVFP4 quantisation of activations; 11.0 has"
        return targets.lacking([here], found)

    def plain_profiles(self) -> list[dict[str, dict[str, list[int]]]]:
        """The profiles as plain lists and dictionaries."""
        return [
            {name: {at: list(size) for at, size in points.items()} for name, points in one.items()}
            for one in self.profiles
        ]

    def versions(self) -> dict[str, str]:
        """TensorRT; for plans that belong to one GPU also its name and driver."""
        found = library(self.flavour)
        known = {found.flavour: found.version}
        return known if found.portable else known | _device()

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        from recon.engines.trt.builder import build

        self.check()
        assert source.onnx is not None, "TensorRT builds from the written graph"
        return build(self, self._builder(), source.onnx, out)

    def _builder(self) -> Library:
        found = library(self.flavour)
        if not found.builds:
            raise Refused(f"engine.flavour={self.flavour} only runs plans", "engine.flavour=tensorrt builds them")
        return found

    def runs_here(self) -> str:
        from recon.engines.trt.shared import cannot_run

        return cannot_run(self)

    def load(self, path: Path) -> Session:
        from recon.engines.trt.session import TensorRTSession
        from recon.engines.trt.shared import opened

        self.check()
        return TensorRTSession(opened(path, self), cuda_graph=self.cuda_graph)

    def inspect(self, path: Path) -> Inspection:
        from recon.engines.trt.shared import inspected

        return inspected(path, self)


def _device() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {"gpu": str(torch.cuda.get_device_name()), "cuda": str(torch.version.cuda)}
    driver = Path("/proc/driver/nvidia/version")
    return found | ({"driver": driver.read_text().splitlines()[0]} if driver.is_file() else {})
