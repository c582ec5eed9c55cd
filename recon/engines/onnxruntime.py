"""ONNX Runtime: builds by writing its own optimised graph, runs it on the CPU, CUDA or TensorRT provider."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.engines.ort.failures import explained
from recon.engines.ort.files import copied, graph_shapes
from recon.engines.ort.session import OrtCudaSession, OrtSession, data_file, dynamic_shapes
from recon.engines.ort.support import Rewrites, refusal, rewrites
from recon.engines.trt import profiles
from recon.errors import ReconError, Refused
from recon.formats import Inspection, LayerFormat, RestFormat
from recon.machine import MIB, cpu_name, physical_cores, rss_mib
from recon.onnxgraph import MODULES_KEY, modules_of

if TYPE_CHECKING:
    import torch

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
LEVELS = {"none": "DISABLE_ALL", "basic": "ENABLE_BASIC", "extended": "ENABLE_EXTENDED", "all": "ENABLE_ALL"}
ONE_FILE_LIMIT = 1_900_000_000  # bytes; protobuf ends at 2 GiB, and fused graphs can be larger than their source
NOT_HELD_BACK = Rewrites()
FIRST_DEVICE = "cuda:0"
"""The providers' own default. With a `device_id` ONNX Runtime (1.26 and later) first looks for a provider that was
registered as a plug-in, and warns for each session that it found none, before it takes the built-in one."""


@dataclass
class OnnxRuntime(Engine):
    """ONNX Runtime. A file built at level `all` holds layouts chosen for this CPU, so the CPU is part of its key."""

    suffix: ClassVar[str] = ".onnxruntime.engine"

    provider: str = "cpu"
    """cpu, cuda or tensorrt. One that the installed onnxruntime lacks is refused; there is no fallback, neither of the
    whole engine nor of single operators."""
    threads: int = 0
    """Threads inside one operator; 0 = one per physical core."""
    optimisation: str = "all"
    """none, basic, extended or all: how far the graph is rewritten at build time. Without effect for tensorrt."""
    arena: bool = True
    """Keep freed memory for the next inference: faster, and holds the peak for good."""
    spinning: bool = True
    """Idle threads wait busily: lowest latency alone on the machine, wasteful when cores are shared."""
    tf32: bool = True
    """FP32 products with TF32 inputs (10 bits of mantissa) on the cuda provider, ONNX Runtime's own default there;
    false = true FP32."""
    profiles: list[dict[str, dict[str, list[int]]]] = field(default_factory=list)
    """Ranges of dynamic shapes: per profile, input name -> {min, opt, max}; what lies in none is refused. Empty: the
    graph's shapes are fixed."""

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
        if not self.tf32 and self.provider != "cuda":
            raise ReconError(
                f"engine.tf32=false has no effect with engine.provider={self.provider}",
                "leave it out: the CPU computes in FP32; or engine.provider=cuda",
            )
        profiles.check(self.profiles)
        if self.threads < 0:
            raise ReconError(f"engine.threads={self.threads}: cannot be negative", "0 = one per physical core")
        if self.provider != "cpu":
            self._check_available()

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        return refusal(self.provider, formats, rest)

    def versions(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": str(onnxruntime.__version__), "provider": PROVIDERS[self.provider], "cpu": cpu_name()}

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        assert source.onnx is not None, "built from the written graph"
        return self.optimise(source.onnx, out)

    def optimise(self, onnx: Path, out: Path) -> dict[str, Any]:
        """Write ONNX Runtime's own optimised graph of any ONNX file to `out` (for TensorRT's provider the graph as it
        is); returns facts for its manifest.

        Raises:
            ReconError: the file is damaged, or has an operator or a type that ONNX Runtime cannot run (named).
        """
        self.check()
        start = time.perf_counter()
        held_back = self._as_written(onnx, out) if self.provider == "tensorrt" else self._optimised(onnx, out)
        _keep_modules(onnx, out)
        files = [file for file in (out, data_file(out)) if file.exists()]
        return {
            "ops": operators(out),
            "bytes": sum(file.stat().st_size for file in files),
            "threads": self._threads(),
            "held_back": held_back.facts(),
            "build_seconds": time.perf_counter() - start,
        }

    def _optimised(self, onnx: Path, out: Path) -> Rewrites:
        held_back = rewrites(onnx, self.provider)
        options = self._options(self.optimisation)
        options.optimized_model_filepath = str(out)
        # without these entries the optimised file goes on referring to the weights of its source
        size = sum(file.stat().st_size for file in (onnx, data_file(onnx)) if file.exists())
        entry = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{entry}_file_name", data_file(out).name)
        inline_below = 1024 if size > ONE_FILE_LIMIT else ONE_FILE_LIMIT
        options.add_session_config_entry(f"{entry}_min_size_in_bytes", str(inline_below))
        profiles.fit(self.profiles, dynamic_shapes(self._open(onnx, options, self.provider, held_back)))
        return held_back

    def _as_written(self, onnx: Path, out: Path) -> Rewrites:
        """TensorRT compiles the graph when it is loaded, and the CPU provider's rewrites would stand in its way: Casts
        around FP16 nodes, and layouts that TensorRT does not know."""
        copied(onnx, out)
        profiles.fit(self.profiles, graph_shapes(out))
        return NOT_HELD_BACK

    def load(self, path: Path) -> Session:
        """Open a file that `build` wrote; it is not optimised again.

        Raises:
            ReconError: the file is missing or damaged, or the provider is not there.
        """
        return self.open(path, "none")

    def inspect(self, path: Path) -> Inspection:
        """Every layer of the optimised graph: what it computes in and what its weights are stored as."""
        from recon.engines.ort.inspection import inspect

        if self.provider == "tensorrt":
            return Inspection(unseen="TensorRT's provider compiles the graph when it is loaded, and does not show what")
        return inspect(path)

    def open(self, path: Path, level: str) -> OrtSession:
        """Open any ONNX file, optimised in memory to `level` (a key of LEVELS)."""
        self.check()
        if self.provider != "cpu":
            return self._open_cuda(path, level)
        before = rss_mib()
        session = self._open(path, self._options(level), self.provider)
        return OrtSession(session, path, self._threads(), max(0.0, rss_mib() - before), self.profiles)

    def _open_cuda(self, path: Path, level: str) -> OrtCudaSession:
        """On the current CUDA device of torch, with a stream that torch knows."""
        import torch

        if not torch.cuda.is_available():
            raise ReconError(
                f"engine.provider={self.provider}: this PyTorch {torch.__version__} sees no CUDA device",
                "a PyTorch with CUDA on a machine with a GPU, or engine.provider=cpu",
            )
        device = f"cuda:{torch.cuda.current_device()}"
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        before = torch.cuda.mem_get_info(device)[0]
        settings: dict[str, Any] = {"user_compute_stream": str(stream.cuda_stream)}
        if device != FIRST_DEVICE:
            settings["device_id"] = torch.cuda.current_device()
        if self.provider == "cuda":
            settings["use_tf32"] = int(self.tf32)
        session = self._open(path, self._options(level), self.provider, settings=settings)
        taken = max(0, before - torch.cuda.mem_get_info(device)[0]) / MIB
        return OrtCudaSession(session, path, self._threads(), taken, device, stream, self.profiles)

    def _open(
        self,
        path: Path,
        options: Any,
        provider: str,
        held_back: Rewrites = NOT_HELD_BACK,
        settings: dict[str, Any] | None = None,
    ) -> Any:
        import onnxruntime

        if not path.is_file():
            raise ReconError(f"{path}: no such file", "run stages=[export,build] first")
        for key, value in held_back.entries.items():
            options.add_session_config_entry(key, value)
        if provider != "cpu":  # operators that the provider lacks would run on the CPU, unsaid
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = onnxruntime.InferenceSession(
                held_back.model or str(path),
                options,
                providers=[(PROVIDERS[provider], settings or {})],
                disabled_optimizers=list(held_back.off),
                enable_fallback=0,  # else it prints the reason and tries the CPU
            )
        except Exception as error:  # its exceptions have no common base but Exception
            raise explained(error, path, provider) from error
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


def operators(path: Path) -> dict[str, int]:
    """Node counts of an ONNX file by operator, `domain::Op` outside the standard domain, sorted by name."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return dict(sorted(Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.node).items()))


def _keep_modules(source: Path, built: Path) -> None:
    """Append the module paths of the source's products to the metadata of the optimised graph, which drops them.

    A protobuf message written after another one is merged into it, so the weights are not read for this.
    """
    import onnx

    modules = json.dumps(modules_of(source), sort_keys=True)
    entry = onnx.StringStringEntryProto(key=MODULES_KEY, value=modules)
    with built.open("ab") as file:
        file.write(onnx.ModelProto(metadata_props=[entry]).SerializeToString())
