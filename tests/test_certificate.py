"""Certificates tell what is there, not what was asked for: every mode is sabotaged, and every sabotage is caught."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_network import images, network, seeded

from recon.artifact import manifest_path
from recon.certificate import Asked, Verdict, certify, certify_module
from recon.certificate.text import lines
from recon.config import Config, option
from recon.engines import Build, Engine, Session
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.torch import Torch
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Inspection, LayerFormat, Ranges, Recipe
from recon.onnxgraph import module_path
from recon.precision import Precision
from recon.quant import QuantMode
from recon.quantise import assign, layer_infos, make_recipe, write
from recon.store import Store, built

PAIRS = [
    ("torch-int8-dynamic", "fp32"),
    ("bitsandbytes-8bit", "fp32"),
    ("bitsandbytes-nf4", "fp32"),
    ("bitsandbytes-fp4", "fp32"),
    ("modelopt-fp8", "fp32"),
    ("modelopt-nvfp4", "fp32"),
    ("none", "int8"),
    ("none", "fp8"),
]
NO_KERNEL = ("modelopt-nvfp4",)  # on ONNX Runtime's CPU provider
WITH_ACTIVATIONS = ("torch-int8-dynamic", "modelopt-fp8", "int8", "fp8")


@dataclass
class Unseen(Engine):
    """An engine whose plan cannot be looked into here, as TensorRT's without a GPU."""

    def build(self, source: Build, out: Path) -> dict[str, Any]:
        raise AssertionError

    def load(self, path: Path) -> Session:
        raise AssertionError

    def inspect(self, path: Path) -> Inspection:
        return Inspection(unseen="there is no GPU")


@dataclass
class Case:
    """A written graph with everything that a certificate is made from."""

    facts: dict[str, Any]
    asked: Asked
    graph: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificates")
    export(network(), path / "base.onnx", ExportOptions())
    return path


@cache
def written(folder: Path, mode_name: str, precision_name: str, exact: bool = True) -> Case:
    mode, precision = option("quant_mode", mode_name), option("precision", precision_name)
    assert isinstance(mode, QuantMode)
    assert isinstance(precision, Precision)
    if mode.tool and not mode.tool_version():
        pytest.skip(f"{mode.tool} is not installed: {mode.install}")
    if hasattr(mode, "exact"):
        mode.exact = exact
    precision.rest = "fp32"
    infos = layer_infos(seeded(), images(0))
    ranges = Ranges(dict.fromkeys(infos, 4.0), {}, "max", "0" * 32, 1, "test")
    graph = folder / f"{mode_name}_{precision_name}_{exact}.onnx"
    facts = write(network(), folder / "base.onnx", make_recipe(network(), mode, precision, ranges), graph)
    formats = {"quant_mode": mode.layer_format(), "precision": precision.layer_format()}
    groups = {by: form for by, form in formats.items() if form is not None}
    return Case(facts, Asked(assign(infos, mode, precision), groups, infos, precision.rest_format), graph)


def certified(case: Case, graph: Path, engine: Engine | None = None) -> dict[str, Any]:
    """The certificate of an engine built from `graph`; the case's facts are the writer's own claim."""
    out = graph.with_suffix(".engine")
    if engine is None:
        engine = OnnxRuntime(name="onnxruntime")
        engine.optimise(graph, out)
    return certify(engine, out, case.facts, {"quant_mode": {"name": "m"}}, case.asked, graph)


def engine_for(mode: str) -> Engine | None:
    return Unseen(name="unseen") if mode in NO_KERNEL else None


@pytest.mark.parametrize(("mode", "precision"), PAIRS)
def test_what_was_asked_for_is_found_in_graph_and_engine(folder: Path, mode: str, precision: str) -> None:
    case = written(folder, mode, precision)
    found = certified(case, case.graph, engine_for(mode))
    assert found["lacking"] == {}
    assert set(found["graph"]["layers"]) == {"qkv", "out"}
    if mode in NO_KERNEL:
        assert (found["verdict"], found["share"]) == ("unverified", 1.0)
        assert "there is no GPU" in found["sentence"]
    elif "fp8" in (mode + precision):  # rounded exactly, stored in 8 bits, multiplied in FP32: there is no FP8 kernel
        assert found["verdict"] == "partial"
        assert set(found["elsewhere"].values()) == {"computed in fp32"}
        assert found["engine"]["stored_as"]["fp8"] == 2
    else:
        assert (found["verdict"], found["share"]) == ("achieved", 1.0), found["sentence"]
    bits = {row["bits_per_weight"] for row in found["graph"]["layers"].values()}
    expected = {"nf4": (4, 7), "fp4": (4, 7)}.get(mode[-3:], (8, 9.1))
    assert all(expected[0] <= value <= expected[1] for value in bits), bits


def test_nothing_quantised_is_achieved_too(folder: Path) -> None:
    case = Case({}, Asked(), folder / "base.onnx")
    found = certified(case, case.graph)
    assert (found["verdict"], found["share"]) == ("achieved", 1.0)
    assert found["graph"]["weight_only"] == found["graph"]["qdq_pairs_on_activations"] == 0


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def drop_activations(case: Case, out: Path, only: str = "") -> Path:
    """Products take the value from before its Q/DQ pair."""
    model = onnx.load(str(case.graph))
    producer = {name: node for node in model.graph.node for name in node.output}

    def before(name: str) -> str:
        while name in producer and ".input." in name:
            name = producer[name].input[0]
        return name

    for node in model.graph.node:
        if node.op_type == "MatMul" and module_path(node) in ([only] if only else case.asked.layers):
            node.input[0] = before(node.input[0])
    return saved(model, out)


def skip_mode(case: Case, out: Path) -> Path:
    """The graph as it was, under the name of the quantised one."""
    return saved(onnx.load(str(case.graph.parent / "base.onnx")), out)


def fold_back(case: Case, out: Path, only: str = "") -> Path:
    """Weights of the network, in FP32, where the quantised ones were; activations as they are."""
    model, layers = onnx.load(str(case.graph)), dict(seeded().named_modules())
    for node in model.graph.node:
        path = module_path(node)
        if node.op_type == "MatMul" and path in ([only] if only else case.asked.layers):
            values = np.ascontiguousarray(layers[path].weight.detach().numpy().T)
            model.graph.initializer.append(numpy_helper.from_array(values, f"{path}.back"))
            node.input[1] = f"{path}.back"
    return saved(model, out)


SABOTAGES: dict[str, Callable[[Case, Path], Path]] = {"skipped": skip_mode, "folded back": fold_back}


@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize(("mode", "precision"), PAIRS)
def test_a_mode_without_effect_is_absent(
    folder: Path, tmp_path: Path, mode: str, precision: str, sabotage: str
) -> None:
    case = written(folder, mode, precision)
    graph = SABOTAGES[sabotage](case, tmp_path / "sabotaged.onnx")
    engine = None if "fp8" not in (mode + precision) else Unseen(name="unseen")  # the graph is enough to tell
    with pytest.raises(ReconError, match="absent") as caught:
        certified(case, graph, engine_for(mode) or engine)
    assert "sabotaged" in caught.value.problem
    assert caught.value.problem.count("\n") == 0


@pytest.mark.parametrize(("mode", "precision"), [pair for pair in PAIRS if set(pair) & set(WITH_ACTIVATIONS)])
def test_dropped_activations_are_absent(folder: Path, tmp_path: Path, mode: str, precision: str) -> None:
    case = written(folder, mode, precision)
    with pytest.raises(ReconError, match="activations not quantised"):
        certified(case, drop_activations(case, tmp_path / "dropped.onnx"))


def test_one_layer_that_is_missing_makes_it_partial_and_is_named(folder: Path, tmp_path: Path) -> None:
    case = written(folder, "none", "int8")
    for sabotage in (drop_activations, fold_back):
        found = certified(case, sabotage(case, tmp_path / f"{sabotage.__name__}.onnx", "out"))
        assert found["verdict"] == "partial"
        assert set(found["lacking"]) == {"out"}
        assert 0 < found["share"] < 1
        assert "not in the graph: out: " in found["sentence"]


@pytest.mark.parametrize("mode", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_folded_codebooks_are_told_by_their_values(folder: Path, tmp_path: Path, mode: str) -> None:
    """Stored dequantised by request: nothing but the rounding says that they are 4-bit weights."""
    case = written(folder, mode, "fp32", exact=False)
    assert certified(case, case.graph)["verdict"] == "achieved"
    with pytest.raises(ReconError, match="without the rounding"):
        certified(case, fold_back(case, tmp_path / "original.onnx"))


def test_a_codebook_of_another_format_is_told(folder: Path) -> None:
    case = written(folder, "bitsandbytes-nf4", "fp32")
    formats = {path: replace(form, weight="fp4") for path, form in case.asked.layers.items()}
    with pytest.raises(ReconError, match="asked for fp4"):
        certified(replace(case, asked=replace(case.asked, layers=formats)), case.graph)


def test_the_writers_claim_is_not_believed(folder: Path, tmp_path: Path) -> None:
    case = written(folder, "bitsandbytes-8bit", "fp32")
    claimed = dict(case.facts["graph"])
    assert claimed["dequantised_weights"] == 2
    with pytest.raises(ReconError, match="absent"):
        certified(case, skip_mode(case, tmp_path / "skipped.onnx"))


def test_a_mode_that_was_given_no_layer_is_absent(folder: Path) -> None:
    form = LayerFormat("int8")
    case = Case({}, Asked({}, {"quant_mode": form}, {}, "fp32"), folder / "base.onnx")
    with pytest.raises(ReconError, match="no layer of the network was given it"):
        certified(case, case.graph)


def test_a_precision_that_the_mode_left_no_layer_to_is_partial_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = written(folder, "torch-int8-dynamic", "fp8")
    found = certified(case, case.graph)
    assert found["share"] == 1.0
    assert found["verdict"] == "partial"
    idle = "fp8 w8a8, which precision asks for, is in no layer: the quant mode takes every one that is not kept, so this is the engine of precision=fp32"
    assert found["without_effect"] == idle
    assert idle in found["sentence"]
    assert idle in caplog.text
    shared = written(folder, "modelopt-nvfp4", "int8")  # takes all layers here; one with odd sizes would be left
    assert "int8 w8a8" in certified(shared, shared.graph, engine_for("modelopt-nvfp4"))["without_effect"]
    for mode, precision in (("torch-int8-dynamic", "fp32"), ("none", "int8")):
        plain = written(folder, mode, precision)
        assert certified(plain, plain.graph)["without_effect"] == ""


def test_a_rest_that_is_not_there_is_absent(folder: Path) -> None:
    case = Case({}, Asked(rest="fp16"), folder / "base.onnx")
    with pytest.raises(ReconError, match="in fp16"):
        certified(case, case.graph)


def test_an_engine_that_undoes_the_graph_is_partial(folder: Path) -> None:
    """ONNX Runtime left alone: it fuses MatMul and Add first, and INT8 layers are then computed in FP32."""
    case = written(folder, "none", "int8")
    out = case.graph.with_suffix(".alone.engine")
    engine = OnnxRuntime(name="onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(case.graph), options, providers=["CPUExecutionProvider"])
    from recon.engines.onnxruntime import _keep_modules

    _keep_modules(case.graph, out)
    found = certify(engine, out, case.facts, {}, case.asked, case.graph)
    assert found["verdict"] == "partial"
    assert "computed in fp32" in found["sentence"]


@dataclass
class FromModule(Unseen):
    """An engine without a graph, which says of itself what it is told to."""

    says: tuple[Any, ...] = ()

    def inspect(self, path: Path) -> Inspection:
        return Inspection(self.says)


def test_an_engine_without_a_graph_is_judged_by_what_it_says(tmp_path: Path) -> None:
    from recon.formats import EngineLayer, LayerInfo

    form = LayerFormat("int8", "int8", by="precision")
    infos = {path: LayerInfo(path, 8, 8, madds) for path, madds in (("a", 300), ("b", 100))}
    asked = Asked(dict.fromkeys(infos, form), {"precision": form}, infos)
    good = EngineLayer("ka", "mm", "int8", "int8", ("a",))
    other = replace(good, compute="fp16", weight="fp16")
    for second, verdict, share in ((replace(good, modules=("b",)), "achieved", 1.0), (other, "partial", 0.75)):
        engine = FromModule(name="module", says=(good, replace(second, modules=("b",))))
        found = certify(engine, tmp_path / "x.pt2", {}, {}, asked)
        assert (found["verdict"], found["share"]) == (verdict, share)
    with pytest.raises(ReconError, match="in none of the engine's layers"):
        certify(FromModule(name="module", says=(other,)), tmp_path / "x.pt2", {}, {}, asked)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    from test_pipeline import config

    found = config(tmp_path_factory.mktemp("store"), ["build"], quant_mode=option("quant_mode", "bitsandbytes-8bit"))
    found.accuracy.examples, found.accuracy.batches = True, 1
    return found


def test_a_sabotaged_writer_fails_the_build_and_nothing_is_kept(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(settings)
    network = store.networks()["depth"]

    def lazy(network: Any, base: Path, recipe: Any, out: Path) -> dict[str, Any]:
        saved(onnx.load(str(base)), out)
        return {"layers": {path: vars(form) for path, form in recipe.layers.items()}, "infos": {}, "rest": "fp32"}

    monkeypatch.setattr("recon.quantise.write", lazy)
    with pytest.raises(ReconError, match="absent"):
        built(store, network)
    assert not store.engine_path(network).exists()
    assert not manifest_path(store.engine_path(network)).exists()
    store.onnx_path(network).unlink()  # what the sabotaged writer left would be reused


def test_certificates_are_printed_for_people(settings: Config) -> None:
    store = Store(settings)
    engine = built(store, store.networks()["depth"])
    assert engine.manifest.effective["verdict"] == "achieved"
    text = "\n".join(lines(engine.path))
    assert "verdict    achieved: 24 layers int8 weight-only" in text
    assert "model.backbone.encoder.layer.0.mlp.fc1: int8 weight, no activation" in text
    assert "accuracy   against FP32 torch: absrel" in text
    command = [sys.executable, "-m", "recon.certificate", str(engine.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict" in done.stdout
    whole = engine.path.read_bytes()
    engine.path.write_bytes(whole[:-1] + b"\0")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    engine.path.write_bytes(whole)
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_has_no_certificate_is_named(settings: Config, tmp_path: Path) -> None:
    store = Store(settings)
    with pytest.raises(ReconError, match="no such file"):
        list(lines(tmp_path / "nowhere.engine"))
    (tmp_path / "bare.engine").write_bytes(b"x")
    with pytest.raises(ReconError, match="no manifest"):
        list(lines(tmp_path / "bare.engine"))
    with pytest.raises(ReconError, match="is a folder") as caught:
        list(lines(tmp_path))
    assert caught.value.remedy.endswith("bare.engine")
    with pytest.raises(ReconError, match="no certificate"):
        list(lines(store.base_path(store.networks()["depth"])))


def test_a_limit_refuses_an_engine_with_its_numbers_even_a_reused_one(settings: Config) -> None:
    limited = replace(settings, accuracy=replace(settings.accuracy, max_rel_l2=1e-7))
    store = Store(limited)
    with pytest.raises(ReconError, match=r"rel_l2_max .* beyond accuracy\.max_rel_l2=1e-07") as caught:
        built(store, store.networks()["depth"])
    assert "absrel" in caught.value.problem
    assert "sensitivity" in caught.value.remedy


def test_the_page_that_says_which_mode_when_knows_every_option_and_no_other() -> None:
    from recon.config import CONF

    page = (Path(__file__).parents[1] / "docs" / "quantisation.md").read_text()
    for group, head in (("quant_mode", "| quant_mode |"), ("precision", "| precision |")):
        rows = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
        named = {row.split("|")[1].strip(" `") for row in rows}
        assert named == {file.stem for file in (CONF / group).glob("*.yaml")}
    verdicts = page[page.index("| verdict |") :].split("\n\n")[0].splitlines()[2:]
    assert {row.split("|")[1].strip(" `") for row in verdicts} == set(get_args(Verdict))


@pytest.mark.parametrize(
    ("mode_name", "precision_name", "compute", "weight"),
    [
        ("torch-int8-dynamic", "fp32", "int8", "int8"),
        ("bitsandbytes-nf4", "bf16", "bf16", "nf4"),
        ("modelopt-fp8", "fp32", "fp8", "fp8"),
        ("none", "int8", "int8", "int8"),
        ("none", "bf16", "bf16", "bf16"),
    ],
)
def test_engine_torch_is_certified_by_what_it_dispatches(
    mode_name: str, precision_name: str, compute: str, weight: str
) -> None:
    mode, precision = option("quant_mode", mode_name), option("precision", precision_name)
    assert isinstance(mode, QuantMode)
    assert isinstance(precision, Precision)
    if mode.tool and not mode.tool_version():
        pytest.skip(f"{mode.tool} is not installed: {mode.install}")
    precision.rest = "fp32"
    infos = layer_infos(seeded(), images(0))
    recipe = make_recipe(network(), mode, precision, Ranges(dict.fromkeys(infos, 4.0), {}, "max", "", 1, "test"))
    found = certify_module(option("engine", "torch"), network(), recipe, {}, asked_of(mode, precision, infos))  # type: ignore[arg-type]
    told = {layer["modules"][0]: (layer["compute"], layer["weight"]) for layer in found["engine"]["layers"]}
    assert found["verdict"] == "achieved", found["sentence"]
    assert told["qkv"] == told["out"] == (compute, weight)
    assert told["stem"] == (precision.rest_format, precision.rest_format)
    assert any("attention" in kernel for kernel in found["engine"]["kernels"])


def test_engine_torch_that_simulates_or_drops_a_mode_is_told() -> None:
    mode, precision = option("quant_mode", "torch-int8-dynamic"), option("precision", "fp32")
    assert isinstance(mode, QuantMode)
    assert isinstance(precision, Precision)
    infos = layer_infos(seeded(), images(0))
    recipe, asked = make_recipe(network(), mode, precision, None), asked_of(mode, precision, infos)
    found = certify_module(Torch(name="torch", simulate=True), network(), recipe, {}, asked)
    assert found["verdict"] == "partial"
    assert found["elsewhere"] == dict.fromkeys(("qkv", "out"), "computed in fp32")
    half = replace(recipe, layers={"qkv": recipe.layers["qkv"]}, weights={"qkv": recipe.weights["qkv"]})
    found = certify_module(Torch(name="torch"), network(), half, {}, asked)
    assert found["verdict"] == "partial"
    assert found["elsewhere"] == {"out": "stored as fp32, computed in fp32"}
    with pytest.raises(ReconError, match=r"int8 w8a8 dynamic \(quant_mode\) is in none of the engine's layers"):
        certify_module(Torch(name="torch"), network(), Recipe(infos=infos), {}, asked)


def asked_of(mode: QuantMode, precision: Precision, infos: dict[str, Any]) -> Asked:
    formats = {"quant_mode": mode.layer_format(), "precision": precision.layer_format()}
    groups = {by: form for by, form in formats.items() if form is not None}
    return Asked(assign(infos, mode, precision), groups, infos, precision.rest_format)
