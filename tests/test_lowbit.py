"""Low-bit layers against integer and FP64 arithmetic written out, and recipes carried out on whole modules."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from recon.engines.torch import Torch
from recon.errors import ReconError
from recon.formats import BITS, LayerFormat, QuantizedWeight, Ranges, Recipe, WeightFormat
from recon.lowbit.apply import Inference, apply, prepare, stored_bytes
from recon.lowbit.linear import Fp8Linear, Int8Linear, LowBitLinear, SimulatedLinear, WeightOnlyLinear, lowbit_linear
from recon.lowbit.packing import pack, shifts, unpack
from recon.lowbit.support import refusal
from recon.network import Network, TensorSpec

E4M3 = torch.float8_e4m3fn
NF4 = torch.cat([-(torch.linspace(1, 0.08, 7) ** 1.3), torch.zeros(1), torch.linspace(0.07, 1, 8) ** 1.2])
FP4 = torch.tensor([0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25])
FP4 = torch.cat([FP4, -FP4])
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([E2M1, -E2M1])


def quantised(weight: torch.Tensor, asked: LayerFormat) -> QuantizedWeight:
    """A plain quantiser of every format, enough to have codes and scales that belong together."""
    weight = weight.detach()
    if asked.weight in ("int8", "fp8"):
        top = 127 if asked.weight == "int8" else 448
        scale = (weight.abs().amax() if asked.per_tensor else weight.abs().amax(1)) / top
        scaled = weight / (scale if asked.per_tensor else scale[:, None])
        codes = scaled.round().to(torch.int8) if asked.weight == "int8" else scaled.to(E4M3)
        return QuantizedWeight(asked, codes, scale)
    book = {"nf4": NF4, "fp4": FP4, "nvfp4": E2M1}[asked.weight]
    blocks = weight.reshape(weight.shape[0], -1, asked.block)
    scale, block_scale = blocks.abs().amax(-1) / book.abs().max(), None
    effective = scale
    if asked.weight == "nvfp4":
        factor = scale.max() / 448
        block_scale = (scale / factor).to(E4M3)
        scale, effective = factor, factor * block_scale.float()
    codes = ((blocks / effective[..., None])[..., None] - book).abs().argmin(-1).to(torch.uint8).reshape(weight.shape)
    return QuantizedWeight(asked, codes, scale, codebook=book, block_scale=block_scale)


def linear(rows: int = 48, columns: int = 64, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows)


@pytest.mark.parametrize("columns", [2, 7, 64])
def test_two_codes_lie_in_a_byte(columns: int) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (5, (columns + 1) // 2)
    assert torch.equal(unpack(packed, shifts(), columns), codes)
    assert int(packed[0, 0]) == 16 * int(codes[0, 0]) + int(codes[0, 1])


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("sizes", [(48, 64), (9, 20), (16, 9)])
@pytest.mark.parametrize("activation", ["int8", "int8-dynamic"])
def test_int8_products_are_exact_integer_sums(per_tensor: bool, sizes: tuple[int, int], activation: str) -> None:
    layer = linear(*sizes)
    weight = quantised(layer.weight, LayerFormat("int8", activation, per_tensor=per_tensor))  # type: ignore[arg-type]
    x = torch.randn(3, 5, sizes[1])
    reach = 2.0 if activation == "int8" else float(x.abs().max())  # some inputs lie beyond the range: they saturate
    step = torch.tensor(reach) / 127
    codes = (x / step).round().clamp(-128, 127).long()
    want = (codes @ weight.codes.long().T).double() * (step.double() * weight.scale.double()) + layer.bias
    got = lowbit_linear(layer, weight, torch.float32, reach)(x)
    assert isinstance(lowbit_linear(layer, weight, torch.float32, reach), Int8Linear)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("sizes", [(48, 64), (9, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_products_are_those_of_the_rounded_operands(
    per_tensor: bool, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = linear(*sizes)
    weight = quantised(layer.weight, LayerFormat("fp8", "fp8", per_tensor=per_tensor))
    x = torch.randn(3, 5, sizes[1])
    step = torch.tensor(2.0 / 448)
    codes = (x / step).clamp(-448, 448).to(E4M3).double()
    want = (codes * step) @ weight.dequantised().double().T + layer.bias
    made = lowbit_linear(layer, weight, dtype, reach=2.0)
    assert isinstance(made, Fp8Linear)
    got = made(x.to(dtype) if dtype == torch.float32 else x)
    assert got.dtype == dtype
    resolution = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=resolution, atol=resolution)


WEIGHT_ONLY = [
    LayerFormat("int8"),
    LayerFormat("int8", per_tensor=True),
    LayerFormat("fp8", per_tensor=True),
    LayerFormat("nf4", block=64),
    LayerFormat("fp4", block=32),
    LayerFormat("nvfp4", block=16),
]


@pytest.mark.parametrize("asked", WEIGHT_ONLY, ids=lambda asked: f"{asked.label}-{asked.block}")
def test_weight_only_layers_hold_few_bits_and_multiply_the_tools_own_values(asked: LayerFormat) -> None:
    layer = linear(128, 256)
    weight = quantised(layer.weight, asked)
    made = lowbit_linear(layer, weight, torch.float32)
    assert isinstance(made, WeightOnlyLinear)
    assert torch.equal(made.dequantised(), weight.dequantised())
    x = torch.randn(4, 256)
    assert torch.equal(made(x), nn.functional.linear(x, weight.dequantised(), layer.bias))
    half = lowbit_linear(layer, weight, torch.bfloat16)
    assert torch.equal(half.dequantised(), weight.dequantised().bfloat16())  # type: ignore[operator]
    bits = 8 * made.codes.numel() * made.codes.element_size() / layer.weight.numel()
    assert bits == BITS[asked.weight]
    assert stored_bytes(made) < stored_bytes(layer) * (0.27 if bits == 8 else 0.17)


def test_odd_sizes_pack_too() -> None:
    layer = linear(5, 9)
    weight = quantised(layer.weight, LayerFormat("fp4", block=3))
    made = lowbit_linear(layer, weight, torch.float32)
    assert torch.equal(made.dequantised(), weight.dequantised())  # type: ignore[operator]


@pytest.mark.parametrize(
    "asked",
    [
        LayerFormat("int8", "int8"),
        LayerFormat("int8", "int8-dynamic"),
        LayerFormat("fp8", "fp8", per_tensor=True),
        LayerFormat("nvfp4", "nvfp4-dynamic", block=16),
    ],
    ids=lambda asked: asked.label,
)
def test_simulation_gives_the_numbers_of_the_product(asked: LayerFormat) -> None:
    layer, x = linear(), torch.randn(40, 64)
    weight = quantised(layer.weight, asked)
    made = lowbit_linear(layer, weight, torch.float32, 2.0, simulate=True)
    assert isinstance(made, SimulatedLinear)
    if asked.activation == "nvfp4-dynamic":
        with pytest.raises(ReconError, match=r"nvfp4.*no PyTorch layer"):
            lowbit_linear(layer, weight, torch.float32, 2.0)
        want = layer(x).detach()
        assert 0.02 < float((made(x) - want).norm() / want.norm()) < 0.2
    else:
        torch.testing.assert_close(made(x), lowbit_linear(layer, weight, torch.float32, 2.0)(x), rtol=1e-4, atol=1e-5)


def test_conversion_of_the_whole_module_leaves_stored_formats_alone() -> None:
    for asked, reach in (
        (LayerFormat("fp8", "fp8", per_tensor=True), 2.0),
        (LayerFormat("nf4", block=64), None),
        (LayerFormat("int8", "int8"), 2.0),
    ):
        made = lowbit_linear(linear(), quantised(linear().weight, asked), torch.bfloat16, reach)
        before = {name: value.dtype for name, value in made.named_buffers()}
        assert {name: value.dtype for name, value in made.half().double().named_buffers()} == before
        assert all(value.device.type == "meta" for _, value in made.to("meta").named_buffers())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(64), nn.Linear(64, 128)
        self.second, self.conv = nn.Linear(128, 64), nn.Conv2d(1, 2, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + self.second(nn.functional.gelu(self.first(self.norm(x))))
        return y, self.conv(y[None, None])


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval().requires_grad_(False)


def recipe(asked: LayerFormat, module: nn.Module, rest: str = "fp32", reach: float = 6.0) -> Recipe:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    ranges = Ranges(dict.fromkeys(layers, reach), {}, "max", "k", 1, "test")
    weights = {name: quantised(layer.weight, asked) for name, layer in layers.items()}
    return Recipe(dict.fromkeys(layers, asked), weights, ranges, rest)  # type: ignore[arg-type]


ALL: dict[str, tuple[LayerFormat, float]] = {
    "int8 static": (LayerFormat("int8", "int8"), 0.02),
    "int8 dynamic": (LayerFormat("int8", "int8-dynamic"), 0.02),
    "fp8": (LayerFormat("fp8", "fp8", per_tensor=True), 0.04),
    "int8": (LayerFormat("int8"), 0.01),
    "nf4": (LayerFormat("nf4", block=64), 0.1),
    "fp4": (LayerFormat("fp4", block=64), 0.12),
    "nvfp4": (LayerFormat("nvfp4", block=16), 0.1),
}


@pytest.mark.parametrize("rest", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ALL)
def test_a_recipe_runs_and_stays_near_the_module(kind: str, rest: str) -> None:
    asked, limit = ALL[kind]
    module, x = net(), torch.randn(20, 64)
    want = net()(x)
    made = prepare(module, recipe(asked, module, rest), [{"x": x}])
    assert isinstance(made, Inference)
    assert all(isinstance(made.module.get_submodule(name), LowBitLinear) for name in ("first", "second"))
    with torch.inference_mode():
        got = made(x)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert 0 < float((a - b).norm() / b.norm()) < limit
    assert stored_bytes(made) < stored_bytes(net()) * 0.35


@pytest.mark.parametrize(("rest", "limit"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_rest_formats_without_quantised_layers(rest: str, limit: float) -> None:
    x, module = torch.randn(20, 64), net()
    made = prepare(module, Recipe(rest=rest), [{"x": x}])  # type: ignore[arg-type]
    for a, b in zip(made(x), net()(x), strict=True):
        assert a.dtype == torch.float32
        assert 0 < float((a - b).norm() / b.norm()) < limit
    assert module.norm.weight.dtype == torch.float32
    assert module.conv.weight.element_size() == 2
    assert stored_bytes(made) < 0.52 * stored_bytes(net())


def test_layers_that_fp16_cannot_hold_stay_fp32() -> None:
    """One channel of the first layer far beyond 65504, brought back by the second: FP16 everywhere gives infinity."""

    def spiky() -> Net:
        module = net()
        module.first.weight[7] *= 1e7
        module.second.weight[:, 7] *= 1e-7
        return module

    x = torch.randn(20, 64)
    want = spiky()(x)[0]
    assert not torch.isfinite(prepare(spiky(), Recipe(rest="fp16"))(x)[0]).all()
    made = prepare(spiky(), Recipe(rest="fp16"), [{"x": torch.randn(4, 64)}])
    got = made(x)[0]
    assert float((got - want).norm() / want.norm()) < 1e-3
    assert made.module.conv.weight.dtype == torch.float16  # type: ignore[union-attr]
    ranges = Ranges({"second": 1e6}, {}, "max", "k", 1, "test")  # the same, known from calibration alone
    known = prepare(spiky(), Recipe(ranges=ranges, rest="fp16"), [])
    assert "Wide" in str(known)


def test_folded_codebooks_are_plain_layers_with_the_tools_rounding() -> None:
    module = net()
    asked = LayerFormat("nf4", block=64, exact=False)
    made = apply(module, recipe(asked, module))
    first = made.get_submodule("first")
    assert type(first) is nn.Linear
    assert torch.equal(first.weight, quantised(net().first.weight, asked).dequantised())


def test_recipes_of_other_networks_are_refused() -> None:
    asked = LayerFormat("int8", "int8")
    good = recipe(asked, net())
    for bad, message in (
        (replace(good, layers={"third": asked}), "third.*no module"),
        (replace(good, layers={"norm": asked}), "norm.*LayerNorm"),
        (replace(good, weights={}), "first.*no quantised weight"),
        (replace(good, ranges=None), "first.*range"),
        (recipe(asked, net(), reach=float("nan")), "first.*nan"),
        (recipe(asked, net(), reach=0.0), r"first.*0\.0"),
    ):
        with pytest.raises(ReconError, match=message):
            prepare(net(), bad)


def engine_network() -> Network:
    def example(seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(20, 64, generator=torch.Generator().manual_seed(seed))}

    return Network("net-20x64", {"x": TensorSpec((20, 64))}, ("y", "map"), "seed-1", net, example)


def test_the_torch_engine_is_the_reference_unless_a_recipe_says_otherwise() -> None:
    found = engine_network()
    feeds = found.example(3)
    with Torch(name="torch").session(found, None) as plain, torch.inference_mode():
        for got, want in zip(plain.infer(feeds).values(), net()(feeds["x"]), strict=True):
            assert torch.equal(got, want)
    asked = recipe(LayerFormat("int8", "int8"), net(), "bf16")
    with Torch(name="torch").session(found, None, lambda: asked) as low, torch.inference_mode():
        assert low.outputs == plain.outputs
        expected = prepare(net(), asked, [found.example(0)])(feeds["x"])
        for got, want in zip(low.infer(feeds).values(), expected, strict=True):
            assert torch.equal(got, want)
        low_mib = low.memory_mib()
        assert low_mib < 8  # the growth of the process at the first run is in it
    with pytest.raises(ReconError, match="closed"):
        low.infer(feeds)


def test_the_torch_engine_simulates_only_when_asked() -> None:
    nvfp4 = LayerFormat("nvfp4", "nvfp4-dynamic", block=16)
    assert "FP4" in Torch(name="torch").refuses([nvfp4], "fp16")
    assert Torch(name="torch", simulate=True).refuses([nvfp4], "fp16") == ""
    assert "no effect" in Torch(name="torch", simulate=True).refuses([LayerFormat("nf4", block=64)], "fp16")
    found, asked = engine_network(), recipe(nvfp4, net())
    with pytest.raises(ReconError, match="no PyTorch layer"):
        Torch(name="torch").session(found, None, lambda: asked)
    with Torch(name="torch", simulate=True).session(found, None, lambda: asked) as session:
        got, want = session.infer(found.example(0))["y"], net()(found.example(0)["x"])[0]
    assert 0.01 < float((got - want).norm() / want.norm()) < 0.2


@pytest.mark.parametrize("weight", ["int8", "nf4", "fp4", "nvfp4", "fp8"])
def test_the_cpu_stores_every_format(weight: WeightFormat) -> None:
    assert refusal([LayerFormat(weight)], "bf16", "cpu") == ""


def test_what_the_cpu_cannot_multiply_is_said() -> None:
    assert "FP4 tensor cores" in refusal([LayerFormat("nvfp4", "nvfp4-dynamic", block=16)], "fp16", "cpu")
    assert refusal([LayerFormat("int8", "int8"), LayerFormat("fp8", "fp8")], "fp16", "cpu") == ""
    if not torch.cuda.is_available():
        assert "no CUDA device" in refusal([], "fp32", "cuda")


@pytest.mark.parametrize(
    ("capability", "asked", "rest", "message"),
    [
        ((8, 6), LayerFormat("fp8", "fp8"), "fp16", "sm86.*FP8"),
        ((8, 9), LayerFormat("fp8", "fp8"), "fp16", ""),
        ((7, 0), LayerFormat("int8", "int8"), "fp16", "sm70.*INT8"),
        ((7, 5), LayerFormat("int8", "int8-dynamic"), "bf16", "sm75.*BF16"),
        ((9, 0), LayerFormat("nvfp4", "nvfp4-dynamic"), "bf16", "FP4"),
        ((9, 0), LayerFormat("nf4", block=64), "bf16", ""),
    ],
)
def test_gpus_are_judged_by_their_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], asked: LayerFormat, rest: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    found = refusal([asked], rest, "cuda")  # type: ignore[arg-type]
    if not message:
        assert found == ""
    else:
        assert re.search(message, found), found
