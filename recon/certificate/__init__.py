"""The precision certificate: what was asked for, what is in the graph, what the engine itself says, and a verdict.

    python -m recon.certificate ENGINE      prints the certificate of a built engine, after checking its hashes

*achieved*: the graph has what was asked for, and the engine stores and computes it so. *partial*: the graph has it and
the engine stores or computes a part in another format, or the quant mode left no layer to precision's; share and
sentence say which. *absent*: a format that was asked for is in no layer: the build fails. *unverified*: the graph has
it, and the plan cannot be looked into on this machine.
docs/quantisation.md has the rules in full.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recon.certificate.recount import Recount, recount
from recon.errors import ReconError
from recon.formats import EngineLayer, Inspection, LayerFormat, LayerInfo, Ranges, Recipe, RestFormat
from recon.onnxgraph import WIDTHS

if TYPE_CHECKING:
    from recon.engines import Engine
    from recon.network import Network

log = logging.getLogger(__name__)

Verdict = Literal["achieved", "partial", "absent", "unverified"]
WHOLE = 0.99  # share of multiply-adds from which a format counts as carried out, when no layer lacks it
COMPUTED = "computed in"  # how a layer's departure begins when its weight is stored as asked
NAMED = 4  # layers that a sentence names


@dataclass(frozen=True)
class Asked:
    """What a configuration asks of one network, decided without looking at any file.

    layers: formats by module path. groups: formats that the quant mode and the precision stand for, by option; one that
    no layer has got is absent. infos: every layer of the network. calibration: what ranges came from.
    """

    layers: Mapping[str, LayerFormat] = field(default_factory=dict)
    groups: Mapping[str, LayerFormat] = field(default_factory=dict)
    infos: Mapping[str, LayerInfo] = field(default_factory=dict)
    rest: RestFormat = "fp32"
    calibration: Mapping[str, Any] = field(default_factory=dict)


def certify(
    engine: Engine,
    file: Path,
    source: Mapping[str, Any],
    requested: Mapping[str, Any],
    asked: Asked | None = None,
    onnx: Path | None = None,
) -> dict[str, Any]:
    """The certificate of a built file, as plain data for its manifest.

    source: facts of what it was built from; where `asked` is not given, the formats that they state. onnx: the graph it
    was built from, counted here; None for engines that start from the torch module, which are judged by what they say
    of themselves alone.

    Raises:
        ReconError: a format that was asked for is absent from the graph or from the engine.
    """
    asked = asked if asked is not None else stated(source)
    graph = recount(onnx) if onnx is not None else None
    facts = graph.facts(asked.layers) if graph is not None else dict(source.get("graph", {}))
    return _certificate(file.name, engine.name, engine.inspect(file), requested, asked, graph, facts)


def certify_module(
    engine: Engine, network: Network, recipe: Recipe, requested: Mapping[str, Any], asked: Asked
) -> dict[str, Any]:
    """The certificate of an engine that builds no file, judged by what its module computes in. Raises as `certify`."""
    seen = engine.look(network, recipe)
    return _certificate(f"{network.name} in {engine.name}", engine.name, seen, requested, asked, None, {})


def _certificate(
    what: str,
    engine: str,
    seen: Inspection,
    requested: Mapping[str, Any],
    asked: Asked,
    graph: Recount | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    judged = _judge(asked, graph, seen)
    certificate = {
        "requested": _requested(requested, asked),
        "graph": dict(facts),
        "engine": _engine_facts(engine, seen, asked),
        "without_effect": without_effect(asked),
        **judged,
    }
    if idle := certificate["without_effect"]:
        log.warning("%s: %s", what, idle)
    if judged["verdict"] == "absent":
        raise ReconError(
            f"{what}: {judged['sentence']}",
            "the engine is not what was asked for, so it is not kept; this is a fault of the writer or of the engine",
        )
    return certificate


def stated(source: Mapping[str, Any]) -> Asked:
    """What facts of a written graph, or of an engine built from the module, state as asked for."""
    layers = {path: LayerFormat(**values) for path, values in source.get("layers", {}).items()}
    infos = {path: LayerInfo(**values) for path, values in source.get("infos", {}).items()}
    groups: dict[str, LayerFormat] = {layer.by: layer for layer in layers.values()}
    return Asked(layers, groups, infos, source.get("rest", "fp32"))


def calibration_facts(ranges: Ranges | None) -> dict[str, Any]:
    """What ranges came from, for certificates."""
    if ranges is None:
        return {}
    return {"key": ranges.key, "count": ranges.count, "source": ranges.source, "method": ranges.method}


@dataclass(frozen=True)
class _Told:
    """Engine layers by module path, and those that the engine does not trace back to a module."""

    layers: dict[str, list[EngineLayer]]
    nameless: list[EngineLayer]

    @staticmethod
    def of(seen: Inspection) -> _Told:
        found: dict[str, list[EngineLayer]] = {}
        for layer in seen.layers:
            for module in layer.modules:
                found.setdefault(module, []).append(layer)
        return _Told(found, [layer for layer in seen.layers if not layer.modules and layer.compute])


def _judge(asked: Asked, graph: Recount | None, seen: Inspection) -> dict[str, Any]:
    """verdict, share (of the network's multiply-adds carried out as asked), sentence, and the layers that lack it."""
    lacking = {path: reason for path, form in asked.layers.items() if graph and (reason := graph.lacks(path, form))}
    if sentence := _absent(asked, lacking, graph):
        return {"verdict": "absent", "share": 0.0, "sentence": sentence, "lacking": lacking, "elsewhere": {}}
    if seen.unseen:
        sentence = f"the graph has it, the engine cannot be looked into here: {seen.unseen}"
        share = _share(asked, graph, dict.fromkeys(lacking, "")) if graph else 0.0
        return {"verdict": "unverified", "share": share, "sentence": sentence, "lacking": lacking, "elsewhere": {}}
    told = _Told.of(seen)
    elsewhere = _elsewhere(asked, graph, told)
    if graph is None and (sentence := _absent_from_engine(asked, elsewhere)):
        return {"verdict": "absent", "share": 0.0, "sentence": sentence, "lacking": {}, "elsewhere": elsewhere}
    share = _share(asked, graph, {**elsewhere, **lacking})
    idle = without_effect(asked)
    whole = share >= WHOLE and not lacking and not set(elsewhere) & set(asked.layers) and not idle
    verdict: Verdict = "achieved" if whole else "partial"
    sentence = _sentence(asked, lacking, elsewhere, share) + (f"; {idle}" if idle else "")
    return {"verdict": verdict, "share": share, "sentence": sentence, "lacking": lacking, "elsewhere": elsewhere}


def without_effect(asked: Asked) -> str:
    """The sentence that says that precision's format is in no layer, the quant mode having taken them all; or empty."""
    form = asked.groups.get("precision")
    if form is None or not asked.layers or any(layer.by == "precision" for layer in asked.layers.values()):
        return ""
    return (
        f"{form.label}, which precision asks for, is in no layer: the quant mode takes every one that is not kept, so"
        f" this is the engine of precision={asked.rest}"
    )


def _absent(asked: Asked, lacking: Mapping[str, str], graph: Recount | None) -> str:
    """The sentence that says which format is in no layer of the graph; empty when every one is in some."""
    for option, form in asked.groups.items():
        wanted = [path for path, layer in asked.layers.items() if layer.by == option]
        if option == "precision" and not wanted and asked.layers:
            continue  # the quant mode has taken every layer that precision would have treated
        if not wanted:
            return f"absent: {form.label} ({option}) is asked for, and no layer of the network was given it"
        if all(path in lacking for path in wanted):
            return (
                f"absent: {form.label} ({option}) is asked for in {len(wanted)} layers and in none of the graph's:"
                f" {_some(lacking, wanted)}"
            )
    if graph is not None and asked.rest != "fp32":
        rest = [p for p in graph.products if p.module not in asked.layers or not asked.layers[p.module].activation]
        if rest and not any(product.compute == asked.rest for product in rest):
            return f"absent: no product of the graph is in {asked.rest}, which precision asks for"
    return ""


def _absent_from_engine(asked: Asked, elsewhere: Mapping[str, str]) -> str:
    """As `_absent`, of engines without a graph. Weights that are stored as asked are there, however multiplied."""
    for option, form in asked.groups.items():
        wanted = [path for path, layer in asked.layers.items() if layer.by == option]
        if wanted and all(not elsewhere.get(path, COMPUTED).startswith(COMPUTED) for path in wanted):
            return f"absent: {form.label} ({option}) is in none of the engine's layers: {_some(elsewhere, wanted)}"
    return ""


def _elsewhere(asked: Asked, graph: Recount | None, told: _Told) -> dict[str, str]:
    """Module path -> how the engine carries it out in another way than asked."""
    found = {}
    modules = {p.module for p in graph.products} if graph else set(told.layers)
    for path in sorted(modules | set(asked.layers)):
        form, layers = asked.layers.get(path), told.layers.get(path, [])
        if form is not None and not layers:
            found[path] = "not named by the engine"
        elif reason := next(
            (said for layer in layers or told.nameless if (said := _differs(layer, form, asked.rest))), ""
        ):
            found[path] = reason
    return found


def _differs(layer: EngineLayer, form: LayerFormat | None, rest: str) -> str:
    """How an engine's layer departs from the format asked for; empty when it does not."""
    expected = rest if form is None or not form.activation else form.activation.removesuffix("-dynamic")
    compute = "nvfp4" if layer.compute == "fp4" and expected == "nvfp4" else layer.compute
    parts = []
    if form is not None and form.exact and WIDTHS.get(layer.weight, 0) > WIDTHS[form.weight]:
        parts.append(f"stored as {layer.weight}")
    if compute != expected:
        parts.append(f"{COMPUTED} {compute}")
    return ", ".join(parts)


def _share(asked: Asked, graph: Recount | None, bad: Mapping[str, str]) -> float:
    """Share of multiply-adds in modules that are as asked; without a graph, of those of the layers."""
    if graph is not None:
        weights = Counter[str]()
        for product in graph.products:
            weights[product.module] += product.multiply_adds
    else:
        weights = Counter({path: info.multiply_adds or 1 for path, info in asked.infos.items()})
    total = sum(weights.values())
    return sum(count for module, count in weights.items() if module not in bad) / total if total else 1.0


def _sentence(asked: Asked, lacking: Mapping[str, str], elsewhere: Mapping[str, str], share: float) -> str:
    labels = Counter(form.label for form in asked.layers.values())
    what = ", ".join(f"{count} layers {name}" for name, count in labels.items())
    parts = [f"{what + ', ' if what else ''}rest {asked.rest}: {share:.1%} of multiply-adds as asked"]
    if lacking:
        parts.append(f"not in the graph: {_some(lacking, lacking)}")
    if elsewhere:
        ways = Counter(elsewhere.values())
        said = ", ".join(f"{count} modules {way}" for way, count in ways.most_common())
        parts.append(f"in the engine {said}")
    return "; ".join(parts)


def _some(reasons: Mapping[str, str], paths: Iterable[str]) -> str:
    chosen = list(paths)
    shown = "; ".join(f"{path}: {reasons[path]}" for path in chosen[:NAMED])
    return shown + (f"; and {len(chosen) - NAMED} more" if len(chosen) > NAMED else "")


def _requested(requested: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    labels = Counter(form.label for form in asked.layers.values())
    return {
        "quant_mode": dict(requested.get("quant_mode", {})),
        "precision": dict(requested.get("precision", {})),
        "calibration": dict(asked.calibration),
        "groups": {option: form.label for option, form in asked.groups.items()},
        "layers": dict(labels),
        "layers_left_alone": len(set(asked.infos) - set(asked.layers)),
        "rest": asked.rest,
    }


def _engine_facts(engine: str, seen: Inspection, asked: Asked) -> dict[str, Any]:
    """Treated layers one by one, the rest counted."""
    treated = [layer for layer in seen.layers if layer.weight or set(layer.modules) & set(asked.layers)]
    return {
        "name": engine,
        "unseen": seen.unseen,
        "layers": [{key: value for key, value in asdict(layer).items() if value} for layer in treated],
        "computed_in": dict(Counter(layer.compute for layer in seen.layers)),
        "stored_as": dict(Counter(layer.weight for layer in seen.layers if layer.weight)),
        "kernels": dict(Counter(layer.kernel or layer.op for layer in seen.layers)),
    }
