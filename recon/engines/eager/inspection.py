"""What an eager module computes in: every product of one inference as PyTorch dispatches it, without computing it.

Nothing here knows what was asked for. An operator's operands have the format that they have when it is called, autocast
and dequantisation behind them; a layer's weight has the format in which the module keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from recon.formats import EngineLayer, Inspection
from recon.lowbit.apply import WRAPPED, Wide
from recon.lowbit.linear import LowBitLinear
from recon.lowbit.stored import codebook_format, name_of
from recon.network import TensorSpec

PRODUCT = re.compile(r"^_?(linear|mm|addmm|bmm|baddbmm|int_mm|scaled_mm|convolution|scaled_dot_product\w+)$")
BIASED = ("addmm", "baddbmm")  # their first operand is added
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, LowBitLinear)


def inspect(module: nn.Module, inputs: Mapping[str, TensorSpec], device: str) -> Inspection:
    """Products of one inference of a module, `recon.lowbit.apply.Inference` or plain, by module path."""
    at: list[str] = []
    handles = [
        handle
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS)
        for handle in (
            layer.register_forward_pre_hook(partial(_enter, at, name)),
            layer.register_forward_hook(partial(_leave, at)),
        )
    ]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Watch(at) as watch:
            module(
                *(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in inputs.values())
            )
    finally:
        for handle in handles:
            handle.remove()
    return Inspection(tuple(dict.fromkeys(_layer(module, *seen) for seen in watch.seen)))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every product that is called. at: paths of the layers that the call lies in, innermost last."""

    def __init__(self, at: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.seen = at, list[tuple[str, str, tuple[str, ...]]]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if PRODUCT.match(name):
            operands = [value for value in args if isinstance(value, Tensor)][1 if name in BIASED else 0 :][:2]
            kinds = tuple(name_of(value.dtype) for value in operands)
            self.seen.append((self.at[-1] if self.at else "", name, kinds))
        return result


def _layer(root: nn.Module, path: str, op: str, kinds: tuple[str, ...]) -> EngineLayer:
    module = path.removeprefix(f"{WRAPPED}.").removesuffix(f".{Wide.INNER}")
    return EngineLayer(
        name=module or op,
        op=f"aten.{op}",
        compute=kinds[0],
        weight=stored_as(root.get_submodule(path)) if path else "",
        modules=(module,) if module else (),
        inputs=kinds,
    )


def stored_as(layer: nn.Module) -> str:
    """Format in which a layer keeps its weight."""
    tensor = getattr(layer, "codes", None)
    tensor = layer.weight if tensor is None else tensor
    assert isinstance(tensor, Tensor)
    book = getattr(layer, "codebook", None)
    if not isinstance(book, Tensor):
        return name_of(tensor.dtype)
    return codebook_format(book, getattr(layer, "block_scale", None) is not None)


def _enter(at: list[str], name: str, *_: object) -> None:
    at.append(name)


def _leave(at: list[str], *_: object) -> None:
    at.pop()
