"""TensorRT: strongly typed networks only, so precision lives in the ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from recon.engines import Engine, Session
from recon.errors import Refused


@dataclass
class TensorRT(Engine):
    """TensorRT (`tensorrt`) or TensorRT for RTX (`tensorrt_rtx`)."""

    not_built: ClassVar[str] = "building and running TensorRT plans is not part of this version"

    flavour: str = "tensorrt"
    """Python module to use: tensorrt or tensorrt_rtx."""
    workspace_mib: int = 0
    """Scratch memory that the builder may use, MiB; 0 = no limit."""
    optimization_level: int = 3
    """Builder effort, 0 to 5."""
    cuda_graph: bool = True
    """Replay the inference as one CUDA graph."""
    allow_host_code: bool = False
    """Load plans that carry host code. Such a plan runs code on this machine: only for plans you built."""
    compute_capability: list[str] | None = None
    """GPUs to build for, such as sm86 (tensorrt_rtx only); None = what the model's number formats allow."""

    def check(self) -> None:
        raise Refused(f"engine={self.name}: {self.not_built}", "engine=onnxruntime builds and runs on the CPU")

    def build(self, onnx: Path, out: Path) -> dict[str, Any]:
        self.check()
        return {}

    def load(self, path: Path) -> Session:
        self.check()
        raise AssertionError
