"""The products of a graph as Inductor is about to generate code for it: formats of their operands, and whose weights.

Nothing here knows what was asked for. A product's layer is found by the constant that it multiplies with: constants
keep their names, and a layer's name is that of its weight without the last part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from recon.kernels.record import NAMES
from recon.lowbit.apply import WRAPPED, Wide
from recon.lowbit.stored import codebook_format, name_of

PRODUCT = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|addmv|mv)($|_)|convolution|scaled_dot_product|flex_attention|linear_pointwise|mkl_linear"
)
BIASED = ("addmm", "baddbmm", "addmv")  # their first operand is added
STORED = ("weight", "codes")  # last part of the name of what a layer multiplies with
LAYOUT = {
    "permute", "view", "reshape", "convert_element_type", "expand", "clone", "_to_copy", "slice", "unsqueeze", "t",
}  # fmt: skip


@dataclass
class Recorder:
    """Inductor's last pass over a graph: changes nothing, notes the products. One per compilation."""

    module: nn.Module
    products: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, graph: fx.Graph) -> None:
        live = _live(graph)
        claimed: set[str] = set()
        for node in graph.nodes:
            if node.op == "call_function" and PRODUCT.search(_op(node)):
                constants = [c for value in _operands(node) if value not in live for c in _constants(value)]
                claimed.update(str(c.target) for c in constants)
                self.products.append(self._product(node, constants, live))
        for node in graph.nodes:  # a product with one row becomes a sum of plain multiplications
            name = str(node.target)
            if node.op != "get_attr" or name in claimed or not self._is_weight(name):
                continue
            if (user := _first_live_user(node, live)) is not None:
                self.products.append(self._product(user, [node], live))

    def _product(self, node: fx.Node, constants: list[fx.Node], live: set[fx.Node]) -> dict[str, Any]:
        operands = [value for value in _operands(node) if value in live] or _operands(node)
        names = [str(constant.target) for constant in constants]
        return {
            "node": node.name,
            "op": f"aten.{_op(node)}",
            "compute": _format(operands[0]),
            "inputs": [_format(value) for value in operands],
            "output": _format(node),
            "weight": self._stored_as(names),
            "module": self._path(names),
        }

    def _stored_as(self, names: list[str]) -> str:
        """Format in which a product's constant operand lies in memory."""
        if not names:
            return ""
        tensors = [_constant(self.module, name) for name in names]
        formats = {tensor.dtype for tensor in tensors}
        if torch.uint8 in formats:
            book = next((t for t in tensors if t.shape == (16,) and t.dtype == torch.float32), None)
            if book is None:
                return "uint8"
            return codebook_format(book, torch.float8_e4m3fn in formats)
        return NAMES.get(max(tensors, key=torch.numel).dtype, "unknown")

    def _path(self, names: list[str]) -> str:
        """The module whose weight is among the constants; empty when they are no layer's."""
        owner = next((name for name in names if name.rpartition(".")[2] in STORED), "")
        return owner.rpartition(".")[0].removeprefix(f"{WRAPPED}.").removesuffix(f".{Wide.INNER}")

    def _is_weight(self, name: str) -> bool:
        return name.rpartition(".")[2] in STORED and _constant(self.module, name).ndim >= 2


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an input."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in live for source in node.all_input_nodes):
            live.add(node)
    return live


def _operands(node: fx.Node) -> list[fx.Node]:
    """What is multiplied, in order: without biases, scales and sizes."""
    found = [value for value in node.args if isinstance(value, fx.Node)]
    if _op(node) in BIASED:
        found = found[1:]
    return found[: 3 if "dot_product" in _op(node) else 2]


def _constants(value: fx.Node) -> list[fx.Node]:
    found, open_, seen = [], [value], {value}
    while open_:
        node = open_.pop()
        if node.op == "get_attr":
            found.append(node)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        open_ += fresh
    return found


def _first_live_user(node: fx.Node, live: set[fx.Node]) -> fx.Node | None:
    open_ = list(node.users)
    while open_:
        user = open_.pop(0)
        if user in live and _op(user) not in LAYOUT:
            return user
        open_ += list(user.users)
    return None


def _op(node: fx.Node) -> str:
    """`mm` of `aten.mm.default`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def _format(node: fx.Node) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    return name_of(value.dtype) if isinstance(value, Tensor) else "unknown"


def _constant(module: nn.Module, name: str) -> Tensor:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found.detach().cpu()
