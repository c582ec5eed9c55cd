"""A certificate as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recon.artifact import read_manifest, verify
from recon.errors import ReconError


def lines(path: Path) -> Iterator[str]:
    """The certificate of a built engine, line by line, after its manifest and files have been checked.

    Raises:
        ReconError: there is no such file, no manifest, or no certificate in it. Damaged: a hash is wrong.
    """
    if path.is_dir():
        built = ", ".join(sorted(str(file) for file in path.rglob("*.engine"))) or "none"
        raise ReconError(f"{path}: is a folder, a certificate belongs to a file", f"engines below it: {built}")
    if not path.is_file():
        raise ReconError(f"{path}: no such file", "give an engine that stages=[build] wrote")
    manifest = read_manifest(path)
    verify(path.parent, manifest)
    found = manifest.facts.get("certificate")
    if manifest.kind != "engine" or not found:
        raise ReconError(f"{path}: is of kind {manifest.kind!r} and carries no certificate", "give a built engine")
    yield f"{path.name}  key {manifest.key}"
    yield f"verdict    {found['verdict']}: {found['sentence']}"
    yield from _requested(found["requested"])
    yield from _graph(found["graph"])
    yield from _kernels(manifest.effective.get("kernels", {}))
    yield from _engine(found["engine"])
    yield from _layers(found)
    yield from _accuracy(manifest.facts.get("accuracy", {}))


def _requested(asked: Mapping[str, Any]) -> Iterator[str]:
    mode, precision = asked["quant_mode"].get("name", "?"), asked["precision"].get("name", "?")
    layers = ", ".join(f"{count} x {label}" for label, count in asked["layers"].items()) or "nothing quantised"
    yield f"requested  quant_mode={mode} precision={precision}: {layers}; {asked['layers_left_alone']} layers left"
    yield f"           alone; rest {asked['rest']}"
    if data := asked["calibration"]:
        yield f"           calibration {data['key'][:12]}: {data['count']} inputs, {data['method']}, {data['source']}"


def _graph(graph: Mapping[str, Any]) -> Iterator[str]:
    if "file" not in graph:
        yield "graph      none: built from the torch module"
        return
    yield (
        f"graph      {graph['file']} opset {graph['opset']}: {graph['products']} products,"
        f" {graph['qdq_pairs_on_activations']} Q/DQ pairs on activations, {graph['weight_only']} weight-only,"
        f" {graph['codebooks']} codebooks"
    )
    if graph["by_op"]:
        yield f"           quantised by operator: {_counts(graph['by_op'])}"
    yield f"           operands by multiply-adds: {_percent(graph['operands'])}"


def _kernels(said: Mapping[str, str]) -> Iterator[str]:
    if said:
        why = f": {said['reason']}" if "reason" in said else ""
        yield f"kernels    {said['effective']}, requested {said['requested']}{why}"


def _engine(engine: Mapping[str, Any]) -> Iterator[str]:
    if engine["unseen"]:
        yield f"engine     {engine['name']}: {engine['unseen']}"
        return
    yield f"engine     {engine['name']}: computed in {_counts(engine['computed_in'])} layers"
    yield f"           weights stored as {_counts(engine['stored_as'])}"
    for kernel, count in sorted(engine["kernels"].items(), key=lambda item: -item[1]):
        yield f"           {count:5d} x {kernel}"


def _layers(found: Mapping[str, Any]) -> Iterator[str]:
    told = {module: layer for layer in found["engine"]["layers"] for module in layer.get("modules", ())}
    rows = found["graph"].get("layers", {})
    if not rows and told:
        yield "layers     module: in the engine"
        for path, layer in told.items():
            yield f"           {path}: {layer.get('weight', '-')} weights, {layer['compute']} products"
    if not rows:
        return
    yield "layers     module: in the graph -> in the engine"
    for path, row in rows.items():
        layer = told.get(path)
        engine = f"{layer.get('weight', '-')} weights, {layer['compute']} products" if layer else "not told"
        bits = f"{row['bits_per_weight']:.2f} bits a weight"
        yield f"           {path}: {row['found']}, {bits} -> {engine}"


def _accuracy(accuracy: Mapping[str, Any]) -> Iterator[str]:
    if reason := accuracy.get("not_measured"):
        yield f"accuracy   not measured: {reason}"
    elif accuracy:
        numbers = ", ".join(
            f"{name} {value:.3g}" for name, value in accuracy.items() if isinstance(value, (int, float))
        )
        yield f"accuracy   against FP32 torch: {numbers}"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "none"


def _percent(found: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} {name}" for name, share in found.items())
