"""Twins and minis with recipes and packages of recon's kernels, for the tests of `engine.kernels=recon`."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon.artifact import obtain
from recon.certificate import certify
from recon.depth.depth_anything import DepthAnything
from recon.engines import Build
from recon.engines.inductor import Inductor
from recon.formats import Ranges, Recipe
from recon.models.vggt import VGGT
from recon.network import Network
from recon.precision import Precision
from recon.quant.none import NoQuant
from recon.quantise import make_recipe


@cache
def vggt() -> Network:
    return shared(VGGT(name="vggt-twin", preset="vggt-twin", weights="seeded:0", height=56, width=84).network(3))


@cache
def depth() -> Network:
    twin = DepthAnything(name="da2-twin", architecture="twin", weights="seeded:0", input_size=84, image_size=[3, 2])
    return shared(twin.network())


def shared(of: Network) -> Network:
    """With weights made once: to convert a network leaves it as it is."""
    return replace(of, load=cache(of.load))


NETWORKS = {"vggt": vggt, "depth": depth}


def engine(**settings: Any) -> Inductor:
    return Inductor(name="inductor", **({"kernels": "recon"} | settings))


def recipe(of: Network, precision: str, rest: str = "bf16", keep: list[str] | None = None) -> Recipe:
    module, seen, hooks = of.load(), dict[str, float](), []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            note = lambda _, args, n=name: seen.update({n: max(seen.get(n, 0.0), float(args[0].abs().amax()))})  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(note))  # type: ignore[arg-type]
    with torch.inference_mode():
        for seed in (10, 11):
            module(*of.example(seed).values())
    for hook in hooks:
        hook.remove()
    ranges = Ranges(seen, {}, "max", "k", 2, "test")
    return make_recipe(of, NoQuant(name="none", keep=keep or []), Precision(name=precision, rest=rest), ranges)


def made(of: Network, asked: Recipe, folder: Path, **settings: Any) -> tuple[Path, dict[str, Any]]:
    """The package as an artifact of the store is: with manifest and certificate."""
    path = folder / "net.pt2"

    def work(at: Path) -> dict[str, Any]:
        facts = engine(**settings).build(Build(of, None, lambda: asked), at / path.name)
        return facts | {"certificate": certify(engine(), at / path.name, facts, {})}

    return path, obtain(path, "engine", "key", work).manifest.facts


def rel(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def mini(views: int) -> Network:
    return shared(VGGT(name="vggt-mini", preset="vggt-mini", weights="seeded:0", height=112, width=112).network(views))


def depth_mini() -> Network:
    small = DepthAnything(name="da-mini", architecture="mini", weights="seeded:0", input_size=112, image_size=[1, 1])
    return shared(small.network())
