"""Eager PyTorch: the FP32 reference that every other engine is compared with, and the plain way to debug."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recon.engines import Build, Engine, Session
from recon.errors import ReconError
from recon.formats import Inspection, LayerFormat, Recipe, RestFormat
from recon.lowbit import EXAMPLE_SEEDS
from recon.lowbit.support import device_name, full_fp32, refusal
from recon.machine import MIB, require_device, rss_mib
from recon.network import Network, TensorSpec

if TYPE_CHECKING:
    import torch

_SPECS: dict[tuple[object, ...], dict[str, TensorSpec]] = {}  # outputs of networks that were opened in this process


class TorchSession(Session):
    """The network's own module, run eagerly without gradients. Feeds may lie on any device; outputs lie on `device`."""

    def __init__(self, network: Network, module: torch.nn.Module, device: str = "cpu") -> None:
        import torch

        self.device, self.threads = device, torch.get_num_threads()
        self.inputs = dict(network.inputs)
        self._names = network.outputs
        self._module: torch.nn.Module | None = module.to(device).eval()
        tensors = [*module.parameters(), *module.buffers()]
        self._weights_mib = sum(t.numel() * t.element_size() for t in tensors) / MIB
        self._first_run_mib: float | None = None
        known = (network.name, network.weights_key, network.outputs, device, type(module))
        if known not in _SPECS:  # takes as long as several inferences
            _SPECS[known] = self._output_specs(network)
        self.outputs = dict(_SPECS[known])

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        if self._module is None:
            raise self.closed_error()
        before = rss_mib() if self._first_run_mib is None else 0.0
        with torch.inference_mode(), full_fp32(self.device):
            outputs = self._module(*(feeds[name].to(self.device) for name in self.inputs))
        if self._first_run_mib is None:
            self._first_run_mib = max(0.0, rss_mib() - before)
        return dict(zip(self._names, outputs, strict=True))

    def memory_mib(self) -> float:
        """Weights, plus by how much the process grew in the first inference (on CUDA: torch's peak allocation)."""
        import torch

        if self.device != "cpu":
            return float(torch.cuda.max_memory_allocated(self.device)) / MIB
        return self._weights_mib + (self._first_run_mib or 0.0)

    def close(self) -> None:
        self._module = None

    def _output_specs(self, network: Network) -> dict[str, TensorSpec]:
        """Shapes and dtypes, found by running on tensors without data."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        assert self._module is not None
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            feeds = [
                torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
                for spec in network.inputs.values()
            ]
            outputs = self._module(*feeds)
        return {
            name: TensorSpec(tuple(int(size) for size in value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in zip(network.outputs, outputs, strict=True)
        }


@dataclass
class Torch(Engine):
    """Eager PyTorch; there is no file between network and session. FP32 unless a quant mode or precision is asked for.

    Low precision is computed by the device's own products (`recon.lowbit`), so any mode can be tried without a build.
    """

    builds: ClassVar[bool] = False
    needs_onnx: ClassVar[bool] = False

    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    simulate: bool = False
    """Show the numbers of formats that the device cannot multiply in: operands are rounded to them and multiplied in
    the rest's format. Slower than no quantisation at all."""

    def check(self) -> None:
        super().check()
        require_device(self.device, "engine.device")

    def refuses(self, formats: Sequence[LayerFormat], rest: RestFormat) -> str:
        if not self.simulate:
            return refusal(formats, rest, self.device)
        if any(asked.activation for asked in formats):
            return refusal([replace(asked, activation="") for asked in formats], rest, self.device)
        return "engine.simulate=true has no effect: no layer's input is quantised"

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__), "device": device_name(self.device)}

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        raise AssertionError("engine=torch builds no file")

    def inspect(self, path: Path) -> Inspection:
        raise AssertionError("engine=torch builds no file")

    def load(self, path: Path) -> Session:
        raise ReconError(f"{path}: engine=torch runs networks, not files", "give the engine that built the file")

    def session(self, network: Network, path: Path | None, recipe: Callable[[], Recipe] = Recipe) -> Session:
        """The FP32 module itself; with a recipe that says more than FP32, the module as the recipe changes it."""
        self.check()
        return TorchSession(network, self._module(network, recipe()), self.device)

    def look(self, network: Network, recipe: Recipe) -> Inspection:
        """Every product of one inference of the module that `session` runs, as PyTorch dispatches it."""
        from recon.engines.eager.inspection import inspect

        self.check()
        return inspect(self._module(network, recipe).to(self.device).eval(), network.inputs, self.device)

    def _module(self, network: Network, recipe: Recipe) -> torch.nn.Module:
        module = network.load()
        if recipe.plain:
            return module
        from recon.lowbit.apply import prepare

        examples = [network.example(seed) for seed in EXAMPLE_SEEDS]
        return prepare(module, recipe, examples, simulate=self.simulate)
