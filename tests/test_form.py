"""engine=inductor with recon's kernels: the fast networks from recipe to package and back, on the CPU by their twins."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_networks import NETWORKS, depth, depth_mini, engine, made, mini, recipe, rel, vggt
from safetensors.torch import load_file, save_file
from small_network import network as plain_network

from recon.artifact import read_manifest
from recon.certificate import certify
from recon.certificate.text import lines
from recon.config import option
from recon.engines import Build
from recon.engines.aoti import compile as aoti_compile
from recon.engines.aoti.package import read
from recon.errors import ReconError
from recon.formats import LayerFormat, QuantizedWeight, Ranges, Recipe
from recon.kernels.form import rebuild
from recon.kernels.record import Recorder
from recon.kernels.transformer import Product
from recon.lowbit.apply import prepare
from recon.lowbit.fast import low_of
from recon.lowbit.support import refusal
from recon.network import Network

FP8 = LayerFormat("fp8", "fp8", per_tensor=True, by="precision")
KEPT = {"vggt": ["camera_head.*", "aggregator.frame_blocks.1.*"], "depth": ["*layer.1.attention.q_proj"]}


CASES = [
    ("bf16", "bf16", 2e-2, False),
    ("fp16", "fp16", 4e-3, False),
    ("fp8", "bf16", 8e-2, False),
    ("fp8", "bf16", 8e-2, True),
]


@pytest.mark.parametrize(("precision", "rest", "limit", "keep"), CASES)
@pytest.mark.parametrize("which", ["vggt", "depth"])
def test_a_session_is_the_fast_network_and_close_to_fp32(
    which: str, precision: str, rest: str, limit: float, keep: bool, tmp_path: Path
) -> None:
    of = NETWORKS[which]()
    asked = recipe(of, precision, rest, KEPT[which] if keep else None)
    path, facts = made(of, asked, tmp_path)
    feeds = of.example(5)
    fast = of.load().to_inference(torch.float16 if rest == "fp16" else torch.bfloat16, recipe=asked, compile=False)  # type: ignore[operator]
    with engine().load(path) as session, torch.inference_mode():
        found, same, wanted = session.infer(feeds), fast(*feeds.values()), of.load()(*feeds.values())
        assert session.inputs == of.inputs
        assert session.memory_mib() > facts["weights_mib"] * 0.99
    for name, like, full in zip(of.outputs, same, wanted, strict=True):
        assert torch.equal(found[name], like)
        assert 1e-5 < rel(found[name], full) < limit, name
    assert read_manifest(path).effective["kernels"] == {"requested": "recon", "effective": "recon"}
    verdict = facts["certificate"]["verdict"]  # the twin's camera head, which is FP32, is more than 1 % of it
    camera = which == "vggt" and not (precision == "fp8" and not keep)
    assert verdict == ("partial" if camera else "achieved"), facts["certificate"]["sentence"]
    told = {module: layer for layer in facts["certificate"]["engine"]["layers"] for module in layer["modules"]}
    for layer in asked.infos:  # every Linear is told, by its own path
        formats = (told[layer]["weight"], told[layer]["compute"])
        if layer in asked.layers:
            assert formats == ("fp8", "fp8"), layer
        elif layer.startswith("camera_head"):
            assert formats in (("fp16", "fp32"), ("fp32", "fp32")), layer
        else:
            assert formats == (rest, rest), layer
    text = "\n".join(lines(path))
    assert f"verdict    {verdict}" in text
    assert "kernels    recon, requested recon" in text
    first = next(iter(told))
    assert f"{first}: {told[first]['weight']} weights, {told[first]['compute']} products" in text


def test_fp8_layers_hold_the_recipes_codes_and_ranges(tmp_path: Path) -> None:
    of = vggt()
    asked = recipe(of, "fp8")
    path, _ = made(of, asked, tmp_path)
    tensors = load_file(path)
    for name, paths in of.load().to_inference(recipe=asked, compile=False).origins().items():  # type: ignore[operator]
        if paths[0] in asked.layers and name.startswith(("encoder", "trunk")):
            weight = asked.weights[paths[0]]
            assert torch.equal(tensors[name].view(torch.uint8), weight.codes.view(torch.uint8))
            at = name.removesuffix(".weight")
            assert float(tensors[f"{at}.weight_scale"]) == float(weight.scale)
            assert float(tensors[f"{at}.input_scale"]) == pytest.approx(asked.ranges.inputs[paths[0]] / 448)


@pytest.mark.parametrize("which", ["vggt", "depth"])
def test_fp8_layers_multiply_what_the_recipe_says(which: str) -> None:
    """Beside the same recipe carried out layer by layer on the plain network: the same numbers but for 16-bit rounding."""
    of = NETWORKS[which]()
    asked = recipe(of, "fp8", "fp16")
    feeds = list(of.example(5).values())
    with torch.inference_mode():
        layerwise = prepare(copy.deepcopy(of.load()), asked)(*feeds)
        fast = of.load().to_inference(torch.float16, recipe=asked, compile=False)(*feeds)  # type: ignore[operator]
        full = of.load()(*feeds)
    for a, b, wanted in zip(fast, layerwise, full, strict=True):
        assert rel(a, b) < 0.7 * rel(b, wanted) + 2e-3


@pytest.mark.parametrize("which", ["vggt", "depth"])
def test_a_recipe_on_the_cpu_goes_to_the_networks_device(which: str) -> None:
    of = NETWORKS[which]()
    asked = recipe(of, "fp8")
    fast = copy.deepcopy(of.load()).to("meta").to_inference(torch.bfloat16, recipe=asked, compile=False)  # type: ignore[operator]
    assert {name for name, value in fast.tensors().items() if not value.is_meta} == set()


def test_a_sabotaged_conversion_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 is asked for, BF16 is stored and multiplied: everything runs, and the numbers are even better."""
    of = depth()
    asked = recipe(of, "fp8")
    monkeypatch.setattr("recon.depth.nets.fast.low_of", lambda *_: None)
    facts = engine().build(Build(of, None, lambda: asked), path := tmp_path / "net.pt2")
    assert set(facts["layers"]) == set(asked.layers)
    with pytest.raises(ReconError, match=r"absent.*stored as bf16, computed in bf16"):
        certify(engine(), path, facts, {})


def test_one_sabotaged_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = vggt()
    asked = recipe(of, "fp8")
    victim = "aggregator.global_blocks.2.mlp.fc1"
    monkeypatch.setattr("recon.models.nets.fast.low_of", lambda *args: None if args[2] == victim else low_of(*args))
    facts = engine().build(Build(of, None, lambda: asked), path := tmp_path / "net.pt2")
    found = certify(engine(), path, facts, {})
    assert found["verdict"] == "partial"
    assert {path: said for path, said in found["elsewhere"].items() if path in asked.layers} == {
        victim: "stored as bf16, computed in bf16"
    }


def test_weights_changed_after_the_build_are_seen_in_the_file(tmp_path: Path) -> None:
    of = depth()
    path, facts = made(of, recipe(of, "fp8"), tmp_path)
    tensors = load_file(path)
    name = "blocks.0.fc1.weight"
    changed = tmp_path / "changed.pt2"
    save_file(tensors | {name: tensors[name].bfloat16()}, changed, metadata={"recon": read(path)[0].to_json()})
    found = certify(engine(), changed, facts, {})
    assert found["elsewhere"]["model.backbone.encoder.layer.0.mlp.fc1"] == "stored as bf16"
    with pytest.raises(ReconError, match=r"changed\.pt2: tensor blocks\.0\.fc1\.weight is torch\.bfloat16"):
        engine().load(changed)


def test_the_recorder_sees_formats_and_not_intentions() -> None:
    product = Product(torch.randn(32, 64), torch.randn(32), torch.bfloat16)
    with torch.no_grad(), Recorder({"w": product.weight}) as seen:
        product(torch.randn(5, 64).bfloat16())
        product(torch.randn(7, 64).bfloat16())
    assert [(p["op"], p["compute"], p["weight"], p["tensor"]) for p in seen.products] == [
        ("aten.addmm", "bf16", "bf16", "w")
    ]
    wide = torch.randn(4, 4, dtype=torch.float64)
    with Recorder({"w": wide}) as seen:  # a type that only one of the tables of names used to have
        torch.mm(wide + 1, wide)
    assert [(p["compute"], p["weight"]) for p in seen.products] == [("fp64", "fp64")]


def stored_int8(of: Network) -> Recipe:
    module = of.load()
    path, layer = next((n, m) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear))
    form_ = LayerFormat("int8", "int8")
    weight = QuantizedWeight(form_, torch.zeros(layer.weight.shape, dtype=torch.int8), torch.ones(layer.out_features))
    return Recipe({path: form_}, {path: weight}, Ranges({path: 1.0}, {}, "max", "k", 1, "t"), "bf16")


def rowwise(of: Network) -> Recipe:
    asked = recipe(of, "fp8")
    path = next(iter(asked.weights))
    weight = asked.weights[path]
    scale = weight.scale.expand(weight.codes.shape[0]).clone()
    return Recipe(
        asked.layers,
        dict(asked.weights) | {path: QuantizedWeight(weight.format, weight.codes, scale)},
        asked.ranges,
        "bf16",
    )


@pytest.mark.parametrize(
    ("of", "asked", "reason"),
    [
        (plain_network, lambda _: Recipe(rest="bf16"), "small-2x3x32x32 has no fast form"),
        (depth, lambda _: Recipe(), "FP32"),
        (depth, stored_int8, "no int8 w8a8 layers"),
        (depth, rowwise, "one a channel"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_or_compiled_and_said(
    of: Any, asked: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = of()
    source = Build(found, None, lambda: asked(found))
    with pytest.raises(ReconError, match=f"engine.kernels=recon: .*{reason}"):
        engine().build(source, tmp_path / "net.pt2")
    compiled: list[Recipe] = []
    monkeypatch.setattr(aoti_compile, "_unfit", lambda *_: "")  # as if this were such a GPU
    monkeypatch.setattr(aoti_compile, "_compile", lambda _, made, *rest: compiled.append(made) or {})
    facts = aoti_compile.build(source, tmp_path / "net.pt2", "cpu", False, "auto")
    assert len(compiled) == 1
    said = facts["effective"]["kernels"]
    assert (said["requested"], said["effective"]) == ("auto", "inductor")
    assert reason in said["reason"]


def test_the_log_has_both_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "net.pt2"
    log = out.with_name("net.pt2.log")
    log.write_text("of an earlier build")
    monkeypatch.setattr(aoti_compile, "_unfit", lambda *_: "")  # as if this were such a GPU

    def stop(*_: object) -> None:
        raise ReconError("before Inductor's code is compiled", "that takes long")

    monkeypatch.setattr(aoti_compile, "_compiled", stop)
    with pytest.raises(ReconError, match="before Inductor's code"):
        engine(kernels="auto").build(Build(plain_network(), None, Recipe), out)
    said = log.read_text()
    assert "earlier" not in said
    assert 0 < said.index("INFO recon: net.pt2: recon's kernels") < said.index("INFO recon: net.pt2: Inductor")


def test_fp16_that_overflows_is_refused(tmp_path: Path) -> None:
    of = depth()

    def load() -> torch.nn.Module:
        module = copy.deepcopy(of.load())
        module.model.backbone.encoder.layer[1].mlp.fc1.weight.data *= 1e6  # type: ignore[union-attr,index,operator]
        return module

    large = Network(of.name, of.inputs, of.outputs, "large", load, of.example)
    with pytest.raises(ReconError, match=r"FP16 cannot hold .*layer\.1\.mlp\.fc1"):
        engine().build(Build(large, None, lambda: Recipe(rest="fp16")), tmp_path / "net.pt2")


def test_cpu_builds_are_inductors_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aoti_compile, "_compile", lambda *_: {})
    facts = aoti_compile.build(Build(depth(), None, Recipe), tmp_path / "n.pt2", "cpu", False, "auto")
    assert facts["effective"]["kernels"]["effective"] == "inductor"
    assert "9.0" in facts["effective"]["kernels"]["reason"]
    facts = aoti_compile.build(Build(depth(), None, Recipe), tmp_path / "n.pt2", "cpu", False, "inductor")
    assert facts["effective"]["kernels"] == {"requested": "inductor", "effective": "inductor"}


def test_fp8_scores_are_asked_for_recorded_and_close(tmp_path: Path) -> None:
    of = vggt()
    asked = recipe(of, "fp8", keep=["camera_head.*"])
    path, _ = made(of, asked, tmp_path, fp8_scores=True)
    assert read_manifest(path).effective["kernels"]["fp8_scores_in_blocks"] == 8  # the trunk's, not the encoder's
    attention = [layer for layer in engine().inspect(path).layers if layer.op == "recon.attention"]
    assert {layer.inputs for layer in attention} == {("fp8", "fp8", "bf16"), ("bf16", "bf16", "bf16")}
    module = of.load()
    plain, low = (module.to_inference(recipe=asked, low_scores=on, compile=False) for on in (False, True))  # type: ignore[operator]
    with engine().load(path) as session, torch.inference_mode():
        feeds = of.example(5)
        found, same, without, full = session.infer(feeds), *(net(*feeds.values()) for net in (low, plain, module))
    for name, a, b, wanted in zip(of.outputs, same, without, full, strict=True):
        assert torch.equal(found[name], a)
        assert rel(a, wanted) < 1.5 * rel(b, wanted) + 1e-2
    assert any(not torch.equal(a, b) for a, b in zip(same, without, strict=True))


def test_fp8_scores_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReconError, match="fp8_scores=true with engine"):
        engine(kernels="inductor", fp8_scores=True).check()
    assert "none is asked for" in engine(fp8_scores=True).refuses([], "bf16")
    assert engine(fp8_scores=True).refuses([FP8], "bf16") == ""
    with pytest.raises(
        ReconError, match=r"(?s)engine\.fp8_scores=true: recon's kernels are for GPUs.*fp8_scores=false"
    ):
        engine(kernels="auto", fp8_scores=True).build(Build(depth(), None, Recipe), tmp_path / "n.pt2")


def test_settings_are_checked_and_part_of_the_key() -> None:
    with pytest.raises(ReconError, match=r"engine\.kernels=fast: not known"):
        engine(kernels="fast").check()
    with pytest.raises(ReconError, match="max_autotune"):
        engine(max_autotune=True).check()
    assert "int8" in engine().refuses([LayerFormat("int8", "int8")], "bf16")
    assert "FP32" in engine().refuses([], "fp32")
    assert engine().refuses([FP8], "bf16") == refusal([FP8], "bf16", "cpu") == ""
    assert engine(kernels="auto").refuses([LayerFormat("int8", "int8")], "fp32") == ""
    assert "form" in engine().versions()
    assert "form" not in engine(kernels="inductor").versions()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "rest", "limit"), [("bf16", "bf16", 3e-2), ("fp16", "fp16", 1e-2), ("fp8", "bf16", 0.15)]
)
@pytest.mark.parametrize("of", [depth_mini, lambda: mini(2), lambda: mini(9)])
def test_packages_for_cuda(of: Any, precision: str, rest: str, limit: float, tmp_path: Path) -> None:
    found = of()
    asked = recipe(found, precision, rest)
    path, facts = made(found, asked, tmp_path, device="cuda", kernels="auto")
    assert read_manifest(path).effective["kernels"] == {"requested": "auto", "effective": "recon"}
    told = {module: layer for layer in facts["certificate"]["engine"]["layers"] for module in layer["modules"]}
    assert all((told[layer]["weight"], told[layer]["compute"]) == ("fp8", "fp8") for layer in asked.layers)
    feeds = found.example(5)
    cuda = {"device": "cuda"}
    with (
        engine(**cuda).load(path) as graph,
        engine(cuda_graph=False, **cuda).load(path) as plain,
        torch.inference_mode(),
    ):
        wanted = found.load().cpu()(*feeds.values())
        for _ in range(3):
            replayed, called = graph.infer(feeds), plain.infer(feeds)
        own = graph.buffers()
        assert plain.buffers() == {}
        for name, buffer in own.items():
            buffer.copy_(feeds[name])
        placed = graph.infer(own)
        for name, full in zip(found.outputs, wanted, strict=True):
            assert rel(replayed[name].cpu(), full) < limit, name
            assert torch.equal(placed[name], replayed[name]), name
            assert rel(replayed[name], called[name]) < 1e-2, name


@pytest.mark.gpu
def test_heads_that_the_kernels_do_not_know_are_compiled_on_cuda(tmp_path: Path) -> None:
    of = depth()  # its module is shared: on the CPU again afterwards
    of.load().cpu()
    path = tmp_path / "net.pt2"
    with pytest.raises(ReconError, match=r"heads of 16 channels"):
        engine(device="cuda").build(Build(of, None, lambda: Recipe(rest="bf16")), path)
    facts = engine(device="cuda", kernels="auto").build(Build(of, None, lambda: Recipe(rest="bf16")), path)
    assert "heads of 16 channels" in facts["effective"]["kernels"]["reason"]


def test_a_skeleton_lies_on_one_device_whatever_torch_knows_of_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.device("meta") must not be needed for what is made beside a tensor that has a device."""
    from torch.utils import _device

    known = _device._device_constructors() - {torch.linspace}
    monkeypatch.setattr(_device, "_device_constructors", lambda: known)
    fast = vggt().load().to_inference(torch.bfloat16, compile=False)  # type: ignore[operator]
    rebuilt = rebuild(fast.family, fast.settings(), fast.tensors())
    assert rebuilt.tensors().keys() == fast.tensors().keys()


def test_a_folder_that_is_loaded_first_leaves_torchs_factories_whole() -> None:
    """transformers replaces torch.linspace while it loads; torch remembers what it finds when it first looks."""
    from torch.utils import _device

    _device._device_constructors.cache_clear()
    try:
        option("depth", "da-mini").network().load()  # type: ignore[attr-defined]
        with torch.device("meta"):
            assert torch.linspace(0, 1, 3).is_meta
    finally:
        _device._device_constructors.cache_clear()
