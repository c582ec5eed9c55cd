"""Sensitivity: simulation of a recipe, blocks and budgets, and a layer made sensitive on purpose that is found."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recon.calibration import CalibrationOptions
from recon.config import Config, check, option
from recon.depth.depth_anything import DepthAnything
from recon.errors import ReconError
from recon.export import ExportOptions
from recon.formats import FP8_MAX, LayerFormat, LayerInfo, Ranges, Recipe
from recon.lowbit.simulate import round_input, simulate
from recon.network import Network
from recon.options import SensitivityOptions
from recon.pipeline import Run, sensitivity
from recon.precision import Precision
from recon.quantise import assign, keep_list, make_recipe
from recon.sensitivity import Effect, analyse, chosen, grouped, ranked, write_keep_list
from recon.sources.synthetic import Synthetic
from recon.store import Store

FRAGILE = "model.backbone.encoder.layer.1"


@dataclass
class Fragile(DepthAnything):
    """The twin with one block whose input has a channel 300 times too large, and weights that make up for it: the same
    function in FP32, and hardly any code left for the other channels in INT8."""

    def network(self) -> Network:
        found = super().network()

        def load() -> nn.Module:
            module = found.load()
            block = module.get_submodule(FRAGILE)
            with torch.no_grad():
                block.norm1.weight[3] *= 300
                block.norm1.bias[3] *= 300
                for layer in (
                    m for name, m in block.attention.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))
                ):
                    layer.weight[:, 3] /= 300
            return module

        return replace(found, load=load, weights_key="fragile")


def settings(output: Path) -> Config:
    """depth=da2-twin at 56 pixels with one fragile block, precision=int8."""
    found = Config(output=str(output), stages=["sensitivity"])
    twin = option("depth", "da2-twin")
    assert isinstance(twin, DepthAnything)
    found.depth = Fragile(**twin.settings() | {"input_size": 56})
    for group, name in (("model", "recorded"), ("quant_mode", "none"), ("precision", "int8"), ("engine", "torch")):
        setattr(found, group, option(group, name))
    found.source = Synthetic(name="synthetic", count=2, steps=4, width=64, height=48)
    found.export = ExportOptions(simplify=False)
    found.calibration = CalibrationOptions(batches=2)
    found.sensitivity = SensitivityOptions(batches=2, budget=0.3)
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return settings(tmp_path_factory.mktemp("sensitivity"))


def test_the_fragile_block_is_found_kept_and_the_error_is_gone(config: Config) -> None:
    folder = Path(config.output) / "run"
    folder.mkdir()
    state = Run(config, folder, Store(config))
    outcome = sensitivity(state)
    (network,) = state.store.networks().values()
    rows = state.record.tables[f"sensitivity_{network.name}"]
    assert [row["block"] for row in rows[-2:]] == ["all", "all but the keep-list"]
    assert rows[0]["block"] == FRAGILE
    assert rows[0]["rel_l2_max"] > 3 * rows[1]["rel_l2_max"]
    assert rows[0]["absrel"] > 3 * rows[1]["absrel"]
    assert rows[-1]["rel_l2_max"] < 0.5 * rows[-2]["rel_l2_max"]
    file = folder / f"keep_{network.name}.json"
    patterns = keep_list([str(file)])
    assert {path.rpartition(".layer.")[2][0] for path in patterns} == {"1"}
    assert "6 layers kept" in outcome
    content = json.loads(file.read_text())
    assert content["network"] == network.name
    assert content["weights"] == "fragile"
    assert content["multiply_adds_kept"] == pytest.approx(0.25)
    assert content["errors_with"]["rel_l2_max"] < content["errors_without"]["rel_l2_max"]
    png = folder / f"sensitivity_{network.name}.png"
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert {file, png} <= set(state.record.files)
    mode = replace(config.quant_mode, keep=[str(file)])  # type: ignore[type-var]
    recipe = make_recipe(network, mode, config.precision, state.store.recipe(network).ranges)
    assert not set(recipe.layers) & set(patterns)
    assert len(recipe.layers) == 18
    assert set(assign(recipe.infos, mode, config.precision)) == set(recipe.layers)


def test_a_budget_too_small_for_any_block_is_said(config: Config, tmp_path: Path) -> None:
    config = replace(config, sensitivity=SensitivityOptions(batches=1, budget=0.1))
    store = Store(config)
    found = analyse(store, store.networks()["depth"])
    assert found.kept == ()
    assert found.verdict(0.1) == "empty, the smallest block takes 25 % and sensitivity.budget is 10 %"
    write_keep_list(found, store, tmp_path / "keep.json")
    assert keep_list([str(tmp_path / "keep.json")]) == ()


@pytest.mark.gpu
def test_blocks_rank_alike_on_the_gpu(config: Config) -> None:
    found = []
    for device in ("cpu", "cuda"):
        store = Store(replace(config, sensitivity=SensitivityOptions(batches=1, budget=0.3, device=device)))
        found.append(analyse(store, store.networks()["depth"]))
    host, there = found
    assert there.kept == host.kept
    scores = {effect.block: effect.score for effect in host.blocks}
    assert {effect.block: effect.score for effect in there.blocks} == pytest.approx(scores, rel=0.05)


def test_nothing_quantised_is_refused_before_any_work(config: Config) -> None:
    plain = replace(config, precision=option("precision", "fp16"))
    with pytest.raises(ReconError, match="quantise no layer"):
        check(plain)


@pytest.mark.parametrize("knobs", [{"group": "all"}, {"batches": 0}, {"budget": 1.0}, {"device": "gpu"}])
def test_impossible_options(knobs: dict[str, Any]) -> None:
    with pytest.raises(ReconError, match=f"sensitivity.{next(iter(knobs))}"):
        SensitivityOptions(**knobs).check()


def test_groups() -> None:
    layers = ["a.blocks.0.attn.qkv", "a.blocks.0.mlp.fc1", "a.blocks.10.attn.qkv", "head.fc", "head.mod.1", "out"]
    assert list(grouped(layers, "block")) == ["a.blocks.0", "a.blocks.10", "head", "head.mod.1", "out"]
    assert grouped(layers, "kind")["a.blocks.*.attn.qkv"] == ("a.blocks.0.attn.qkv", "a.blocks.10.attn.qkv")
    assert list(grouped(layers, "layer")) == layers


def test_ranking_and_budget() -> None:
    blocks = [
        Effect("large", ("l1", "l2"), 0.5, {"absrel": 0.5, "rotation_deg_mean": 1.0, "rel_l2_max": 9.0}),
        Effect("cheap", ("c",), 0.01, {"absrel": 0.1, "rotation_deg_mean": 1.6, "rel_l2_max": 0.1}),
        Effect("harmless", ("h",), 0.01, {"absrel": 0.0, "rotation_deg_mean": 0.0, "rel_l2_max": 0.0}),
        Effect("medium", ("m",), 0.2, {"absrel": 0.2, "rotation_deg_mean": 0.2, "rel_l2_max": 0.0}),
    ]
    everything = Effect("all", (), 1.0, {"absrel": 1.0, "rotation_deg_mean": 2.0, "rel_l2_max": 10.0})
    order = ranked(blocks, everything)
    assert [effect.block for effect in order] == ["large", "cheap", "medium", "harmless"]
    assert order[0].score == pytest.approx(0.5)
    assert chosen(order, 0.1) == ("c",)
    assert set(chosen(order, 0.55)) == {"c", "l1", "l2"}
    assert chosen(order, 0.0) == ()
    assert ranked(blocks, Effect("all", (), 1.0, {"rel_l2_max": 10.0}))[0].score == pytest.approx(0.9)


def _small() -> tuple[nn.Sequential, dict[str, LayerInfo]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).eval()
    return module, {"0": LayerInfo("0", 32, 64), "2": LayerInfo("2", 64, 16)}


@pytest.mark.parametrize(("name", "low", "high"), [("int8", 0.003, 0.03), ("fp8", 0.01, 0.08)])
def test_simulation_rounds_and_leaves_the_module_as_it_was(name: str, low: float, high: float) -> None:
    module, infos = _small()
    precision = option("precision", name)
    assert isinstance(precision, Precision)
    form = precision.layer_format()
    assert form is not None
    layers = dict(module.named_modules())
    weights = {path: precision.quantise(layers[path].weight, info) for path, info in infos.items()}  # type: ignore[arg-type]
    recipe = Recipe(dict.fromkeys(infos, form), weights, Ranges({"0": 4.0, "2": 3.0}, {}, "max", "", 1, ""))
    x = torch.randn(50, 32)
    with torch.no_grad():
        before = module(x)
        with simulate(module, recipe):
            error = float((module(x) - before).norm() / before.norm())
        assert low < error < high
        assert torch.equal(module(x), before)
        with pytest.raises(ReconError, match="no calibrated range"), simulate(module, replace(recipe, ranges=None)):
            pass
        with pytest.raises(ReconError, match="no Linear layer"), simulate(module, Recipe({"1": form}, weights)):
            pass
        assert torch.equal(module(x), before)


def test_inputs_are_rounded_to_the_codes_of_their_format() -> None:
    x = torch.linspace(-5, 5, 997)
    for activation, codes in (("int8", 256), ("int8-dynamic", 255)):
        steps = round_input(x, activation, 4.0) / ((4.0 if activation == "int8" else 5.0) / 127)  # type: ignore[arg-type]
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert steps.round().unique().numel() <= codes
    assert float(round_input(x, "int8", 4.0).max()) == pytest.approx(4.0)
    fp8 = round_input(x, "fp8", 4.0) / (4.0 / FP8_MAX)
    assert torch.allclose(fp8, fp8.to(torch.float8_e4m3fn).float(), rtol=1e-5)
    blocks = torch.randn(3, 40)
    rounded = round_input(blocks, "nvfp4-dynamic", None)
    assert rounded.shape == blocks.shape
    assert all(row[start : start + 16].abs().unique().numel() <= 8 for row in rounded for start in (0, 16))
    assert float((rounded - blocks).norm() / blocks.norm()) < 0.15


@pytest.mark.parametrize("rest", ["fp32", "fp16", "bf16"])
def test_weights_of_a_precision(rest: str) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 0, 6)[:, None]
    weight[2] = 0
    found = Precision(name="int8", rest=rest).quantise(weight, LayerInfo("x", 32, 6))
    assert found.format == LayerFormat("int8", "int8", by="precision")
    assert found.codes.dtype == torch.int8
    assert (found.codes[[0, 1, 3, 4, 5]].abs().amax(1) == 127).all()
    error = (found.dequantised() - weight).abs().amax(1)
    assert (error <= 0.505 * weight.abs().amax(1) / 127).all()
    if rest == "fp16":
        stored = found.scale.half().float()
        assert torch.equal(stored[4:], found.scale[4:]), "what the graph stores is what the codes were made for"
    fp8 = Precision(name="fp8", rest=rest).quantise(weight, LayerInfo("x", 32, 6))
    assert fp8.scale.shape == ()
    assert float((fp8.dequantised() - weight).norm() / weight.norm()) < 0.04
    with pytest.raises(ReconError, match="NaN"):
        Precision(name="int8").quantise(torch.full((2, 2), torch.nan), LayerInfo("x", 2, 2))
