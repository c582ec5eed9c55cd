"""Quantisation of a network: which layer gets which format, the tool's weights, and the graph that holds them.

    layer_infos -> assign -> make_recipe -> write

The quant mode takes its layers first; the precision takes what is left of the eligible ones; `keep` takes out of both.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight, Ranges, Recipe

if TYPE_CHECKING:
    import torch

    from recon.config import Config
    from recon.network import Network
    from recon.precision import Precision
    from recon.quant import QuantMode

log = logging.getLogger(__name__)

EXAMPLE_SEED = 0
_INFOS: dict[tuple[object, ...], dict[str, LayerInfo]] = {}  # of networks that this process has looked into


def layer_infos(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> dict[str, LayerInfo]:
    """Every `torch.nn.Linear` that an inference calls, by module path, with its multiply-adds over all calls.

    Nothing is computed: torch propagates shapes. `example`: inputs by name, in the order that the module takes them in.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows: dict[str, int] = {}

    def count(path: str, inputs: torch.Tensor) -> None:
        rows[path] = rows.get(path, 0) + math.prod(inputs.shape[:-1])

    linears = {path: layer for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, path=path: count(path, args[0]))  # type: ignore[misc]
        for path, layer in linears.items()
    ]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            module(*(fake.from_tensor(value) for value in example.values()))
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {path: (layer.in_features, layer.out_features) for path, layer in linears.items() if path in rows}
    return {path: LayerInfo(path, inner, outer, rows[path] * inner * outer) for path, (inner, outer) in sizes.items()}


def infos_of(network: Network, module: torch.nn.Module) -> dict[str, LayerInfo]:
    """`layer_infos` of a network's module; a sweep asks for the same networks again and again."""
    import torch

    layers = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    shapes = tuple((path, layer.in_features, layer.out_features) for path, layer in layers)
    known = (network.name, network.weights_key, tuple(network.inputs.items()), type(module), shapes)
    if known not in _INFOS:
        example = network.example(EXAMPLE_SEED)
        _INFOS[known] = layer_infos(module, {name: example[name] for name in network.inputs})
    return dict(_INFOS[known])


def keep_list(entries: list[str], weights: str = "") -> tuple[str, ...]:
    """Module path patterns of `quant_mode.keep`, with keep-lists (*.json, an object with a list `keep`) read in.

    weights: key of a network's weights; a list that says it was made for others is left out. Empty: all are read.

    Raises:
        ReconError: a file is missing, is no JSON, or holds no list of patterns; an empty pattern.
    """
    patterns: list[str] = []
    for entry in entries:
        found = _read_keep_list(Path(entry)) if entry.endswith(".json") else {"keep": [entry]}
        if not weights or found.get("weights", weights) == weights:
            patterns += found["keep"]
    if any(not pattern.strip() for pattern in patterns):
        raise ReconError("quant_mode.keep holds an empty pattern", "give module paths, e.g. [camera_head.*]")
    return tuple(dict.fromkeys(patterns))


def require_own_keep_lists(entries: list[str], networks: Collection[Network]) -> None:
    """Which layers suffer depends on the weights: a keep-list has to be made for those of one of the networks.

    Raises:
        ReconError: a list was made for other weights; or as `keep_list`.
    """
    known = {network.weights_key: network.name for network in networks}
    for entry in entries:
        if not entry.endswith(".json"):
            continue
        found = _read_keep_list(Path(entry))
        if "weights" not in found:
            log.warning("quant_mode.keep=%s: does not say for which weights it was made; it is used for all", entry)
        elif found["weights"] not in known:
            mine = ", ".join(f"{name} {_short(key)}" for key, name in known.items()) or "none"
            raise ReconError(
                f"quant_mode.keep={entry}: made for the weights {_short(found['weights'])} of"
                f" {found.get('network', 'another network')}; the networks of this run have others: {mine}",
                "run stages=[sensitivity] for these networks, or give the layers as patterns: quant_mode.keep=[head.*]",
            )


def require_matches(entries: list[str], layers: Mapping[str, Collection[str]]) -> None:
    """A pattern of `quant_mode.keep`, or of a list in it, that names no layer keeps nothing.

    layers: module paths by network of the run.

    Raises:
        ReconError: the pattern, and the layers that it may have meant; or as `keep_list`.
    """
    known = [path for paths in layers.values() for path in paths]
    for given, pattern in [(entry, one) for entry in entries for one in keep_list([entry])]:
        if not any(fnmatchcase(path, pattern) for path in known):
            near = difflib.get_close_matches(pattern, known, 3, cutoff=0.3) or known[:3]
            said = pattern if given == pattern else f"{given}: {pattern}"
            raise ReconError(
                f"quant_mode.keep={said}: names no layer of {' or '.join(layers)}",
                f"paths there are such as {', '.join(near)}; * stands for any part",
            )


def assign(
    infos: Mapping[str, LayerInfo], mode: QuantMode, precision: Precision, weights: str = ""
) -> dict[str, LayerFormat]:
    """Formats of the layers that are quantised: the mode's own first, then the precision's on the rest of them.

    weights: key of the network's weights, for keep-lists.

    Raises:
        ReconError: the mode or the precision is to quantise, and finds no layer to treat.
    """
    notes = left_out(infos, mode)
    kept = kept_layers(infos, mode, weights)
    formats: dict[str, LayerFormat] = {}
    for path, info in infos.items():
        if path in kept:
            continue
        if mode.layer_format() is not None and path not in notes:
            formats[path] = mode.layer_format_of(info)
        elif (found := precision.layer_format()) is not None:
            formats[path] = found
    for option, asked, by in (("quant_mode", mode, "quant_mode"), ("precision", precision, "precision")):
        none_left = by == "precision" and mode.layer_format() is not None  # the mode may have taken every layer
        if asked.layer_format() is not None and not none_left and all(item.by != by for item in formats.values()):
            raise _without_effect(f"{option}={asked.name}", infos, notes, kept)
    return formats


def kept_layers(infos: Mapping[str, LayerInfo], mode: QuantMode, weights: str = "") -> set[str]:
    """Layers that `keep` names for the network with these weights."""
    patterns = keep_list(mode.keep, weights)
    return {path for path in infos if any(fnmatchcase(path, pattern) for pattern in patterns)}


def left_out(infos: Mapping[str, LayerInfo], mode: QuantMode) -> dict[str, str]:
    """Module path -> why the mode leaves the layer alone; empty for a mode that treats no layer at all."""
    if mode.layer_format() is None:
        return {}
    return {path: reason for path, info in infos.items() if (reason := mode.why_not(info))}


def make_recipe(network: Network, mode: QuantMode, precision: Precision, ranges: Ranges | None) -> Recipe:
    """All decisions for a network, with the weights as the tools quantise them, layer by layer.

    Raises:
        ReconError: nothing to treat, no calibrated range for a layer's input, or weights that are not finite.
    """
    import torch

    module = network.load().eval()
    infos = infos_of(network, module)
    formats = assign(infos, mode, precision, network.weights_key)
    _require_ranges(formats, ranges)
    layers = dict(module.named_modules())
    weights: dict[str, QuantizedWeight] = {}
    for path, layer_format in formats.items():
        layer = layers[path]
        assert isinstance(layer, torch.nn.Linear)
        tool = mode if layer_format.by == "quant_mode" else precision
        weights[path] = _quantised(tool, layer.weight.detach(), infos[path], layer_format)
    notes = _notes(infos, formats, mode, kept_layers(infos, mode, network.weights_key))
    return Recipe(formats, weights, ranges, precision.rest_format, infos, notes)


def versions(config: Config) -> dict[str, str]:
    """Versions of the tools that decide what a written graph holds: part of its cache key. Imports none of them."""
    mode = config.quant_mode
    tools = {"onnx": version("onnx"), "torch": version("torch")}
    return tools | ({mode.tool: mode.tool_version()} if mode.tool else {})


def write(network: Network, base: Path, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write the FP32 graph `base` as the recipe says to `out` (weights beside it) and return facts for its manifest.

    First the Q/DQ graph, in FP32 around the Q/DQ, is run in ONNX Runtime and its layers are compared with the same
    rounding in torch: `writer_error` is what writing got wrong, `quantisation_error` what the formats cost a layer.

    Raises:
        ReconError: the graph cannot hold the formats, or does not compute what the recipe says.
    """
    from recon.graph.layers import replaced_weights
    from recon.graph.read import read_graph
    from recon.graph.writer import fit_opset, place
    from recon.graph.writer_check import check
    from recon.graph.writer_files import load_weights, save

    checked = check(network, base, recipe, out.with_name(f"{out.stem}.check.onnx")) if recipe.layers else {}
    model = read_graph(base, weights=False)
    replaced = replaced_weights(model, recipe.layers)
    load_weights(model, base.parent, leave=replaced)
    fit_opset(model, recipe.layers, recipe.rest)
    typed: dict[str, Any] = {}
    if recipe.rest != "fp32":
        from recon.graph.rules import misfits
        from recon.graph.typed import convert

        typed = convert(model, recipe.rest, recipe.ranges, dict.fromkeys(replaced, "") | misfits(model, recipe))
    place(model, recipe)
    size = save(model, out)
    return _facts(recipe, out) | {"bytes": size, "typed": typed, "check": checked}


def _facts(recipe: Recipe, out: Path) -> dict[str, Any]:
    from recon.onnxgraph import OnnxGraph

    graph = OnnxGraph(out)
    ops = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.nodes]
    return {
        "layers": {path: asdict(layer) for path, layer in recipe.layers.items()},
        "infos": {path: asdict(info) for path, info in recipe.infos.items()},
        "notes": dict(recipe.notes),
        "rest": recipe.rest,
        "calibration": _calibration(recipe.ranges),
        "graph": _found(graph, recipe),
        "ops": {op: ops.count(op) for op in sorted(set(ops))},
        "opset": graph.opset,
    }


def _calibration(ranges: Ranges | None) -> dict[str, Any]:
    if ranges is None:
        return {}
    return {"key": ranges.key, "count": ranges.count, "method": ranges.method, "source": ranges.source}


def _found(graph: Any, recipe: Recipe) -> dict[str, Any]:
    """What the written file holds, read back from it: products by module, and totals."""
    modules: dict[str, dict[str, Any]] = {}
    for product in graph.products:
        if product.module in recipe.layers and product.weight is not None:
            entry = {"weight": product.weight.format, "bits": product.weight.bits, "ops": list(product.weight.ops)}
            modules[product.module] = entry | {"block": product.weight.block, "activation": product.activation}
    inputs = [entry["activation"] for entry in modules.values() if entry["activation"]]
    count = [node.op_type for node in graph.nodes].count
    stored = [(recipe.infos[path], entry["bits"]) for path, entry in modules.items()]
    total = sum(info.in_features * info.out_features for info, _ in stored)
    bits = sum(info.in_features * info.out_features * width for info, width in stored)
    return {
        "modules": modules,
        "qdq_pairs": count("QuantizeLinear") + count("TRT_FP4DynamicQuantize"),
        "dequantised_weights": sum("DequantizeLinear" in entry["ops"] for entry in modules.values()),
        "codebooks": sum("Gather" in entry["ops"] for entry in modules.values()),
        "inputs": {name: inputs.count(name) for name in sorted(set(inputs))},
        "bits_per_weight": bits / total if total else 32.0,
    }


def _short(key: object) -> str:
    """A weights key, hashes cut to what tells two apart."""
    text = str(key)
    return text[:19] if text.startswith("sha256:") else text


def _read_keep_list(path: Path) -> dict[str, Any]:
    remedy = "stages=[sensitivity] writes one"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReconError(f"quant_mode.keep={path}: cannot be read: {error.strerror}", remedy) from error
    except ValueError as error:
        raise ReconError(f"quant_mode.keep={path}: is no JSON: {error}", remedy) from error
    patterns = found.get("keep") if isinstance(found, dict) else None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ReconError(f'quant_mode.keep={path}: is no keep-list: an object with "keep": [paths] is expected', remedy)
    return dict(found)


def _without_effect(
    option: str, infos: Mapping[str, LayerInfo], notes: Mapping[str, str], kept: set[str]
) -> ReconError:
    if not infos:
        return ReconError(f"{option} treats no layer: the network has no Linear layer", "quant_mode=none")
    free = {path: notes[path] for path in infos if path in notes and path not in kept}
    why = f"{len(kept)} of {len(infos)} Linear layers are in quant_mode.keep"
    if free:
        path, reason = next(iter(free.items()))
        why += f"; {path}, for one, is left out because {reason}"
    return ReconError(f"{option} treats no layer of this network: {why}", "keep fewer layers, or quant_mode=none")


def _require_ranges(formats: Mapping[str, LayerFormat], ranges: Ranges | None) -> None:
    for path, layer in formats.items():
        if not layer.calibrated:
            continue
        found = ranges.inputs.get(path) if ranges is not None else None
        if found is None or not math.isfinite(found) or found <= 0:
            raise ReconError(
                f"layer {path}: its input's range is {found}; {layer.label} needs one above zero",
                "calibrate on frames that show something (calibration.path, calibration.batches)",
            )


def _quantised(
    tool: QuantMode | Precision, weight: torch.Tensor, info: LayerInfo, wanted: LayerFormat
) -> QuantizedWeight:
    if not bool(weight.isfinite().all()):
        raise ReconError(f"layer {info.path}: its weights are not finite", "check the network's weights")
    found = tool.quantise(weight.float(), info)
    assert found.format == wanted, f"{info.path}: {tool.name} gave {found.format}, {wanted} was agreed"
    if not bool(found.dequantised().isfinite().all()):
        raise ReconError(
            f"layer {info.path}: {tool.name} turns its weights into values that are not finite",
            f"add it to quant_mode.keep, e.g. quant_mode.keep=[{info.path}]",
        )
    return found


def _notes(
    infos: Mapping[str, LayerInfo], formats: Mapping[str, LayerFormat], mode: QuantMode, kept: set[str]
) -> dict[str, str]:
    """Why layers are left alone, or treated otherwise than the mode's own format says."""
    notes = dict(left_out(infos, mode))
    notes |= dict.fromkeys(sorted(kept), "quant_mode.keep")
    whole = mode.layer_format()
    for path, layer in formats.items():
        if whole is None or layer.by != "quant_mode" or layer == whole:
            continue
        size = infos[path].in_features
        notes[path] = (
            f"{size} input features are no multiple of {whole.block}: scales repeat in blocks of {layer.block}"
        )
        if whole.exact and not layer.exact:
            notes[path] += ", too small to gain from codes, so the rounded weights are stored"
    return notes
