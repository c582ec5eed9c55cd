"""Quant modes give the numbers of the tools they are named after, and take the layers that those tools take."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_network import images, network, seeded
from torch import nn

from recon.config import option
from recon.errors import ReconError, Refused
from recon.formats import LayerInfo, QuantizedWeight, Ranges
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quant.bitsandbytes import BitsAndBytes
from recon.quant.modelopt import ModelOpt
from recon.quant.torch_dynamic import TorchDynamic
from recon.quantise import assign, keep_list, layer_infos, make_recipe, require_matches, require_own_keep_lists

SIZES = [(48, 64), (24, 96), (10, 32), (5, 9)]  # [out, in]; the last two are no multiples of 64


def _mode(name: str) -> QuantMode:
    found = option("quant_mode", name)
    assert isinstance(found, QuantMode)
    if found.tool and not found.tool_version():
        pytest.skip(f"{found.tool} is not installed: {found.install}")
    return found


def _precision(name: str) -> Precision:
    found = option("precision", name)
    assert isinstance(found, Precision)
    return found


def _weight(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.05


def _quantised(mode: QuantMode, weight: torch.Tensor) -> QuantizedWeight:
    return mode.quantise(weight, LayerInfo("layer", weight.shape[1], weight.shape[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_torch_dynamic_is_quantize_dynamic(size: tuple[int, int], per_channel: bool) -> None:
    from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

    module = nn.Sequential(nn.Linear(size[1], size[0]))
    module[0].weight.data = _weight(size)
    qconfig = per_channel_dynamic_qconfig if per_channel else default_dynamic_qconfig
    expected = quantize_dynamic(module, {nn.Linear: qconfig})[0].weight()
    got = _quantised(TorchDynamic(name="torch-int8-dynamic", per_channel=per_channel), _weight(size))
    assert torch.equal(got.codes, expected.int_repr())
    assert torch.equal(got.dequantised(), expected.dequantize())


@pytest.mark.parametrize("size", SIZES)
def test_bitsandbytes_8bit_is_the_librarys(size: tuple[int, int]) -> None:
    mode = _mode("bitsandbytes-8bit")
    from bitsandbytes import functional

    codes, absmax, _ = functional.int8_vectorwise_quant(_weight(size).half())
    got = _quantised(mode, _weight(size))
    assert torch.equal(got.codes, codes)
    assert torch.equal(got.scale, absmax / 127)
    expected = functional.int8_vectorwise_dequant(
        codes, absmax
    )  # multiplies in another order: one unit in the last place
    torch.testing.assert_close(got.dequantised(), expected, rtol=3e-7, atol=0)


def test_bitsandbytes_8bit_row_of_zeros() -> None:
    mode, weight = _mode("bitsandbytes-8bit"), _weight((4, 64))
    weight[2] = 0
    got = _quantised(mode, weight)
    assert bool((got.scale > 0).all())
    assert not bool(got.dequantised()[2].any())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_bitsandbytes_4bit_is_the_librarys(
    form: str, size: tuple[int, int], block_size: int, double_quant: bool
) -> None:
    _mode(f"bitsandbytes-{form}")
    from bitsandbytes import functional

    # as one long row: the CPU kernel of 0.50 takes wrong scales where rows end inside a block, its CUDA kernel does not
    packed, state = functional.quantize_4bit(
        _weight(size).view(1, -1), blocksize=block_size, quant_type=form, compress_statistics=double_quant
    )
    expected = functional.dequantize_4bit(packed, state).view(size)
    mode = BitsAndBytes(name=f"bitsandbytes-{form}", format=form, block_size=block_size, double_quant=double_quant)
    got = _quantised(mode, _weight(size))
    assert torch.equal(got.dequantised(), expected)
    assert got.format.block * got.scale.shape[1] == size[1]
    assert got.format.exact == (size[1] != 9)
    assert float((expected - _weight(size)).norm() / _weight(size).norm()) < 0.2


def test_modelopt_fp8_is_modelopts() -> None:
    mode = _mode("modelopt-fp8")
    from modelopt.torch.quantization.qtensor import FP8QTensor

    expected, scale = FP8QTensor.quantize(_weight((48, 64)))
    got = _quantised(mode, _weight((48, 64)))
    assert torch.equal(got.dequantised(), expected.dequantize(torch.float32, scale=scale))
    assert got.scale.ndim == 0


def test_modelopt_nvfp4_is_modelopts() -> None:
    mode = _mode("modelopt-nvfp4")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = _weight((48, 64))
    expected, scale, factor = NVFP4QTensor.quantize(weight.clone(), 16)
    got = _quantised(mode, weight)
    assert torch.equal(weight, _weight((48, 64))), "the network's own weight must not change"
    tools = expected.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
    assert torch.equal(got.dequantised(), tools)
    assert got.block_scale is not None
    assert got.block_scale.dtype == torch.float8_e4m3fn
    reason = mode.why_not(LayerInfo("embed", 9, 48))
    assert "9 input features" in reason
    assert not mode.treats(LayerInfo("embed", 9, 48))


@pytest.mark.parametrize("make", [BitsAndBytes, ModelOpt])
def test_missing_tool_is_refused_with_the_command(
    make: Callable[..., QuantMode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "tool", "no-such-package")
    name = make().format  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"no-such-package is not installed\n  remedy: pip install"):
        make(name=name).check()


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (BitsAndBytes(name="x", format="int4"), "quant_mode.format=int4"),
        (BitsAndBytes(name="x", block_size=48), "quant_mode.block_size=48"),
        (ModelOpt(name="x", format="mxfp8"), "quant_mode.format=mxfp8"),
    ],
)
def test_impossible_knobs(mode: QuantMode, message: str) -> None:
    with pytest.raises(ReconError, match=message):
        mode.check()


class Branches(nn.Module):
    """One layer called twice, one called once, one never; a convolution in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 64, 8, stride=8), nn.Linear(64, 64)
        self.once, self.never = nn.Linear(64, 9), nn.Linear(64, 64)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = self.stem(pictures).flatten(2).transpose(1, 2)
        return (self.once(self.twice(torch.relu(self.twice(tokens)))),)


def test_layer_infos_count_what_is_called() -> None:
    infos = layer_infos(Branches().eval(), images(0))
    rows = 2 * 16  # two pictures of 4x4 patches
    assert {path: info.multiply_adds for path, info in infos.items()} == {
        "twice": 2 * rows * 64 * 64,
        "once": rows * 64 * 9,
    }
    assert (infos["once"].in_features, infos["once"].out_features) == (64, 9)


def _infos() -> dict[str, LayerInfo]:
    sizes = {"a.qkv": 64, "a.proj": 64, "b.qkv": 64, "head": 9}
    return {path: LayerInfo(path, size, 32) for path, size in sizes.items()}


def test_the_mode_takes_its_layers_first() -> None:
    found = assign(_infos(), ModelOpt(name="modelopt-nvfp4", format="nvfp4"), _precision("int8"))
    assert {path: item.label for path, item in found.items()} == {
        **dict.fromkeys(("a.qkv", "a.proj", "b.qkv"), "nvfp4 w4a4 dynamic"),
        "head": "int8 w8a8",
    }
    assert [item.by for item in found.values()] == ["quant_mode"] * 3 + ["precision"]


def test_keep_holds_for_mode_and_precision(tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"keep": ["head"], "network": "n"}))
    mode = TorchDynamic(name="torch-int8-dynamic", keep=["a.*", str(file)])
    assert set(assign(_infos(), mode, _precision("fp32"))) == {"b.qkv"}
    assert set(assign(_infos(), mode, _precision("int8"))) == {"b.qkv"}
    assert keep_list(mode.keep) == ("a.*", "head")


def test_a_keep_list_holds_for_its_own_weights_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Paths such as `layer.0.fc1` may be in both networks of a run; which of them suffers is a matter of the weights."""
    mine, other = network(), replace(network(), name="other", weights_key="sha256:0123456789abcdef")
    file, foreign = tmp_path / "keep.json", tmp_path / "foreign.json"
    file.write_text(json.dumps({"keep": ["qkv"], "network": mine.name, "weights": mine.weights_key}))
    foreign.write_text(json.dumps({"keep": ["qkv"], "network": "vggt-9b", "weights": "sha256:" + "f" * 64}))
    require_own_keep_lists([str(file), "out*"], [mine, other])
    assert keep_list([str(file), "out*"], mine.weights_key) == ("qkv", "out*")
    assert keep_list([str(file), "out*"], other.weights_key) == ("out*",)
    mode = TorchDynamic(name="torch-int8-dynamic", keep=[str(file)])
    assert set(make_recipe(mine, mode, _precision("fp32"), None).layers) == {"out"}
    assert set(make_recipe(other, mode, _precision("fp32"), None).layers) == {"qkv", "out"}
    with pytest.raises(ReconError, match=r"made for the weights sha256:ffffffffffff of vggt-9b.*sha256:0123") as caught:
        require_own_keep_lists([str(foreign)], [mine, other])
    assert "stages=[sensitivity]" in str(caught.value)
    foreign.write_text(json.dumps({"keep": ["qkv"]}))
    require_own_keep_lists([str(foreign)], [mine])
    assert "does not say for which weights" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[1]", "is no keep-list"), ('{"keep": [1]}', "is no keep-list"), (None, "cannot be read")],
)
def test_bad_keep_lists(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ReconError, match=message):
        keep_list([str(file)])


def test_a_pattern_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    layers = {"vggt": ["camera_head.trunk.0.fc1", "a.qkv"], "da": ["encoder.0.fc1"]}
    file = tmp_path / "list.json"
    file.write_text('{"keep": ["a.*"]}')
    require_matches(["camera_head.*", "encoder.0.fc1", str(file)], layers)
    file.write_text('{"keep": ["a.*", "decoder.*"]}')
    with pytest.raises(ReconError, match=r"list\.json: decoder\.\*: names no layer of vggt or da"):
        require_matches([str(file)], layers)
    with pytest.raises(ReconError, match=r"keep=camer_head\.\*: names no layer of vggt or da") as caught:
        require_matches(["a.*", "camer_head.*"], layers)
    assert "camera_head.trunk.0.fc1" in caught.value.remedy


def test_empty_pattern() -> None:
    with pytest.raises(ReconError, match="empty pattern"):
        keep_list(["head", " "])


def test_a_mode_without_effect_is_an_error() -> None:
    everything = TorchDynamic(name="torch-int8-dynamic", keep=["*"])
    with pytest.raises(ReconError, match="quant_mode=torch-int8-dynamic treats no layer of this network: 4 of 4"):
        assign(_infos(), everything, _precision("fp32"))
    odd = {"head": LayerInfo("head", 9, 32)}
    with pytest.raises(ReconError, match=r"9 input features are no multiple of NVFP4's block"):
        assign(odd, ModelOpt(name="modelopt-nvfp4", format="nvfp4"), _precision("fp16"))
    with pytest.raises(ReconError, match="the network has no Linear layer"):
        assign({}, TorchDynamic(name="torch-int8-dynamic"), _precision("fp32"))
    none = _mode("none")
    none.keep = ["*"]
    with pytest.raises(ReconError, match="precision=int8 treats no layer"):
        assign(_infos(), none, _precision("int8"))


@pytest.mark.parametrize("value", [None, 0.0, float("nan"), float("inf")])
def test_a_range_that_means_nothing(value: float | None) -> None:
    inputs = {} if value is None else {"qkv": value, "out": 1.0}
    ranges = Ranges(inputs, {}, "max", "key", 1, "test")
    with pytest.raises(ReconError, match="its input's range is"):
        make_recipe(network(), _mode("modelopt-fp8"), _precision("fp32"), ranges)


def test_weights_that_are_not_finite() -> None:
    def load() -> nn.Module:
        module = seeded()
        module.get_submodule("out").weight.data[3, 4] = float("nan")
        return module

    with pytest.raises(ReconError, match="layer out: its weights are not finite"):
        make_recipe(network(load), TorchDynamic(name="torch-int8-dynamic"), _precision("fp32"), None)


MODES = ["torch-int8-dynamic", "bitsandbytes-8bit", "bitsandbytes-nf4", "bitsandbytes-fp4", "modelopt-fp8"]


@pytest.mark.parametrize("name", [*MODES, "modelopt-nvfp4"])
def test_weights_of_zeros_stay_zeros(name: str) -> None:
    got = _quantised(_mode(name), torch.zeros(8, 64))
    assert torch.equal(got.dequantised(), torch.zeros(8, 64))


def test_notes_say_why_layers_differ() -> None:
    mode = _mode("bitsandbytes-nf4")
    mode.keep = ["out"]
    recipe = make_recipe(network(), mode, _precision("fp32"), None)
    assert recipe.notes["out"] == "quant_mode.keep"
    assert "32 input features are no multiple of 64" in recipe.notes["qkv"]
    assert recipe.layers["qkv"].block == 32
