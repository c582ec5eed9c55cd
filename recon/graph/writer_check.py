"""Does a written graph compute what the recipe says? ONNX Runtime against a simulation of the same rounding in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.formats import FP8_MAX, INT8_MAX, LayerFormat, Recipe
from recon.graph.layers import Occurrence
from recon.graph.read import read_graph
from recon.graph.writer import fit_opset, place
from recon.graph.writer_files import load_weights, save
from recon.graph.writer_inputs import input_scale, smallest_scale
from recon.graph.writer_nodes import FLOAT

if TYPE_CHECKING:
    import torch

    from recon.network import Network

CHECK_SEED = 1001
WEIGHTS_TOLERANCE = 1e-4  # relative L2; weight-only graphs do the same FP32 arithmetic as torch
SHARE = 0.2  # of the quantisation error: values that lie between two codes may fall to either side


def check(network: Network, base: Path, recipe: Recipe, scratch: Path) -> dict[str, Any]:
    """Write the Q/DQ of `recipe` into the FP32 graph `base`, run it, compare, and remove the file again.

    Returns writer_error and quantisation_error (relative L2 by output), or `unchecked`: why neither is known.

    Raises:
        ReconError: the graph computes something else than the recipe says.
    """
    if unrunnable := _unrunnable(recipe):
        return {"unchecked": unrunnable}
    model = read_graph(base, weights=False)
    found = place_fp32(model, base.parent, recipe)
    try:
        save(model, scratch)
        del model
        got = run_onnxruntime(scratch, network)
    finally:
        for file in (scratch, scratch.with_name(f"{scratch.name}.data")):
            file.unlink(missing_ok=True)
    reference, simulated = simulate(network, recipe, found)
    cost = _errors(network, reference, simulated)
    errors = _errors(network, simulated, got)
    for name, error in errors.items():
        if not error <= max(WEIGHTS_TOLERANCE, SHARE * cost[name]):
            raise ReconError(
                f"{network.name}: the written graph differs from the recipe by {error:.1e} relative L2 in output {name}"
                f" (quantisation itself costs {cost[name]:.1e})",
                "this is a fault of recon's graph writer or of a tool version: report it with the tool versions",
            )
    return {"writer_error": errors, "quantisation_error": cost}


def place_fp32(model: Any, folder: Path, recipe: Recipe) -> list[Occurrence]:
    """The recipe's Q/DQ in a graph that stays FP32 around them."""
    load_weights(model, folder)
    fit_opset(model, recipe.layers, "fp32")
    return place(model, replace(recipe, rest="fp32"))


def run_onnxruntime(path: Path, network: Network) -> list[torch.Tensor]:
    """Outputs for the check's example, every Q and DQ carried out as written (none fused into integer products)."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in network.example(CHECK_SEED).items()}
    return [torch.from_numpy(value) for value in session.run(list(network.outputs), feeds)]


def simulate(
    network: Network, recipe: Recipe, found: list[Occurrence]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the FP32 module, and of the same module with the recipe's weights and rounding of inputs."""
    import torch

    module = network.load().eval()
    example = network.example(CHECK_SEED)
    feeds = [example[name] for name in network.inputs]
    calls: dict[str, int] = {}
    with torch.no_grad():
        with _linears(module, recipe, _counting(calls)):
            reference = module(*feeds)
        in_graph = {path: sum(item.path == path for item in found) for path in recipe.layers}
        constant = {path: calls.get(path, 0) - count for path, count in in_graph.items()}
        with _linears(module, recipe, _rounding(recipe, constant)):
            simulated = module(*feeds)
    return list(reference), list(simulated)


Forward = Any


def _counting(calls: dict[str, int]) -> Callable[[str, torch.nn.Linear], Forward]:
    def make(path: str, layer: torch.nn.Linear) -> Forward:
        original = layer.forward

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            calls[path] = calls.get(path, 0) + 1
            return original(inputs)

        return forward

    return make


def _rounding(recipe: Recipe, constant: dict[str, int]) -> Callable[[str, torch.nn.Linear], Forward]:
    """constant: how many of a layer's first calls the exporter computed in advance, in FP32: their input is constant."""
    import torch

    def make(path: str, layer: torch.nn.Linear) -> Forward:
        left, plain = constant[path], layer.weight.detach().clone() if constant[path] else None
        layer.weight.data = recipe.weights[path].dequantised()  # no second copy of the network
        layer_format = recipe.layers[path]
        amax = recipe.ranges.inputs[path] if recipe.ranges and layer_format.calibrated else 0.0

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left >= 0 and plain is not None:
                return torch.nn.functional.linear(inputs, plain, layer.bias)
            return torch.nn.functional.linear(rounded(inputs, layer_format, amax), layer.weight, layer.bias)

        return forward

    return make


def rounded(inputs: torch.Tensor, layer: LayerFormat, amax: float) -> torch.Tensor:
    """Inputs of a layer after its Q/DQ pair. amax: calibrated range."""
    import torch

    if not layer.activation:
        return inputs
    if layer.activation == "int8-dynamic":
        scale = (inputs.abs().max() / INT8_MAX).clamp_min(smallest_scale(FLOAT))
    else:
        scale = torch.tensor(input_scale(layer.activation, amax), dtype=torch.float32)
    if layer.activation == "fp8":
        return (inputs / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return (inputs / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale


@contextmanager
def _linears(module: torch.nn.Module, recipe: Recipe, make: Callable[[str, Any], Forward]) -> Iterator[None]:
    """The recipe's layers with forward functions of our own."""
    layers = {path: layer for path, layer in module.named_modules() if path in recipe.layers}
    for path, layer in layers.items():
        layer.forward = make(path, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward  # the class's own again


def _unrunnable(recipe: Recipe) -> str:
    if any(layer.weight == "nvfp4" for layer in recipe.layers.values()):
        return "ONNX Runtime has no CPU kernel for FLOAT4E2M1"
    return ""


def _errors(network: Network, reference: list[torch.Tensor], candidate: list[torch.Tensor]) -> dict[str, float]:
    """Relative L2 by output."""
    pairs = zip(network.outputs, reference, candidate, strict=True)
    return {name: float((b - a).norm() / a.norm().clamp_min(1e-30)) for name, a, b in pairs}
