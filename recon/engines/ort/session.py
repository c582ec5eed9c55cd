"""Running sessions of ONNX Runtime: tensors are read and written where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.engines import Session
from recon.engines.trt import profiles
from recon.errors import ReconError
from recon.machine import MIB, rss_mib
from recon.network import TensorSpec

if TYPE_CHECKING:
    import torch

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


class OrtSession(Session):
    """A loaded ONNX file on the CPU. Tensors are read and written in place, without a copy.

    Its shapes are fixed, or dynamic within `ranges` (see `recon.engines.trt.profiles`); `inputs` and `outputs` then
    have the best sizes of the first one.
    """

    def __init__(
        self, session: Any, path: Path, threads: int, loaded_mib: float, ranges: Sequence[profiles.Profile] = ()
    ) -> None:
        self._session: Any = session
        self.threads = threads
        self._ranges = ranges
        self._symbols = {item.name: tuple(item.shape) for item in session.get_inputs()}
        self._dynamic = any(isinstance(size, str) for shape in self._symbols.values() for size in shape)
        profiles.fit(ranges, dynamic_shapes(session))
        usual = {name: tuple(points["opt"]) for name, points in ranges[0].items()} if self._dynamic else {}
        sizes = self._sizes(self._symbols | usual)
        self.inputs = _specs(session.get_inputs(), path, sizes)
        self.outputs = _specs(session.get_outputs(), path, sizes)
        self._out_shapes = {item.name: tuple(item.shape) for item in session.get_outputs()}
        self._numbers = {item.name: TYPES[item.type][1] for item in [*session.get_inputs(), *session.get_outputs()]}
        files = [file for file in (path, data_file(path)) if file.exists()]
        self._file_mib = sum(file.stat().st_size for file in files) / MIB
        self._loaded_mib = loaded_mib
        self._first_run_mib: float | None = None

    def infer(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Check and run; with dynamic shapes every input that one of the profiles holds is taken."""
        if not self._dynamic or feeds.keys() != self.inputs.keys():
            return super().infer(feeds)
        profiles.require(self._ranges, self.inputs, feeds)
        return self._run(feeds)

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._session is None:
            raise self.closed_error()
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in feeds.items()}
        binding, outputs = self._bound(kept)
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

    def _bound(self, feeds: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        """A binding that reads the feeds and writes the outputs where they lie."""
        import torch

        binding = self._session.io_binding()
        sizes = self._sizes({name: tuple(tensor.shape) for name, tensor in feeds.items()})
        outputs = {
            name: torch.empty(
                _fixed(self._out_shapes[name], sizes), dtype=getattr(torch, spec.dtype), device=self.device
            )
            for name, spec in self.outputs.items()
        }
        for name, tensor in feeds.items():
            place = (tensor.device.type, tensor.device.index or 0)
            binding.bind_input(name, *place, self._numbers[name], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            place = (tensor.device.type, tensor.device.index or 0)
            binding.bind_output(name, *place, self._numbers[name], tuple(tensor.shape), tensor.data_ptr())
        return binding, outputs

    def _sizes(self, shapes: Mapping[str, Sequence[Any]]) -> dict[str, int]:
        """What the graph's symbols stand for at these input shapes."""
        return {
            symbol: size
            for name, symbols in self._symbols.items()
            for symbol, size in zip(symbols, shapes[name], strict=True)
            if isinstance(symbol, str) and isinstance(size, int)
        }


class OrtCudaSession(OrtSession):
    """A loaded ONNX file on a GPU, with a CUDA stream of its own that waits for the caller's and is waited for by it.

    Feeds on the device are read there; feeds on the host are copied once. Outputs stay on the device.
    """

    def __init__(
        self,
        session: Any,
        path: Path,
        threads: int,
        loaded_mib: float,
        device: str,
        stream: torch.cuda.Stream,
        ranges: Sequence[profiles.Profile] = (),
    ) -> None:
        self.device, self._stream = device, stream
        super().__init__(session, path, threads, loaded_mib, ranges)

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import onnxruntime
        import torch

        if self._session is None:
            raise self.closed_error()
        kept = {name: tensor.detach().to(self.device).contiguous() for name, tensor in feeds.items()}
        caller = torch.cuda.current_stream(self.device)
        binding, outputs = self._bound(kept)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the streams wait for each other
        self._stream.wait_stream(caller)
        self._session.run_with_iobinding(binding, options)
        caller.wait_stream(self._stream)
        for tensor in (*kept.values(), *outputs.values()):
            tensor.record_stream(self._stream)
        return outputs

    def sibling(self) -> None:  # type: ignore[override]  # a stream belongs to one loaded session
        return None

    def memory_mib(self) -> float:
        """Device memory that loading took; the arena of the first inference comes on top."""
        return self._loaded_mib


def data_file(path: Path) -> Path:
    """Where the external data of an ONNX file lies: beside it, `<name>.data`."""
    return path.with_name(path.name + ".data")


def dynamic_shapes(session: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs; -1 = dynamic."""
    return {
        item.name: tuple(size if isinstance(size, int) else -1 for size in item.shape) for item in session.get_inputs()
    }


def _specs(items: Any, path: Path, sizes: Mapping[str, int]) -> dict[str, TensorSpec]:
    specs = {}
    for item in items:
        shape = _fixed(item.shape, sizes)
        if not all(isinstance(size, int) for size in shape) or item.type not in TYPES:
            raise ReconError(
                f"{path}: {item.name!r} is {item.type}{item.shape}: engines here have plain numbers, and shapes that"
                " are fixed or follow from those of the inputs",
                "export the network at the geometry that it runs at",
            )
        specs[item.name] = TensorSpec(shape, TYPES[item.type][0])
    return specs


def _fixed(shape: Sequence[Any], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    return tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)
