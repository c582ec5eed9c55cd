"""What is really in a written graph, layer by layer: counted from the file, whatever its writer says it has done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recon.formats import LayerFormat
from recon.onnxgraph import WIDTHS, OnnxGraph, Product, Weight

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
"""NormalFloat4 (Dettmers et al., NeurIPS 2023, *QLoRA*, appendix E)."""
_FP4 = (0.0, 0.005208333333, 0.1666666667, 0.25, 0.3333333333, 0.5, 0.6666666667, 1.0)  # bitsandbytes' FP4, over 12
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, FP4
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4": tuple(sorted({sign * value for value in _FP4 for sign in (-1.0, 1.0)})),
    "nvfp4": tuple(sorted({sign * value / 6 for value in _E2M1 for sign in (-1.0, 1.0)})),
}
"""Values of the 4-bit formats, largest magnitude 1."""
BLOCKS = {"nf4": 64, "fp4": 64, "nvfp4": 16}
SAMPLED = 64  # blocks of a folded weight whose rounding is looked at; a weight that was not rounded fails at the first


@dataclass(frozen=True)
class Recount:
    """Products of a graph by module path, and how often what was found."""

    path: Path
    products: list[Product]
    graph: OnnxGraph = field(repr=False)

    @cached_property
    def by_module(self) -> dict[str, list[Product]]:
        """Products with a constant weight, by module path: a module that runs several times has several."""
        found: dict[str, list[Product]] = {}
        for product in self.products:
            if product.module and product.weight is not None:
                found.setdefault(product.module, []).append(product)
        return found

    def lacks(self, path: str, asked: LayerFormat) -> str:
        """Why a layer is not in the format asked for, in a few words; empty when it is."""
        products = self.by_module.get(path, [])
        if not products:
            return "no product of this module has a constant weight"
        return next((reason for product in products if (reason := self._lacks(product, asked))), "")

    def facts(self, formats: Mapping[str, LayerFormat]) -> dict[str, Any]:
        """Plain data for manifests. formats: asked for, by module path; decides what is listed as treated."""
        quantised = [product for product in self.products if label(product) != "plain"]
        pairs = sum(bool(product.activation) for product in self.products)
        return {
            "file": self.path.name,
            "opset": self.graph.opset,
            "products": len(self.products),
            "multiply_adds": sum(product.multiply_adds for product in self.products),
            "qdq_pairs_on_activations": pairs,
            "weight_only": sum(not product.activation for product in quantised),
            "codebooks": sum(bool(product.weight and product.weight.codebook) for product in quantised),
            "by_op": dict(Counter(product.op for product in quantised)),
            "operands": _shares(self.products, lambda product: product.compute or "unknown"),
            "layers": {
                path: {
                    "op": products[0].op,
                    "found": label(products[0]),
                    "bits_per_weight": round(products[0].weight.bits, 3) if products[0].weight else 0,
                    "block": products[0].weight.block if products[0].weight else 0,
                    "through": list(products[0].weight.ops) if products[0].weight else [],
                    "times": len(products),
                }
                for path, products in self.by_module.items()
                if path in formats or label(products[0]) != "plain"
            },
        }

    def _lacks(self, product: Product, asked: LayerFormat) -> str:
        assert product.weight is not None
        if product.activation != asked.activation:
            return f"activations {product.activation or 'not quantised'}, asked for {asked.activation or 'none'}"
        if asked.exact or asked.weight not in CODEBOOKS:
            return _stored(product.weight, asked)
        if _rounded(self.graph, product.weight, asked):
            return ""
        return f"weights stored as {product.weight.format}, without the rounding of {asked.weight}"


def recount(path: Path) -> Recount:
    """Read a graph."""
    graph = OnnxGraph(path)
    return Recount(path, graph.products, graph)


def label(product: Product) -> str:
    """What a product's operands are: `int8 w8a8`, `nf4 weight-only`, `plain`."""
    weight = product.weight
    stored = "" if weight is None else named(weight)
    if stored in ("fp32", "fp16", "bf16", "fp64", ""):
        return f"activations {product.activation}" if product.activation else "plain"
    return f"{stored} weight, {product.activation or 'no'} activation"


def named(weight: Weight) -> str:
    """Format of a stored weight; 4-bit codes by the values that they stand for."""
    if weight.codebook:
        return next((name for name, book in CODEBOOKS.items() if _same(weight.codebook, book)), "codebook")
    return "nvfp4" if weight.format == "fp4" and weight.block == 16 else weight.format


def _stored(weight: Weight, asked: LayerFormat) -> str:
    found = named(weight)
    if found == asked.weight or (found, asked.weight) == ("fp4", "nvfp4"):
        return ""
    if found == "codebook" and asked.weight in CODEBOOKS:
        return f"a codebook that is not {asked.weight}'s"
    return f"weights stored as {found}, asked for {asked.weight}"


def _same(found: tuple[float, ...], book: tuple[float, ...]) -> bool:
    """Whether a codebook has the values of a known one, up to a common factor. Zero may be in it twice."""
    values = np.unique(np.asarray(found, np.float64))
    known = np.unique(np.asarray(book, np.float64))
    values = values / max(np.abs(values).max(), 1e-30)
    return len(values) == len(known) and bool(np.allclose(values, known, atol=2e-3))


def _rounded(graph: OnnxGraph, weight: Weight, asked: LayerFormat) -> bool:
    """Whether every looked-at block of a dequantised weight holds only multiples of the codebook's values."""
    if WIDTHS.get(weight.format, 0) < 16:
        return True  # more than was asked for: it was not folded
    values = graph.values(weight.leaf).astype(np.float64)
    flat = (values if weight.transposed else values.T).ravel()
    block = asked.block or BLOCKS[asked.weight]
    blocks = [flat[start : start + block] for start in range(0, len(flat) // block * block or 1, block)]
    chosen = np.linspace(0, len(blocks) - 1, min(SAMPLED, len(blocks))).astype(int)
    book = np.unique(np.asarray(CODEBOOKS[asked.weight]))
    return all(_on_codebook(blocks[index], book) for index in chosen)


def _on_codebook(values: np.ndarray, book: np.ndarray) -> bool:
    """Some scale exists under which all values are codebook values, within FP16's rounding."""
    largest = values[np.argmax(np.abs(values))]
    if largest == 0:
        return True
    for top in book[book != 0]:
        if top * largest < 0:
            continue
        scaled = values * (top / largest)
        gap = np.abs(scaled[:, None] - book[None, :]).min(1)
        if np.all(gap <= np.maximum(1.5e-3 * np.abs(scaled), 1e-6)):
            return True
    return False


def _shares(products: list[Product], key: Any) -> dict[str, float]:
    total = sum(product.multiply_adds for product in products) or 1
    found: Counter[str] = Counter()
    for product in products:
        found[key(product)] += product.multiply_adds
    return {name: count / total for name, count in sorted(found.items())}
