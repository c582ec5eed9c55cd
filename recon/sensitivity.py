"""Which layers suffer most from quantisation: each block is quantised alone, and poses and depth are measured.

Quantisation is simulated in torch (`recon.lowbit.simulate`) with the recipe's own weights and ranges, on real frames
that calibration did not see, against the FP32 network. Blocks are ranked by the error that they cause for the work they
save, and a keep-list within a budget of multiply-adds is written, which `quant_mode.keep=[FILE]` reads. What the list
achieves is measured as well, since errors of blocks do not add up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.accuracy import figures, measure
from recon.artifact import write_atomic
from recon.console import steps
from recon.engines import Session
from recon.engines.torch import TorchSession
from recon.errors import ReconError
from recon.formats import LayerInfo, Recipe
from recon.frames import sample
from recon.lowbit.simulate import simulate
from recon.network import Network
from recon.store import Store

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from recon.options import SensitivityOptions

    Tensors = dict[str, torch.Tensor]

GEOMETRY = ("absrel", "rotation_deg_mean", "translation_deg_mean")
"""Errors that rank, where the network has them: each as a share of what quantising everything causes."""


@dataclass(frozen=True)
class Effect:
    """What quantising some layers does. share: of the network's multiply-adds. errors: as `recon.accuracy.measure`."""

    block: str
    layers: tuple[str, ...]
    share: float
    errors: dict[str, float]
    score: float = 0.0

    def row(self, columns: list[str]) -> dict[str, Any]:
        """One line of the table."""
        known = {name: self.errors.get(name) for name in columns}
        return {
            "block": self.block, "layers": len(self.layers), "multiply_adds": self.share, "score": self.score, **known
        }  # fmt: skip


@dataclass(frozen=True)
class Sensitivity:
    """Blocks in the order of the error they cause, the layers to keep, and all layers quantised with and without."""

    network: Network
    blocks: list[Effect]
    everything: Effect
    kept: tuple[str, ...]
    with_list: Effect
    origin: str
    shared: int

    def verdict(self, budget: float) -> str:
        """What the keep-list achieves, in one line."""
        if not self.kept:
            least = min(effect.share for effect in self.blocks)
            return f"empty, the smallest block takes {100 * least:.0f} % and sensitivity.budget is {100 * budget:.0f} %"
        work = 100 * (self.everything.share - self.with_list.share)
        left = 100 * self.with_list.score
        return f"{len(self.kept)} layers kept, {work:.1f} % of the work, leave {left:.0f} % of the error"

    def rows(self) -> list[dict[str, Any]]:
        """The table: every block alone, then all of them, then all but the keep-list."""
        effects = [*self.blocks, self.everything, self.with_list]
        columns = [name for name in (*GEOMETRY, "rel_l2_max") if any(name in effect.errors for effect in effects)]
        return [effect.row(columns) for effect in effects]


def analyse(store: Store, network: Network) -> Sensitivity:
    """Measure every block of a network by itself.

    Raises:
        ReconError: the mode and precision quantise no layer of the network.
    """
    options: SensitivityOptions = store.config.sensitivity
    role, recipe = store.role(network), store.recipe(network)
    if not recipe.layers:
        raise ReconError(
            f"{network.name}: quant_mode={store.config.quant_mode.name} precision={store.config.precision.name}"
            " quantises no layer, so none can be sensitive to it",
            "choose precision=int8 or fp8, or a quant_mode",
        )
    found = sample(store.config, network, role, options.batches, skip=store.config.calibration.batches)
    module, groups = network.load().eval(), grouped(list(recipe.layers), options.group)
    size = next(iter(network.inputs.values())).shape[-2:]
    progress = steps(f"Sensitivity of {network.name}", len(groups) + 2)
    with TorchSession(network, module, options.device) as session, progress as tick:
        reference = _Stored(session, [session.infer(feeds) for feeds in found.feeds])

        def effect(block: str, layers: tuple[str, ...]) -> Effect:
            with simulate(module, only(recipe, layers)):
                errors = figures(measure(reference, session, found.feeds, size))
            tick()
            return Effect(block, layers, _share(layers, recipe.infos), errors)

        everything = effect("all", tuple(recipe.layers))
        alone = [effect(block, layers) for block, layers in groups.items()]
        blocks = ranked(alone, everything)
        kept = chosen(blocks, options.budget)
        rest = tuple(path for path in recipe.layers if path not in kept)
        with_list = ranked([effect("all but the keep-list", rest)], everything)[0]
    return Sensitivity(network, blocks, replace(everything, score=1.0), kept, with_list, found.origin, found.shared)


def grouped(layers: list[str], group: str) -> dict[str, tuple[str, ...]]:
    """Blocks of layers by name. block: what lies in one numbered module, e.g. a transformer block. kind: layers that
    differ by such numbers alone. layer: every layer by itself."""

    def name(path: str) -> str:
        if group == "layer":
            return path
        if group == "kind":
            return re.sub(r"\.\d+(?=\.|$)", ".*", path)
        numbered = re.match(r"(.*?\.\d+)(\.|$)", path)
        return numbered.group(1) if numbered else path.rpartition(".")[0] or path

    found: dict[str, list[str]] = {}
    for path in layers:
        found.setdefault(name(path), []).append(path)
    return {block: tuple(paths) for block, paths in found.items()}


def only(recipe: Recipe, layers: tuple[str, ...]) -> Recipe:
    """The recipe for these layers alone."""
    return replace(
        recipe,
        layers={path: recipe.layers[path] for path in layers},
        weights={path: recipe.weights[path] for path in layers},
    )


def ranked(blocks: list[Effect], everything: Effect) -> list[Effect]:
    """Worst first, with scores: the mean over pose and depth errors, each as a share of what everything causes."""
    names = [name for name in GEOMETRY if everything.errors.get(name)] or ["rel_l2_max"]

    def score(effect: Effect) -> float:
        shares = [effect.errors.get(name, 0.0) / max(everything.errors.get(name, 0.0), 1e-30) for name in names]
        return sum(shares) / len(shares)

    return sorted((replace(effect, score=score(effect)) for effect in blocks), key=lambda effect: -effect.score)


def chosen(blocks: list[Effect], budget: float) -> tuple[str, ...]:
    """Layers to keep: blocks by score per multiply-add, as many as fit into `budget` (share of all multiply-adds)."""
    kept: list[str] = []
    left = budget
    for effect in sorted(blocks, key=lambda effect: -effect.score / max(effect.share, 1e-12)):
        if effect.share <= left and effect.score > 0:
            left -= effect.share
            kept += effect.layers
    return tuple(kept)


def write_keep_list(found: Sensitivity, store: Store, out: Path) -> None:
    """The JSON that `quant_mode.keep` reads, with where it comes from."""
    config = store.config
    content = {
        "keep": list(found.kept),
        "network": found.network.name,
        "weights": found.network.weights_key,
        "quant_mode": config.quant_mode.settings(),
        "precision": config.precision.settings(),
        "sensitivity": vars(config.sensitivity),
        "frames": found.origin,
        "frames_shared_with_calibration": found.shared,
        "multiply_adds_kept": found.everything.share - found.with_list.share,
        "errors_without": found.everything.errors,
        "errors_with": found.with_list.errors,
        "blocks": {effect.block: effect.score for effect in found.blocks},
    }
    write_atomic(out, json.dumps(content, indent=1) + "\n")


def draw(found: Sensitivity, most: int = 40) -> Figure:
    """Scores of the worst blocks as bars; kept ones in another colour."""
    from matplotlib.figure import Figure

    worst = found.blocks[:most]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(worst)), layout="constrained")
    axis = figure.add_subplot()
    kept = set(found.kept)
    colours = ["tab:orange" if set(effect.layers) <= kept else "tab:blue" for effect in worst]
    axis.barh([effect.block for effect in worst], [100 * effect.score for effect in worst], color=colours)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set(xlabel="error caused alone, % of the error with all layers quantised (orange: kept)")
    axis.set_title(f"{found.network.name}: with the keep-list {100 * found.with_list.score:.0f} %", fontsize=9)
    return figure


def _share(layers: tuple[str, ...], infos: Mapping[str, LayerInfo]) -> float:
    total = sum(info.multiply_adds for info in infos.values())
    return sum(infos[path].multiply_adds for path in layers) / total if total else 0.0


class _Stored(Session):
    """Outputs that a session gave before, in the order of its inputs, again and again."""

    def __init__(self, session: Session, outputs: list[Tensors]) -> None:
        self.inputs, self.outputs, self._stored, self._next = session.inputs, session.outputs, outputs, 0

    def _run(self, feeds: Tensors) -> Tensors:
        found = self._stored[self._next % len(self._stored)]
        self._next += 1
        return found

    def memory_mib(self) -> float:
        return 0.0

    def close(self) -> None:
        self._stored = []
