"""engine=inductor: packages of every format against the same recipe run eagerly, and what is checked around them."""

import json
import logging
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_network import images, network, seeded
from test_lowbit import quantised
from torch import nn

from recon.artifact import obtain, read_manifest
from recon.certificate import certify
from recon.compare import OutputError, compare
from recon.engines import Build
from recon.engines.aoti import compile as aoti_compile
from recon.engines.aoti.inspection import kernel_of
from recon.engines.aoti.package import Identity, read
from recon.engines.aoti.record import Recorder
from recon.engines.aoti.session import own
from recon.engines.inductor import Inductor
from recon.engines.torch import Torch
from recon.errors import Damaged, ReconError
from recon.formats import LayerFormat, LayerInfo, Ranges, Recipe
from recon.lowbit.apply import prepare
from recon.network import Network, TensorSpec

INT8, FP8 = LayerFormat("int8", "int8"), LayerFormat("fp8", "fp8", per_tensor=True)


class Wide(nn.Module):
    """One layer for each format, one input row at the end of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(7))
        self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 9)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x, self.last(x[:1])


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide().eval()


def wide_network() -> Network:
    def example(seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(33, 64, generator=torch.Generator().manual_seed(seed))}

    return Network("wide-33x64", {"x": TensorSpec((33, 64))}, ("all", "first"), "seed-0", wide, example)


def recipe(module: nn.Module, layers: dict[str, LayerFormat], rest: str) -> Recipe:
    weights = {path: quantised(module.get_submodule(path).weight, asked) for path, asked in layers.items()}  # type: ignore[arg-type]
    infos = {
        path: LayerInfo(path, layer.in_features, layer.out_features, layer.weight.numel())
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return Recipe(layers, weights, Ranges(dict.fromkeys(layers, 4.0), {}, "max", "k", 1, "test"), rest, infos)  # type: ignore[arg-type]


def engine(**settings: object) -> Inductor:
    return Inductor(name="inductor", **settings)  # type: ignore[arg-type]


def errors(made: Path, of: Network, like: Recipe) -> dict[str, OutputError]:
    """A package against the same recipe run eagerly: only the order of sums may differ."""
    with engine().load(made) as session, Torch(name="torch").session(of, None, lambda: like) as eager:
        assert session.inputs == eager.inputs
        assert session.outputs == eager.outputs
        return compare(eager, session, [of.example(seed) for seed in (5, 6)])


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 and FP8 products in BF16, as an artifact of the store would be: with its manifest."""
    path = tmp_path_factory.mktemp("products") / "small_int8.pt2"
    source = Build(network(), None, lambda: recipe(seeded(), {"qkv": INT8, "out": FP8}, "bf16"))
    obtain(path, "engine", "key", lambda folder: engine().build(source, folder / path.name))
    return path


def test_products_run_in_int8_and_fp8(products: Path) -> None:
    like = recipe(seeded(), {"qkv": INT8, "out": FP8}, "bf16")
    for error in errors(products, network(), like).values():
        assert error.passes(2e-2), error
    seen = {layer.modules[0]: layer for layer in engine().inspect(products).layers if layer.modules}
    assert {path: (layer.compute, layer.weight) for path, layer in seen.items()} == {
        "stem": ("bf16", "bf16"),
        "patch": ("bf16", "bf16"),
        "qkv": ("int8", "int8"),
        "out": ("fp8", "fp8"),
    }
    assert "_int_mm" in seen["qkv"].kernel
    assert "_scaled_mm" in seen["out"].kernel
    attention = [layer for layer in engine().inspect(products).layers if "dot_product" in layer.op]
    assert [layer.compute for layer in attention] == ["bf16"]
    facts = read_manifest(products).facts
    assert facts["layers"] == {"qkv": asdict(INT8), "out": asdict(FP8)}
    assert facts["rest"] == "bf16"
    assert certify(engine(), products, facts, {})["verdict"] == "achieved"


def test_the_build_is_logged_beside_the_package_and_not_on_the_terminal(products: Path) -> None:
    log = products.with_name(products.name + ".log")
    assert "torchinductor" in log.read_text()
    assert log.name in read_manifest(products).files
    assert logging.getLogger("torch._inductor").level != logging.INFO


def test_outputs_of_one_inference_survive_the_next(products: Path) -> None:
    with engine().load(products) as session:
        first = session.infer(images(1))["tokens"]
        kept = first.clone()
        session.infer(images(2))
        assert torch.equal(first, kept)
        turned = {"images": images(1)["images"].transpose(2, 3).contiguous().transpose(2, 3)}
        assert torch.equal(session.infer(turned)["tokens"], kept)
        assert session.memory_mib() > products.stat().st_size / 2**20 * 0.99
        with pytest.raises(ReconError, match=r"float32\[2, 3, 32, 31\]"):
            session.infer({"images": torch.zeros(2, 3, 32, 31)})
    with pytest.raises(ReconError, match="closed"):
        session.infer(images(1))


STORED = {
    "layers.0": LayerFormat("int8"),
    "layers.1": LayerFormat("nf4", block=64),
    "layers.2": LayerFormat("fp4", block=32),
    "layers.3": LayerFormat("nvfp4", block=16),
    "layers.4": LayerFormat("fp8", per_tensor=True),
    "layers.5": LayerFormat("int8", "int8-dynamic"),
    "layers.6": LayerFormat("nf4", block=64, exact=False),
    "last": LayerFormat("int8", per_tensor=True),
}


def test_stored_formats_stay_stored_and_compute_in_the_rest(tmp_path: Path) -> None:
    path, like = tmp_path / "wide.pt2", recipe(wide(), STORED, "fp16")
    facts = engine().build(Build(wide_network(), None, lambda: recipe(wide(), STORED, "fp16")), path)
    for error in errors(path, wide_network(), like).values():
        assert error.passes(2e-3), error
    seen = {layer.modules[0]: layer for layer in engine().inspect(path).layers}
    assert {path: layer.weight for path, layer in seen.items()} == {
        **{path: asked.weight for path, asked in STORED.items()},
        "layers.6": "fp16",
    }
    assert {path: layer.compute for path, layer in seen.items()} == {
        **dict.fromkeys(STORED, "fp16"),
        "layers.5": "int8",
    }
    assert all(layer.kernel for layer in seen.values())
    assert certify(engine(), path, facts, {})["verdict"] == "achieved"
    assert facts["weights_mib"] * 2**20 < 64 * 64 * (2 * 1 + 3 * 0.75 + 1 + 2) + 9 * 64 + 9000


def test_a_build_that_forgets_its_recipe_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage: everything runs, the numbers are even better, and nothing is quantised."""
    layers = {"qkv": INT8, "out": FP8}
    path = tmp_path / "small.pt2"
    monkeypatch.setattr("recon.lowbit.apply.apply", lambda module, *args, **options: module)
    facts = engine().build(Build(network(), None, lambda: recipe(seeded(), layers, "fp32")), path)
    assert facts["layers"].keys() == layers.keys()
    with pytest.raises(ReconError, match=r"absent.*computed in fp32"):
        certify(engine(), path, facts, {})
    monkeypatch.undo()
    for error in errors(path, network(), Recipe()).values():  # and as plain FP32 it is torch's equal
        assert error.passes(1e-5), error


def test_packages_are_not_loaded_on_trust(products: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.pt2"
    strange.write_bytes(products.read_bytes() + b" ")
    with pytest.raises(ReconError, match=r"strange\.pt2.*native code"):
        engine().load(strange)
    bad = tmp_path / products.name
    bad.write_bytes(products.read_bytes()[:-7])
    bad.with_name(bad.name + ".json").write_bytes(products.with_name(products.name + ".json").read_bytes())
    bad.with_name(bad.name + ".log").write_bytes(products.with_name(products.name + ".log").read_bytes())
    with pytest.raises(Damaged, match="damaged"):
        engine().load(bad)
    strange.write_bytes(products.read_bytes())
    with engine(allow_foreign=True).load(strange) as session:
        assert session.infer(images(0))["tokens"].isfinite().all()
    with pytest.raises(ReconError, match=r"gone\.pt2: no such file"):
        engine().load(tmp_path / "gone.pt2")


@pytest.mark.parametrize("damage", ["truncated", "junk", "empty", "missing"])
def test_damaged_packages_are_named(products: Path, tmp_path: Path, damage: str) -> None:
    whole, bad = products.read_bytes(), tmp_path / "bad.pt2"
    if damage != "missing":
        bad.write_bytes({"truncated": whole[: len(whole) // 2], "junk": b"\x07junk" * 99, "empty": b""}[damage])
    for act in (engine(allow_foreign=True).load, engine().inspect):
        with pytest.raises(ReconError, match=r"bad\.pt2"):
            act(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, r"compiled for PyTorch 1\.0"),
        ({"device": "cuda"}, "compiled for cuda, not cpu"),
        ({"hardware": "Another CPU"}, "compiled for Another CPU"),
    ],
)
def test_packages_of_other_machines_are_refused_before_their_code_runs(
    products: Path, tmp_path: Path, change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, _ = read(products)
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        text = json.dumps(json.loads(identity.to_json()) | change)
        archive.writestr("other/extra/recon.json", text)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda *_, **__: pytest.fail("its code was loaded"))
    with pytest.raises(ReconError, match=message):
        engine(allow_foreign=True).load(other)


def test_buffers_that_are_made_in_inference_mode_can_be_filled_outside_it() -> None:
    with torch.inference_mode():
        made = own(torch.ones(3, 2).t(), "cpu")
    assert made.is_contiguous()
    assert torch.equal(made.mul_(2), torch.full((2, 3), 2.0))


def test_a_compiler_that_links_its_runtime_statically_is_named(tmp_path: Path) -> None:
    source = tmp_path / "own.cpp"
    source.write_text('#include <string>\nextern "C" int f(int n) { return std::to_string(n).size(); }\n')
    for name, option in (("shared.so", "-shared-libgcc"), ("static.so", "-static-libstdc++")):
        command = ["g++", "-shared", "-fPIC", option, "-o", str(tmp_path / name), str(source)]
        subprocess.run(command, check=True, timeout=60)
    aoti_compile.require_shared_runtime(tmp_path / "shared.so")
    with pytest.raises(ReconError, match=r"g\+\+ links its runtime statically") as caught:
        aoti_compile.require_shared_runtime(tmp_path / "static.so")
    assert "CXX=/usr/bin/g++" in str(caught.value)


def test_a_machine_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ReconError, match=r"no g\+\+ on the PATH") as caught:
        engine().build(Build(network(), None, Recipe), tmp_path / "small.pt2")
    assert "apt-get install g++" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "not enough memory on cuda.*512 MiB", "fewer views"),
        ("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes", "not enough memory", "fewer views"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "not enough memory", "fewer views"),
        (
            "C++ compile error\n\nCommand: g++\n\nOutput:\na.cpp:1: error: no cuda.h",
            r"refused.*no cuda\.h",
            "CUDA_HOME",
        ),
        ("Unsupported: data-dependent operator", "cannot compile it for cuda.*data-dependent", "engine=torch"),
    ],
)
def test_failures_say_what_to_do(text: str, message: str, remedy: str) -> None:
    found = Network("n", {}, (), "", seeded, images, memory_mib=512.0)
    error = aoti_compile.failure(text, found, "cuda")
    with pytest.raises(ReconError, match=message):
        raise error
    assert remedy in error.remedy


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x + 1,) if float(x.sum()) > 0 else (x,)

    spec = {"x": TensorSpec((2, 2))}
    branching = Network("branching", spec, ("y",), "", Branching, lambda seed: {"x": torch.ones(2, 2)})
    with pytest.raises(ReconError, match=r"branching: PyTorch .* cannot compile"):
        engine().build(Build(branching, None, Recipe), tmp_path / "branching.pt2")


def test_overflow_is_found_when_the_package_is_built() -> None:
    class Answers:
        def infer(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"pooled": torch.tensor([1.0, float("inf")])}

    with pytest.raises(ReconError, match=r"'pooled'.*not finite in fp16") as caught:
        aoti_compile.require_finite(Answers(), network(), "fp16")  # type: ignore[arg-type]
    assert "bf16" in caught.value.remedy


def test_only_one_process_compiles_in_the_cache_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are named by their content, and a package takes them away when it is done."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def compiling(*_: object, **__: object) -> list[str]:
        another = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = tmp_path / "cache" / ".recon.lock"
        ran = subprocess.run([sys.executable, "-c", another, str(lock)], capture_output=True, text=True)
        raise ReconError("another would wait" if "BlockingIOError" in ran.stderr else "another would compile", "")

    monkeypatch.setattr(aoti_compile, "_compiled", compiling)
    with pytest.raises(ReconError, match="another would wait"):
        engine().build(Build(network(), None, lambda: recipe(seeded(), {}, "fp32")), tmp_path / "x.pt2")


def test_settings_that_contradict_are_refused() -> None:
    engine().check()
    with pytest.raises(ReconError, match="cuda_graph=true"):
        engine(cuda_graph=True).check()
    with pytest.raises(ReconError, match="no such device"):
        engine(device="tpu").check()
    assert "FP4 tensor cores" in engine().refuses([LayerFormat("nvfp4", "nvfp4-dynamic", block=16)], "fp16")
    assert engine().refuses([INT8, FP8, LayerFormat("nf4", block=64)], "bf16") == ""


def test_products_are_read_off_the_graph_and_not_off_the_recipe() -> None:
    """The recorder on a traced graph, without compiling: a weight folded back to FP32 is seen as FP32."""
    made = prepare(wide(), recipe(wide(), {"layers.0": INT8, "layers.1": LayerFormat("nf4", block=64)}, "fp32"))
    made.module.layers[1] = nn.Linear(64, 64)  # type: ignore[union-attr,operator,index]
    with torch.no_grad():
        graph = torch.export.export(made, (torch.randn(33, 64),), strict=False).run_decompositions().module()
    recorder = Recorder(made)
    recorder(graph.graph)
    seen = {product["module"]: (product["compute"], product["weight"]) for product in recorder.products}
    assert seen["layers.0"] == ("int8", "int8")
    assert seen["layers.1"] == seen["layers.2"] == seen["last"] == ("fp32", "fp32")


def test_the_kernel_of_a_product_is_the_product_and_not_what_feeds_it() -> None:
    kernels = {
        "cpp_fused__scaled_mm_div_4:9": ["_scaled_mm", "div"],
        "aoti_torch_cpu__scaled_mm_out:10": ["_scaled_mm"],
        "triton_tem_fused_mm_gelu_1:3": ["mm", "gelu"],
        "triton_poi_fused_mm_0:2": ["mm"],
    }
    assert kernel_of("_scaled_mm", kernels) == "aoti_torch_cpu__scaled_mm_out"
    assert kernel_of("mm", kernels) == "triton_tem_fused_mm_gelu_1"
    assert kernel_of("bmm", kernels) == ""


def test_identities_survive_their_file() -> None:
    identity = Identity("2", "cpu", "X", {"x": TensorSpec((1, 2))}, {"y": TensorSpec((3,), "int64")}, 2, "bf16", [{}])
    assert Identity.from_json(identity.to_json()) == identity


MATRIX = [
    ("none", "fp32"), ("none", "fp16"), ("none", "bf16"), ("none", "int8"), ("none", "fp8"), ("modelopt-fp8", "int8"),
    ("torch-int8-dynamic", "fp16"), ("bitsandbytes-8bit", "fp16"), ("bitsandbytes-nf4", "bf16"),
    ("bitsandbytes-fp4", "int8"),
]  # fmt: skip


ROUTES = [("none", "int8"), ("bitsandbytes-nf4", "bf16")]
"""Integer products, and weights stored in fewer bits. CI runs these."""


@pytest.mark.parametrize(
    ("mode", "precision"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair in ROUTES else pytest.mark.matrix) for pair in MATRIX],
)
def test_the_depth_twin_in_every_mode(mode: str, precision: str, tmp_path: Path) -> None:
    from recon.config import option
    from recon.depth import Depth
    from recon.precision import Precision
    from recon.quant import QuantMode
    from recon.quantise import make_recipe

    depth, quant, rest = option("depth", "da2-twin"), option("quant_mode", mode), option("precision", precision)
    assert isinstance(depth, Depth)
    assert isinstance(quant, QuantMode)
    assert isinstance(rest, Precision)
    if quant.tool and not quant.tool_version():
        pytest.skip(f"{quant.tool} is not installed")
    found = depth.network()
    assert found is not None
    asked = Recipe() if (mode, precision) == ("none", "fp32") else make_recipe(found, quant, rest, ranges_of(found))
    path = tmp_path / "twin.pt2"
    facts = engine().build(Build(found, None, lambda: asked), path)
    for error in errors(path, found, asked).values():
        assert error.passes(1e-4 if precision == "fp32" else 2e-2), error
    certificate = certify(engine(), path, facts, {})
    assert certificate["verdict"] == "achieved", certificate["sentence"]


def ranges_of(found: Network) -> Ranges:
    module, seen = found.load(), dict[str, float]()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: float(args[0].abs().amax())}))  # type: ignore[misc]
    with torch.inference_mode():
        module(*found.example(3).values())
    return Ranges(seen, {}, "max", "k", 1, "test")


@pytest.mark.gpu
@pytest.mark.parametrize(("layers", "rest"), [({"qkv": INT8, "out": FP8}, "bf16"), ({}, "fp16"), ({}, "fp32")])
def test_packages_for_cuda(layers: dict[str, LayerFormat], rest: str, tmp_path: Path) -> None:
    path, like = tmp_path / "small.pt2", recipe(seeded(), layers, rest)
    facts = engine(device="cuda").build(Build(network(), None, lambda: recipe(seeded(), layers, rest)), path)
    assert certify(engine(), path, facts, {})["verdict"] == "achieved"
    feeds = images(5)
    with (
        engine(device="cuda").load(path) as replayed,
        engine(device="cuda", cuda_graph=False).load(path) as called,
        Torch(name="torch", device="cuda").session(network(), None, lambda: like) as eager,
    ):
        for _ in range(3):
            first, second = replayed.infer(feeds), called.infer(feeds)
            assert all(torch.equal(first[name], second[name]) for name in first)
        limit = 2e-2 if rest != "fp32" else 1e-5
        assert all(error.passes(limit) for error in compare(eager, replayed, [images(6), images(7)]).values())
    with pytest.raises(ReconError, match="compiled for cuda, not cpu"):
        engine().load(path)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Compiling must leave torch's global configuration as it was."""
    from torch._inductor import config

    yield
    assert config.post_grad_custom_post_pass is None
    assert config.trace.provenance_tracking_level == 0
