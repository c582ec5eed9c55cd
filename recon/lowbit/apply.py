"""A recipe carried out on a torch module: low-bit layers for Linear ones, everything else in the rest's format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.formats import Recipe, RestFormat
from recon.lowbit.linear import lowbit_linear

DTYPES: dict[RestFormat, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WRAPPED = "module"  # under which name `Inference` holds what it wraps
PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
FP16_REACH = 65504.0 / 2  # calibration sees some frames, not all: one bit of room


class Inference(nn.Module):
    """A module as it is deployed: FP32 tensors in and out, matrix products and convolutions in `rest` inside.

    Inside, autocast keeps what needs it (normalisation, exponentials, sums of the residual stream) in FP32.
    """

    def __init__(self, module: nn.Module, rest: RestFormat) -> None:
        super().__init__()
        self.module, self.rest = module, rest  # `module` is WRAPPED

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The module's inputs and outputs, floating-point ones in FP32."""
        if self.rest == "fp32":
            outputs = self.module(*inputs)
        else:
            kind = inputs[0].device.type
            with torch.autocast(kind, DTYPES[self.rest], cache_enabled=False):
                outputs = self.module(*inputs)
        return tuple(value.float() if value.is_floating_point() else value for value in outputs)


class Wide(nn.Module):
    """A layer that stays FP32 because its values do not fit the rest's format."""

    INNER: ClassVar[str] = "layer"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())  # type: ignore[no-any-return]


def prepare(
    module: nn.Module, recipe: Recipe, feeds: Iterable[Mapping[str, Tensor]] = (), *, simulate: bool = False
) -> Inference:
    """Change `module` (FP32, on the CPU) into what the recipe says, and wrap it for FP32 inputs and outputs.

    feeds: inputs, in the module's order, that show which layers FP16 cannot hold; without effect in other formats.

    Raises:
        ReconError: the recipe is not one for this module.
    """
    wide = too_wide(module, recipe, feeds) if recipe.rest == "fp16" else set()
    apply(module, recipe, wide=wide, simulate=simulate)
    if recipe.rest != "fp32":
        _narrow(module, DTYPES[recipe.rest], wide)
    return Inference(module, recipe.rest).eval()


def apply(module: nn.Module, recipe: Recipe, *, wide: Iterable[str] = (), simulate: bool = False) -> nn.Module:
    """Replace every layer of the recipe in place; the rest of the module is left as it is.

    wide: layers whose outputs are FP32 whatever the rest's format is. simulate: layers multiply in the rest's format
    what was rounded to theirs, for devices that cannot multiply in it.

    Raises:
        ReconError: the recipe is not one for this module.
    """
    fp32 = set(wide)
    for path, asked in recipe.layers.items():
        linear = linear_at(module, path)
        if path not in recipe.weights:
            raise ReconError(f"layer {path}: the recipe has no quantised weight for it", "quantise it first")
        weight, dtype = recipe.weights[path], DTYPES["fp32" if path in fp32 else recipe.rest]
        if weight.codebook is not None and not asked.exact:
            linear.weight = nn.Parameter(weight.dequantised(), requires_grad=False)
            continue
        reach = reach_of(recipe, path) if asked.calibrated else None
        module.set_submodule(path, lowbit_linear(linear, weight, dtype, reach, simulate))
    return module


def too_wide(module: nn.Module, recipe: Recipe, feeds: Iterable[Mapping[str, Tensor]]) -> set[str]:
    """Products whose input or output goes beyond what FP16 holds, in FP32 on `feeds` or during calibration."""
    seen: dict[str, float] = dict(recipe.ranges.inputs) if recipe.ranges else {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, PRODUCTS):

            def watch(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                seen[name] = max(seen.get(name, 0.0), *(float(value.abs().amax()) for value in (args[0], out)))

            handles.append(layer.register_forward_hook(watch))
    try:
        with torch.inference_mode():
            for feed in feeds:
                module(*feed.values())
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, reach in seen.items() if not reach <= FP16_REACH}


def stored_bytes(module: nn.Module) -> int:
    """What the parameters and buffers of a module take, packed weights as packed."""
    return sum(value.numel() * value.element_size() for value in [*module.parameters(), *module.buffers()])


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The Linear layer at `path`. Raises ReconError where there is none."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        found = None
    if type(found) is not nn.Linear:
        kind = "no module" if found is None else type(found).__name__
        raise ReconError(
            f"layer {path}: the recipe quantises it, and the network has {kind} there",
            "the recipe is one of another network: calibrate and quantise this one",
        )
    return found


def reach_of(recipe: Recipe, path: str) -> float:
    """The calibrated range of a layer's input. Raises ReconError where there is none."""
    reach = recipe.ranges.inputs.get(path) if recipe.ranges else None
    if reach is None or not math.isfinite(reach) or reach <= 0:
        raise ReconError(
            f"layer {path}: {recipe.layers[path].label} needs the range of its input, and calibration gave {reach}",
            "stages=[calibrate] with frames that the network was made for",
        )
    return reach


def _narrow(module: nn.Module, dtype: torch.dtype, wide: set[str]) -> None:
    """Weights of products in `dtype`; those of layers in `wide` stay FP32, out of autocast's reach."""
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, PRODUCTS):
            continue
        if name in wide:
            module.set_submodule(name, Wide(layer))
        else:
            layer.to(dtype)
