"""What a recipe says, for the fast networks of `recon.kernels`: which of it they can carry out, and in what form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from recon.formats import LayerFormat, QuantizedWeight, Ranges, Recipe, RestFormat
from recon.kernels.transformer import Low
from recon.lowbit.apply import DTYPES, linear_at, reach_of, too_wide

FP8 = LayerFormat("fp8", "fp8", per_tensor=True)


def why_not(recipe: Recipe) -> str:
    """Why no fast network can carry out the recipe; empty when one can."""
    if reason := why_not_formats(recipe.layers.values(), recipe.rest):
        return reason
    rowwise = next((path for path, weight in recipe.weights.items() if weight.scale.ndim), "")
    return f"its FP8 layers have one weight scale, and {rowwise} is to have one a channel" if rowwise else ""


def why_not_formats(formats: Iterable[LayerFormat], rest: RestFormat) -> str:
    """As `why_not`, before there is a recipe."""
    if rest == "fp32":
        return "recon's kernels compute in 16 bit and FP8, and precision asks for FP32"
    other = next((asked for asked in formats if (asked.weight, asked.activation) != ("fp8", "fp8")), None)
    return f"recon's kernels have no {other.label} layers" if other else ""


def why_too_wide(
    recipe: Recipe, module: nn.Module, full: tuple[str, ...], feeds: Iterable[Mapping[str, Tensor]]
) -> str:
    """Why FP16 cannot hold the network's values; empty when it can, or is not asked for.

    full: beginnings of the paths that are computed in FP32 anyway. feeds: inputs on the module's device, in its order.
    """
    if recipe.rest != "fp16":
        return ""
    wide = sorted(path for path in too_wide(module, recipe, feeds) if not path.startswith(full))
    if not wide:
        return ""
    return f"its fast form has no FP32 layers, and FP16 cannot hold {len(wide)} layers, {wide[0]} for one"


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The rest's format as torch names it."""
    return DTYPES[recipe.rest]


def low_of(recipe: Recipe | None, module: nn.Module, path: str) -> Low | None:
    """The E4M3 layer at `path` as the recipe states it: the tool's own codes, the calibrated range; None: not one.

    Raises:
        ReconError: the recipe is not one for this module.
    """
    if recipe is None or path not in recipe.layers:
        return None
    linear_at(module, path)
    weight = recipe.weights[path]
    return Low(weight.codes, weight.scale, reach_of(recipe, path))


def skeleton_recipe(module: nn.Module, fp8: Iterable[str], rest: str) -> Recipe:
    """A recipe without content, for networks without weights: these layers E4M3."""
    weights, layers = {}, {}
    for path in fp8:
        shape = linear_at(module, path).weight.shape
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")
        weights[path], layers[path] = QuantizedWeight(FP8, codes, torch.empty((), device="meta")), FP8
    return Recipe(layers, weights, Ranges(dict.fromkeys(layers, 1.0), {}, "", "", 0, ""), rest)  # type: ignore[arg-type]
