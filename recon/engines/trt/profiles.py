"""Optimisation profiles: the ranges of dynamic shapes that a plan is built for, or that a session is to take.

TensorRT accepts unknown names and minima above maxima without a word and fails later, and ONNX Runtime takes any size,
so all of it is checked here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recon.errors import ReconError
from recon.network import TensorSpec

if TYPE_CHECKING:
    import torch

Profile = Mapping[str, Mapping[str, Sequence[int]]]
Shape = tuple[int, ...]  # -1 = dynamic
POINTS = ("min", "opt", "max")


def check(profiles: Sequence[Profile]) -> None:
    """Refuse profiles that no graph could take.

    Raises:
        ReconError: a point is missing or unknown, ranks differ, or not min <= opt <= max.
    """
    for number, profile in enumerate(profiles):
        where = f"engine.profiles[{number}]"
        if not profile:
            raise ReconError(f"{where} is empty", "give min, opt and max for every dynamic input")
        for name, points in profile.items():
            _check_points(f"{where}.{name}", points)


def _check_points(where: str, points: Mapping[str, Sequence[int]]) -> None:
    if sorted(points) != sorted(POINTS):
        raise ReconError(f"{where} has {sorted(points)}", "give exactly min, opt and max, each a list of sizes")
    low, best, high = (tuple(points[point]) for point in POINTS)
    if not len(low) == len(best) == len(high) or not low:
        raise ReconError(
            f"{where}: min, opt and max have {len(low)}, {len(best)} and {len(high)} sizes",
            "give each as many sizes as the input has axes",
        )
    for axis, sizes in enumerate(zip(low, best, high, strict=True)):
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ReconError(
                f"{where}: axis {axis} has min {sizes[0]}, opt {sizes[1]}, max {sizes[2]}", "1 <= min <= opt <= max"
            )


def fit(profiles: Sequence[Profile], inputs: Mapping[str, Shape]) -> None:
    """Refuse profiles that do not belong to a graph with these inputs.

    Raises:
        ReconError: a dynamic input has no profile, a profile names an unknown input, or changes a fixed size.
    """
    dynamic = sorted(name for name, shape in inputs.items() if -1 in shape)
    if dynamic and not profiles:
        raise ReconError(
            f"inputs {', '.join(f'{name}{list(inputs[name])}' for name in dynamic)} have dynamic sizes (-1) and"
            " engine.profiles is empty",
            f"engine.profiles=[{{{dynamic[0]}:{{min:[...],opt:[...],max:[...]}}}}]",
        )
    for number, profile in enumerate(profiles):
        for name, points in profile.items():
            _fit_input(f"engine.profiles[{number}].{name}", name, points, inputs)
        if missing := [name for name in dynamic if name not in profile]:
            raise ReconError(f"engine.profiles[{number}] lacks the dynamic inputs {missing}", "give all of them")


def _fit_input(where: str, name: str, points: Mapping[str, Sequence[int]], inputs: Mapping[str, Shape]) -> None:
    if name not in inputs:
        near = difflib.get_close_matches(name, inputs, 1)
        raise ReconError(f"{where}: the graph has no such input", f"inputs: {', '.join(near or sorted(inputs))}")
    shape = inputs[name]
    for point in POINTS:
        sizes = tuple(points[point])
        if len(sizes) != len(shape) or any(want not in (-1, got) for want, got in zip(shape, sizes, strict=True)):
            raise ReconError(
                f"{where}.{point}={list(sizes)}: the graph's input is {list(shape)}",
                "sizes may differ where the graph has -1, and are the same elsewhere",
            )


def require(profiles: Sequence[Profile], inputs: Mapping[str, TensorSpec], feeds: Mapping[str, torch.Tensor]) -> None:
    """Refuse feeds of a session with dynamic shapes that have another dtype, or lie in none of its profiles.

    Raises:
        ReconError: an input and its dtype, or all shapes and the profiles.
    """
    for name, spec in inputs.items():
        if (got := str(feeds[name].dtype).removeprefix("torch.")) != spec.dtype:
            raise ReconError(f"input {name!r} is {got}: the engine takes {spec.dtype}", "convert it first")
    shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
    if matching(profiles, shapes) is None:
        raise ReconError(f"inputs {shapes} lie in none of the engine's profiles", f"it holds {list(profiles)}")


def matching(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The first profile whose ranges hold all these shapes; inputs that it does not name are fixed anyway."""
    for number, profile in enumerate(profiles):
        if all(_within(profile[name], shape) for name, shape in shapes.items() if name in profile):
            return number
    return None


def _within(points: Mapping[str, Sequence[int]], shape: Shape) -> bool:
    low, high = points["min"], points["max"]
    return len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
