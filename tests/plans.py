"""Real plans of TensorRT for RTX for a twin in a mode and precision, with what is in them, from one call: also in a
process of its own, since TensorRT's builder uses one core."""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from recon.certificate import Asked, certify
from recon.config import option
from recon.engines import Build
from recon.engines.tensorrt import TensorRT
from recon.engines.trt import targets
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Inspection, LayerFormat, LayerInfo, Ranges
from recon.network import Network
from recon.observe import graph_maxima
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quantise import make_recipe, write

MODES = (
    "torch-int8-dynamic", "bitsandbytes-8bit", "bitsandbytes-nf4", "bitsandbytes-fp4", "modelopt-fp8", "modelopt-nvfp4",
)  # fmt: skip
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
STORED = {"int8": "int8", "fp8": "fp8", "nf4": "int4", "fp4": "int4", "nvfp4": "fp4"}
ATTENTIONS = {"da2-twin": 4, "vggt-twin": 12}  # layers that the backbone's blocks have, those of the camera head aside


@dataclass(frozen=True)
class Base:
    """A twin's FP32 graph and its ranges over two examples."""

    name: str
    graph: Path
    ranges: Ranges


@dataclass(frozen=True)
class Plan:
    """facts: of the build. seen: layers as TensorRT lists them. layers, infos: of the recipe."""

    facts: dict[str, Any]
    seen: Inspection
    layers: dict[str, LayerFormat]
    infos: dict[str, LayerInfo]
    certificate: dict[str, Any]


def engine(**knobs: Any) -> TensorRT:
    return TensorRT(name="tensorrt-rtx", flavour="tensorrt_rtx", **knobs)


@cache
def network_of(name: str) -> Network:
    role = "depth" if name == "da2-twin" else "model"
    found: Any = option(role, name)
    network: Network = found.network() if role == "depth" else found.network(2)
    return network


def base_of(name: str, folder: Path) -> Base:
    network, path = network_of(name), folder / f"{name}.onnx"
    export(network, path, ExportOptions())
    fed, inputs = [network.example(seed) for seed in (0, 1)], dict[str, float]()
    module = network.load().eval()

    def see(path: str, value: torch.Tensor) -> None:
        inputs[path] = max(inputs.get(path, 0.0), float(value.abs().max()))

    for at, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, at=at: see(at, given[0]))  # type: ignore[misc]
    with torch.inference_mode():
        for feeds in fed:
            module(*feeds.values())
    return Base(name, path, Ranges(inputs, graph_maxima(path, fed), "max", "", 2, "examples"))


def options_of(mode: str, precision: str) -> tuple[QuantMode, Precision]:
    found, other = option("quant_mode", mode), option("precision", precision)
    assert isinstance(found, QuantMode)
    assert isinstance(other, Precision)
    return found, other


def formats_of(mode: str, precision: str) -> list[LayerFormat]:
    return [found for asked in options_of(mode, precision) if (found := asked.layer_format()) is not None]


def require_tool(mode: str) -> None:
    if mode.startswith("modelopt"):
        pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed: pip install 'recon[quant]'")
    if mode.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'recon[quant]'")


def built(base: Base, mode: str, precision: str, folder: Path, **knobs: Any) -> Plan:
    """Written, built, looked into and judged as the store does it."""
    network, (quant, rest) = network_of(base.name), options_of(mode, precision)
    recipe = make_recipe(network, quant, rest, base.ranges)
    onnx, out = folder / "written.onnx", folder / "plan.engine"
    written = write(network, base.graph, recipe, onnx)
    made = engine(**knobs)
    facts = made.build(Build(network, onnx, lambda: recipe), out)
    assert facts["bytes"] == out.stat().st_size > 100_000
    groups = {
        by: found for by, asked in (("quant_mode", quant), ("precision", rest)) if (found := asked.layer_format())
    }
    asked = Asked(recipe.layers, groups, recipe.infos, rest.rest_format)
    certificate = certify(made, out, written, {}, asked, onnx)
    return Plan(facts, made.inspect(out), dict(recipe.layers), dict(recipe.infos), certificate)


def built_alone(base: Base, mode: str, precision: str, folder: Path) -> Plan:
    """`built` in a process of a pool; nothing but what is known of the plan stays. For the smaller network also the
    newest GPU that lacks a type, where there is one."""
    torch.set_num_threads(1)
    try:
        folder.mkdir()
        found = built(base, mode, precision, folder)
        asked_for_all = not found.certificate["without_effect"]  # else its types are not in the graph
        if base.name == "da2-twin" and asked_for_all and (lacking := newest_without(mode, precision)):
            refused_in_words(base, mode, precision, lacking, folder)
        return found
    except pytest.fail.Exception as error:
        raise AssertionError(str(error)) from None  # pytest's own cannot leave its process
    finally:
        shutil.rmtree(folder)


def newest_without(mode: str, precision: str) -> str:
    """The newest GPU of TensorRT for RTX that lacks a type of the pair; empty when all have them."""
    rest, formats = options_of(mode, precision)[1].rest_format, formats_of(mode, precision)
    lacking = [target for target in targets.RTX_TARGETS if engine(compute_capability=[target]).refuses(formats, rest)]
    return lacking[-1] if lacking else ""


def refused_in_words(base: Base, mode: str, precision: str, target: str, folder: Path) -> None:
    """A GPU without the types is refused before any work, and TensorRT, asked all the same, says what our message says
    that it would."""
    rest, formats = options_of(mode, precision)[1].rest_format, formats_of(mode, precision)
    assert target in engine(compute_capability=[target]).refuses(formats, rest)
    lacking = [need for need in targets.needs(formats, rest, portable=True) if need.lacking(target)]
    with pytest.raises(ReconError, match="built no plan") as caught:
        built(base, mode, precision, folder, compute_capability=[target])
    assert any(need.says.rpartition(": ")[2] in str(caught.value) for need in lacking)  # it names one of several
    assert "compute_capability" in str(caught.value)


def require_proof(plan: Plan, name: str, mode: str, precision: str) -> None:
    """The plan holds the formats that were asked for, for the GPUs that have them, with attention fused."""
    rest, formats = options_of(mode, precision)[1].rest_format, formats_of(mode, precision)
    assert engine().refuses(formats, rest) == ""
    attention = plan.facts["attention"]
    assert len(attention["recognised"]) >= ATTENTIONS[name]
    if rest != "fp32":  # TensorRT fuses attention in 16 bits
        assert len(attention["kernels"]) >= ATTENTIONS[name]
        assert {layer.compute for layer in plan.seen.layers if "mha" in layer.name} == {rest}
    linear = [layer for layer in plan.seen.layers if set(layer.modules) & set(plan.infos)]
    for layer_format in set(plan.layers.values()):
        if layer_format.exact:
            assert STORED[layer_format.weight] in {layer.weight for layer in linear}, layer_format
        if layer_format.activation in ("int8", "fp8", "nvfp4-dynamic"):
            assert STORED[layer_format.weight] in {layer.compute for layer in linear}, layer_format
    if not formats:
        computed = [layer.compute for layer in linear]  # what 16 bits cannot hold stays FP32 in the graph
        assert computed.count(rest) > 0.6 * len(computed)
        named = {module for layer in linear for module in layer.modules}
        assert len(named) > len(plan.infos) / 2
