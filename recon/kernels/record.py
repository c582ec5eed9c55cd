"""What a network multiplies while it runs: every product with its operands' formats, as torch's dispatcher sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

PRODUCT = re.compile(
    r"^aten::(mm|addmm|_addmm_activation|bmm|baddbmm|_scaled_mm|_int_mm|convolution|_scaled_dot_product\w*)$"
    r"|^recon::(linear_gelu|few_rows|attention|few_tokens_attention|enlarged_taps)$"
)
END = "recon::enlarged_taps"  # its taps' products came before; what its weight multiplies stays inside it, in FP32
ATTENTION = ("recon::attention", "recon::few_tokens_attention")
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8", torch.int32: "int32",
    torch.float8_e4m3fn: "fp8", torch.uint8: "uint8", torch.float64: "fp64",
}  # fmt: skip
"""Number formats, by torch's types, as recipes and certificates call them."""


class Recorder(TorchDispatchMode):
    """While it is entered, `products` fills: one entry for each product and set of formats, however often it runs.

    weights: what products multiply with, by name. Nothing here knows what was asked for: an entry says which of them
    took part, in which type it was, and in which type the other operand came.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self._seen: dict[tuple[str, str, tuple[str, ...]], dict[str, Any]] = {}

    @property
    def products(self) -> list[dict[str, Any]]:
        return list(self._seen.values())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name  # type: ignore[attr-defined]
        if PRODUCT.match(name):
            operands = [result, args[3]] if name == END else args
            self._note(name, [value for value in operands if isinstance(value, Tensor)], result)
        return result

    def _note(self, op: str, operands: list[Tensor], result: Any) -> None:
        names = [self._names.get(value.untyped_storage().data_ptr(), "") for value in operands]
        weight = next((name for name in names if name), "")
        matrices = [value for value in operands if value.ndim >= 2]
        live = [value for value, name in zip(operands, names, strict=True) if not name and value.ndim >= 2]
        compute = NAMES.get((live or matrices)[0].dtype, "unknown")
        if op in ATTENTION and not operands[0].is_cuda:
            compute = "fp32"  # the twins multiply in FP32 what came in a lower type
        out = tree_flatten(result)[0][0]
        inputs = tuple(NAMES.get(value.dtype, "unknown") for value in live[:3])
        if (key := (weight, op, inputs)) not in self._seen:
            stored = NAMES.get(operands[names.index(weight)].dtype, "unknown") if weight else ""
            self._seen[key] = {
                "node": f"{weight or op.partition('::')[2]}", "op": op.replace("::", "."), "compute": compute,
                "inputs": list(inputs), "output": NAMES.get(out.dtype, "unknown"), "weight": stored, "tensor": weight,
            }  # fmt: skip
