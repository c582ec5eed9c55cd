"""What values a network takes: the inputs of its layers in torch, and all float values of its ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recon.console import track
from recon.errors import ReconError
from recon.network import Network

if TYPE_CHECKING:
    import onnx
    import torch

    Feeds = Sequence[Mapping[str, torch.Tensor]]

LEVELS = 128  # of a symmetric 8-bit format, without the sign


class Observer:
    """Absolute values of one tensor over all inputs: the largest, and a histogram whose range doubles as needed."""

    def __init__(self, bins: int) -> None:
        self.bins, self.largest, self.width = bins, 0.0, 0.0
        self.counts: NDArray[np.float64] = np.zeros(bins)

    def add(self, values: torch.Tensor) -> None:
        """Raises ValueError where a value is not finite."""
        size = values.detach().abs()
        top = float(size.max())
        if not np.isfinite(top):
            raise ValueError("NaN or infinite values")
        self.largest = max(self.largest, top)
        if not self.bins or not top:
            return
        self.width = self.width or 2.0 ** np.ceil(np.log2(top))
        while top > self.width:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(self.bins // 2)])
            self.width *= 2
        self.counts += size.float().flatten().histc(self.bins, 0.0, self.width).cpu().numpy()

    def range(self, method: str, percentile: float) -> float:
        """The absolute value that maps to the largest code."""
        if method == "max" or not self.counts.any():
            return self.largest
        if method == "percentile":
            found = percentile_range(self.counts, self.width, percentile)
        else:
            found = entropy_range(self.counts, self.width)
        return min(found, self.largest)


def percentile_range(counts: NDArray[np.float64], width: float, percentile: float) -> float:
    """Upper edge of the bin that holds the percentile. counts: [bins] of absolute values in 0..width."""
    share = np.cumsum(counts) / counts.sum()
    return float((np.searchsorted(share, percentile / 100) + 1) * width / len(counts))


def entropy_range(counts: NDArray[np.float64], width: float) -> float:
    """The cut whose 128 levels keep most information about the distribution (KL divergence).

    S. Migacz, 8-bit Inference with TensorRT, GTC 2017: what is beyond the cut counts as the last bin, the rest is
    merged into levels, and every level is spread evenly over those of its bins that are not empty.
    """
    bins = len(counts)
    top = int(np.flatnonzero(counts)[-1]) + 1
    candidates = range(max(LEVELS, bins // LEVELS), max(top, LEVELS) + 1, max(1, bins // (4 * LEVELS)))
    losses = {cut: _divergence(counts, cut) for cut in (*candidates, max(top, LEVELS))}
    best = min(losses, key=lambda cut: (losses[cut], -cut))
    return float(best * width / bins)


def _divergence(counts: NDArray[np.float64], cut: int) -> float:
    kept = counts[:cut]
    p = kept.copy()
    p[-1] += counts[cut:].sum()
    level = np.arange(cut) * LEVELS // cut
    filled = kept > 0
    totals, members = np.bincount(level, kept, LEVELS), np.bincount(level, filled, LEVELS)
    q = np.where(filled, totals[level] / np.maximum(members[level], 1), 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    used = p > 0
    return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))


def layer_inputs(network: Network, feeds: Feeds, bins: int, specials: tuple[int, int]) -> dict[str, Observer]:
    """Module path -> observed inputs of every `torch.nn.Linear` that runs, in order of first use.

    bins: of the histograms; 0 = only the largest values. specials: (S, P) leaves the first S rows of every sequence of
    S + P tokens out; (0, 0) leaves out none.

    Raises:
        ReconError: a value is not finite in FP32, or a layer sees nothing but zeros.
    """
    import torch

    from recon.lowbit.support import full_fp32

    module = network.load().eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module.to(device)
    found: dict[str, Observer] = {}

    def look(path: str, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0]
        if specials[0] and rows.ndim == 3 and rows.shape[1] == sum(specials):
            rows = rows[:, specials[0] :]
        try:
            found.setdefault(path, Observer(bins)).add(rows)
        except ValueError as error:
            raise ReconError(
                f"{network.name}: the input of {path} holds {error} although the network's inputs are finite",
                "check the weights: the FP32 network itself does not work on these frames",
            ) from error

    hooks = [
        layer.register_forward_pre_hook(partial(look, path))
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    try:
        with torch.inference_mode(), full_fp32(device):
            for item in track(feeds, f"Calibrating {network.name}", len(feeds)):
                module(*(item[name].to(device) for name in network.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    if dead := [path for path, observer in found.items() if not observer.largest]:
        raise ReconError(
            f"{network.name}: {dead[0]} sees nothing but zeros on the calibration frames", "give other frames, or more"
        )
    return found


def graph_maxima(path: Path, feeds: Feeds) -> dict[str, float]:
    """Value name -> largest absolute value, for every FP32 value of an ONNX file that a node makes or that is fed.

    Every value is reduced to two numbers right where it is made, in the same pass, so that no intermediate result is
    kept: the memory is that of an inference, whatever the number of values.

    Raises:
        ReconError: the file is damaged, has an operator that ONNX Runtime does not know, or a value is not finite.
    """
    session, names = _reducing_session(path)
    largest = dict.fromkeys(names, 0.0)
    for item in track(feeds, f"Ranges of {path.stem}", len(feeds)):
        arrays = {name: tensor.numpy() for name, tensor in item.items()}
        extremes = session.run([f"recon.{end}.{i}" for i in range(len(names)) for end in ("max", "min")], arrays)
        for name, high, low in zip(names, extremes[::2], extremes[1::2], strict=True):
            top = max(abs(float(high)), abs(float(low)))
            if not np.isfinite(top):
                raise ReconError(
                    f"{path.name}: value {name!r} is NaN or infinite in FP32", "check the weights and the frames"
                )
            largest[name] = max(largest[name], top)
    return largest


def _reducing_session(path: Path) -> tuple[Any, list[str]]:
    """An ONNX Runtime session that gives the maximum and minimum of every FP32 value, and the values' names."""
    import onnx
    import onnxruntime

    from recon.graph.read import read_graph
    from recon.graph.types import value_types

    model = read_graph(path, weights=False)
    types = value_types(model)
    floats = {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT}
    nodes, names = _with_extremes(model, floats)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    for i in range(len(names)):
        for end in ("max", "min"):
            value = onnx.helper.make_tensor_value_info(f"recon.{end}.{i}", onnx.TensorProto.FLOAT, [])
            model.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # by position in the file: the default order runs all reductions last and so keeps every value alive
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ), names
    except Exception as error:  # its exceptions have no common base but Exception
        reason = str(error).strip().splitlines()[0]
        raise ReconError(f"{path}: ONNX Runtime cannot load it: {reason}", "delete it and run again") from error


def _with_extremes(model: onnx.ModelProto, floats: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
    import onnx

    constants = {tensor.name for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    names: list[str] = []

    def reduce(name: str) -> None:
        if name in floats and name not in constants:
            for op, end in (("ReduceMax", "max"), ("ReduceMin", "min")):
                nodes.append(onnx.helper.make_node(op, [name], [f"recon.{end}.{len(names)}"], keepdims=0))
            names.append(name)

    for value in model.graph.input:
        reduce(value.name)
    for node in model.graph.node:
        nodes.append(node)
        for output in node.output:
            reduce(output)
    return nodes, names
