"""ONNX Runtime: builds by writing its own optimised graph, runs it on the CPU, CUDA or TensorRT provider."""

from __future__ import annotations

import time
from collections import Counter
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.errors import ReconError, Refused
from recon.formats import Inspection
from recon.machine import MIB, cpu_name, physical_cores, rss_mib
from recon.network import TensorSpec

if TYPE_CHECKING:
    import torch

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
LEVELS = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
ONE_FILE_LIMIT = 1_900_000_000  # bytes; protobuf ends at 2 GiB, and fused graphs can be larger than their source

TYPES = {  # ONNX Runtime's name -> (torch dtype, onnx.TensorProto number)
    "tensor(float)": ("float32", 1),
    "tensor(uint8)": ("uint8", 2),
    "tensor(int8)": ("int8", 3),
    "tensor(int32)": ("int32", 6),
    "tensor(int64)": ("int64", 7),
    "tensor(bool)": ("bool", 9),
    "tensor(float16)": ("float16", 10),
    "tensor(double)": ("float64", 11),
    "tensor(bfloat16)": ("bfloat16", 16),
}


@dataclass
class OnnxRuntime(Engine):
    """ONNX Runtime. A file built at level `all` holds layouts chosen for this CPU, so the CPU is part of its key."""

    suffix: ClassVar[str] = ".onnxruntime.engine"

    provider: str = "cpu"
    """cpu, cuda or tensorrt. One that the installed onnxruntime lacks is refused; there is no fallback."""
    threads: int = 0
    """Threads inside one operator; 0 = one per physical core."""
    optimisation: str = "all"
    """none, basic, extended or all: how far the graph is rewritten at build time."""
    arena: bool = True
    """Keep freed memory for the next inference: faster, and holds the peak for good."""
    spinning: bool = True
    """Idle threads wait busily: lowest latency alone on the machine, wasteful when cores are shared."""

    def check(self) -> None:
        super().check()
        if self.provider not in PROVIDERS:
            raise ReconError(
                f"engine.provider={self.provider}: no such provider", f"choose from {', '.join(PROVIDERS)}"
            )
        if self.optimisation not in LEVELS:
            raise ReconError(
                f"engine.optimisation={self.optimisation}: no such level", f"choose from {', '.join(LEVELS)}"
            )
        if self.threads < 0:
            raise ReconError(f"engine.threads={self.threads}: cannot be negative", "0 = one per physical core")
        if self.provider != "cpu":
            self._check_available()

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": str(onnxruntime.__version__), "provider": PROVIDERS[self.provider], "cpu": cpu_name()}

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        assert source.onnx is not None, "built from the written graph"
        return self.optimise(source.onnx, out)

    def optimise(self, onnx: Path, out: Path) -> dict[str, Any]:
        """Write ONNX Runtime's own optimised graph of any ONNX file to `out`; returns facts for its manifest."""
        self.check()
        start = time.perf_counter()
        options = self._options(self.optimisation)
        options.optimized_model_filepath = str(out)
        # without these entries the optimised file goes on referring to the weights of its source
        size = sum(file.stat().st_size for file in (onnx, data_file(onnx)) if file.exists())
        entry = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{entry}_file_name", data_file(out).name)
        inline_below = 1024 if size > ONE_FILE_LIMIT else ONE_FILE_LIMIT
        options.add_session_config_entry(f"{entry}_min_size_in_bytes", str(inline_below))
        # TensorRT takes subgraphs out that cannot be written back: its engine is the provider-neutral graph
        self._open(onnx, options, "cpu" if self.provider == "tensorrt" else self.provider)
        files = [file for file in (out, data_file(out)) if file.exists()]
        return {
            "ops": operators(out),
            "bytes": sum(file.stat().st_size for file in files),
            "threads": self._threads(),
            "build_seconds": time.perf_counter() - start,
        }

    def load(self, path: Path) -> Session:
        """Open a file that `build` wrote; it is not optimised again.

        Raises:
            ReconError: the file is missing or damaged, or the provider is not there.
        """
        return self.open(path, "none")

    def inspect(self, path: Path) -> Inspection:
        """Every layer of the optimised graph: what it computes in and what its weights are stored as."""
        from recon.engines.ort.inspection import inspect

        return inspect(path)

    def open(self, path: Path, level: str) -> OrtSession:
        """Open any ONNX file, optimised in memory to `level` (a key of LEVELS)."""
        self.check()
        before = rss_mib()
        session = self._open(path, self._options(level), self.provider)
        return OrtSession(session, path, self.provider, self._threads(), max(0.0, rss_mib() - before))

    def _open(self, path: Path, options: Any, provider: str) -> Any:
        import onnxruntime

        if not path.is_file():
            raise ReconError(f"{path}: no such file", "run stages=[export,build] first")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
        except Exception as error:  # its exceptions have no common base but Exception
            reason = str(error).strip().splitlines()[0]
            raise ReconError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {reason}",
                "the file is damaged or uses what this ONNX Runtime lacks: delete it and run again",
            ) from error
        session.disable_fallback()
        if (got := session.get_providers()[0]) != PROVIDERS[provider]:
            raise ReconError(
                f"engine.provider={provider}: ONNX Runtime fell back to {got}, so nothing would run where you asked",
                "its CUDA, cuDNN or TensorRT libraries do not load; or choose engine.provider=cpu",
            )
        return session

    def _options(self, level: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{LEVELS[level]}")
        options.intra_op_num_threads = self._threads()
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = self.arena
        options.log_severity_level = 3  # errors; hardware-specific files are known and keyed
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spinning)))
        return options

    def _threads(self) -> int:
        return self.threads or physical_cores()

    def _check_available(self) -> None:
        import onnxruntime

        if PROVIDERS[self.provider] in onnxruntime.get_available_providers():
            return
        raise Refused(
            f"engine.provider={self.provider}: the installed onnxruntime {onnxruntime.__version__} has no"
            f" {PROVIDERS[self.provider]}",
            "pip install onnxruntime-gpu in place of onnxruntime, or engine.provider=cpu",
        )


class OrtSession(Session):
    """A loaded ONNX file with fixed shapes. CPU tensors are read and written in place, without a copy."""

    def __init__(self, session: Any, path: Path, provider: str, threads: int, loaded_mib: float) -> None:
        self._session: Any = session
        self.threads = threads
        self.inputs = _specs(session.get_inputs(), path)
        self.outputs = _specs(session.get_outputs(), path)
        self._numbers = {item.name: TYPES[item.type][1] for item in [*session.get_inputs(), *session.get_outputs()]}
        files = [file for file in (path, data_file(path)) if file.exists()]
        self._file_mib = sum(file.stat().st_size for file in files) / MIB
        self._loaded_mib = loaded_mib
        self._first_run_mib: float | None = None

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        if self._session is None:
            raise self.closed_error()
        binding = self._session.io_binding()
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in feeds.items()}
        outputs = {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in self.outputs.items()
        }
        for name, tensor in kept.items():
            binding.bind_input(name, "cpu", 0, self._numbers[name], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, "cpu", 0, self._numbers[name], tuple(tensor.shape), tensor.data_ptr())
        before = rss_mib() if self._first_run_mib is None else 0.0
        self._session.run_with_iobinding(binding)
        if self._first_run_mib is None:
            self._first_run_mib = max(0.0, rss_mib() - before)
        return outputs

    def sibling(self) -> OrtSession:
        """The same loaded model: ONNX Runtime takes calls from several threads at once."""
        if self._session is None:
            raise self.closed_error()
        return copy(self)

    def memory_mib(self) -> float:
        """Weights as loaded (at least the file) plus the arena.

        Measured as growth of the process while loading and in the first inference: a lower bound, since memory that
        the process had free already is used first.
        """
        return max(self._file_mib, self._loaded_mib) + (self._first_run_mib or 0.0)

    def close(self) -> None:
        self._session = None


def data_file(path: Path) -> Path:
    """Where the external data of an ONNX file lies: beside it, `<name>.data`."""
    return path.with_name(path.name + ".data")


def operators(path: Path) -> dict[str, int]:
    """Node counts of an ONNX file by operator, `domain::Op` outside the standard domain, sorted by name."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return dict(sorted(Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node).items()))


def _specs(items: Any, path: Path) -> dict[str, TensorSpec]:
    specs = {}
    for item in items:
        if not all(isinstance(size, int) for size in item.shape) or item.type not in TYPES:
            raise ReconError(
                f"{path}: {item.name!r} is {item.type}{item.shape}: engines here have fixed shapes and plain numbers",
                "export the network at the geometry that it runs at",
            )
        specs[item.name] = TensorSpec(tuple(item.shape), TYPES[item.type][0])
    return specs
