"""A running plan: torch tensors are its buffers, a stream of its own carries the work, a CUDA graph repeats it."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

from recon.artifact import write_atomic
from recon.engines import Session
from recon.engines.trt import profiles
from recon.engines.trt.messages import MESSAGES
from recon.engines.trt.shared import Shared
from recon.errors import ReconError
from recon.machine import MIB
from recon.network import TensorSpec

if TYPE_CHECKING:
    import torch

DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip
SHAPES_KEPT = 4  # contexts with buffers and a graph, one per set of input shapes
_capturing = Lock()  # one capture at a time in the process

Shapes = dict[str, tuple[int, ...]]


class TensorRTSession(Session):
    """An execution context of its own on a plan that other sessions may share.

    Feeds may lie on any device; they are copied into fixed buffers, so that a captured graph stays valid. Outputs are
    new tensors on the plan's device. Work is ordered after what the caller's current stream holds, and what the caller
    does next on that stream is ordered after it: nothing waits on the host. Safe to call from several threads, one
    after another; for inference at once open one session per thread.
    """

    def __init__(self, shared: Shared, *, cuda_graph: bool) -> None:
        import torch

        self._shared: Shared | None = shared
        self._graphs = cuda_graph
        self._lock = Lock()
        self.device = f"cuda:{shared.device}"
        self._bound: OrderedDict[tuple[Any, ...], _Bound] = OrderedDict()
        try:
            names = _tensors(shared)
            self._dynamic = any(-1 in shape for shape, _ in names[0].values())
            self.inputs = {name: TensorSpec(self._usual(name, shape), kind) for name, (shape, kind) in names[0].items()}
            self._stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            first = self._for({name: spec.shape for name, spec in self.inputs.items()})
            self.outputs = {name: TensorSpec(tuple(t.shape), names[1][name][1]) for name, t in first.outputs.items()}
        except BaseException:
            self.close()
            raise

    def infer(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Check and run; a plan with dynamic shapes takes every shape that one of its profiles holds."""
        if not self._dynamic or self._shared is None or feeds.keys() != self.inputs.keys():
            return super().infer(feeds)
        profiles.require(self._shared.facts.profiles, self.inputs, feeds)
        return self._run(feeds)

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        with self._lock:
            if self._shared is None:
                raise self.closed_error()
            caller = torch.cuda.current_stream(self.device)
            bound = self._for({name: tuple(tensor.shape) for name, tensor in feeds.items()})
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for name, buffer in bound.inputs.items():
                    feed = feeds[name]
                    buffer.copy_(feed, non_blocking=feed.is_cuda)  # host memory is the caller's again when we return
                    if feed.is_cuda:
                        feed.record_stream(self._stream)
                bound.launch(self._stream)
                outputs = {name: buffer.clone() for name, buffer in bound.outputs.items()}
            caller.wait_stream(self._stream)
            for tensor in outputs.values():
                tensor.record_stream(caller)
        return outputs

    def memory_mib(self) -> float:
        """On the GPU: weights (shared with other sessions of the plan), and this session's scratch and buffers."""
        if self._shared is None:
            return 0.0
        return self._shared.device_mib + sum(bound.memory_mib for bound in self._bound.values())

    def close(self) -> None:
        """Free context, graph and buffers; the plan goes with its last session."""
        with self._lock:
            if self._shared is None:
                return
            if self._bound:
                self._stream.synchronize()
            with self._shared.lock:
                self._bound.clear()
            self._shared.release()
            self._shared = None

    def _usual(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape itself, or the best one of the first profile."""
        assert self._shared is not None
        return shape if -1 not in shape else tuple(self._shared.engine.get_tensor_profile_shape(name, 0)[1])

    def _for(self, shapes: Shapes) -> _Bound:
        """Context, buffers and graph for these input shapes."""
        assert self._shared is not None
        key = tuple(sorted(shapes.items()))
        if (bound := self._bound.get(key)) is None:
            if len(self._bound) >= SHAPES_KEPT:
                self._stream.synchronize()
                self._bound.popitem(last=False)
            bound = self._bound[key] = _Bound(self._shared, shapes, self._stream, self._graphs)
        self._bound.move_to_end(key)
        return bound


class _Bound:
    """One execution context with its buffers for one set of input shapes, and the graph that was captured of it."""

    def __init__(self, shared: Shared, shapes: Shapes, stream: torch.cuda.Stream, graphs: bool) -> None:
        import torch

        self._name = shared.path.name
        self._graph: torch.cuda.CUDAGraph | None = None
        before = torch.cuda.mem_get_info(shared.device)[0]
        number = profiles.matching(shared.facts.profiles, shapes) or 0
        with MESSAGES.listen() as heard, shared.lock, torch.cuda.stream(stream):
            self._context, self._cache = _context(shared, graphs)
            if self._context is None:
                raise ReconError(
                    f"{self._name}: TensorRT made no execution context: {heard.reason}",
                    "free GPU memory, or open fewer sessions at once",
                )
            if shared.facts.profiles:  # even the first: only one context of a plan gets it by itself
                self._context.set_optimization_profile_async(number, stream.cuda_stream)
            scratch = max(shared.engine.get_device_memory_size_for_profile_v2(number), 0) / MIB
            self.memory_mib: float = max(scratch, (before - torch.cuda.mem_get_info(shared.device)[0]) / MIB)
            self.inputs = {name: self._buffer(shared, name, shape) for name, shape in shapes.items()}
            for name, shape in shapes.items():
                self._context.set_input_shape(name, shape)
            self.outputs = {
                name: self._buffer(shared, name, tuple(self._context.get_tensor_shape(name)))
                for name in _tensors(shared)[1]
            }
            self._execute(stream)
            stream.synchronize()  # a fault of the plan shows here, not at some later call
            if graphs and not shared.library.portable:
                self._graph = self._captured(stream)
        _save_cache(self._cache)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Put one inference on the stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._execute(stream)

    def _execute(self, stream: torch.cuda.Stream) -> None:
        with MESSAGES.listen() as heard:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ReconError(f"{self._name}: TensorRT could not run it: {heard.reason}", "build the plan again")

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            with _capturing:
                graph.capture_begin(capture_error_mode="thread_local")  # other threads go on allocating and launching
                try:
                    self._execute(stream)
                finally:
                    graph.capture_end()
        except (ReconError, RuntimeError) as error:
            raise ReconError(
                f"{self._name}: cannot be captured as a CUDA graph: {error}", "engine.cuda_graph=false"
            ) from error
        return graph

    def _buffer(self, shared: Shared, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        if any(size < 0 for size in shape):
            raise ReconError(
                f"{self._name}: the shape of {name!r} depends on data", "export the network without that output"
            )
        kind = DTYPES[shared.engine.get_tensor_dtype(name).name]
        buffer = torch.zeros(shape, dtype=getattr(torch, kind), device=f"cuda:{shared.device}")
        self.memory_mib += buffer.numel() * buffer.element_size() / MIB
        self._context.set_tensor_address(name, buffer.data_ptr())
        return buffer


def _tensors(shared: Shared) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs: name -> (shape, -1 where dynamic; torch's name of the dtype)."""
    trt, engine = shared.library.trt, shared.engine
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise ReconError(f"{shared.path}: {name!r} is {kind}, which torch has no tensors of", "export it as FP32")
        side = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        side[name] = tuple(int(size) for size in engine.get_tensor_shape(name)), DTYPES[kind]
    return inputs, outputs


def _context(shared: Shared, graphs: bool) -> tuple[Any, Any]:
    """An execution context; TensorRT for RTX compiles its kernels now, and keeps them in a cache beside the plan."""
    trt, engine = shared.library.trt, shared.engine
    if not shared.library.portable:
        return engine.create_execution_context(), None
    config = engine.create_runtime_config()
    if graphs:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    cache, file = config.create_runtime_cache(), shared.path.with_name(f"{shared.path.name}.kernels")
    if file.is_file():
        cache.deserialize(file.read_bytes())  # False for another GPU or driver: kernels are then compiled anew
    config.set_runtime_cache(cache)
    return engine.create_execution_context(config), (cache, file)


def _save_cache(kept: Any) -> None:
    """After the first inference, when the kernels are there."""
    if kept is not None:
        cache, file = kept
        data = bytes(memoryview(cache.serialize()))
        if not file.is_file() or file.stat().st_size != len(data):
            write_atomic(file, data)
