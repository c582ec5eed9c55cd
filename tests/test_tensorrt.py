"""TensorRT without a TensorRT library: options, profiles, targets, what is checked before a plan is opened."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recon.artifact import obtain
from recon.config import option
from recon.engines.tensorrt import TensorRT
from recon.engines.trt import failures, layers, library, plan, profiles, targets
from recon.engines.trt.library import Library
from recon.engines.trt.messages import Heard
from recon.errors import Damaged, ReconError, Refused
from recon.formats import LayerFormat
from recon.precision import CALIBRATED

RANGE = {"min": [1, 3, 56, 56], "opt": [2, 3, 56, 56], "max": [4, 3, 112, 56]}


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """The RTX option on a machine that has the library, whether or not this one does."""
    monkeypatch.setattr("recon.engines.tensorrt.library", lambda flavour: Library(flavour, object(), "1.7.1.116"))
    return TensorRT(name="tensorrt-rtx", flavour="tensorrt_rtx")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"flavour": "trt"}, "no such flavour"),
        ({"workspace_mib": -1}, "workspace_mib=-1"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"compute_capability": ["sm90"]}, "sm90 is none of TensorRT for RTX's GPUs"),
        ({"compute_capability": ["sm86", "sm86"]}, "one named twice"),
        ({"version_compatible": True}, "not for tensorrt_rtx"),
        ({"flavour": "tensorrt", "compute_capability": ["sm86"]}, "builds for the GPU it runs on"),
        ({"flavour": "tensorrt", "hardware_compatible": "hopper"}, "no such level"),
        ({"weight_budget_mib": 100}, "only with weight_streaming"),
        ({"profiles": [{}]}, "profiles[0] is empty"),
        ({"profiles": [{"images": {"min": [1], "max": [2]}}]}, "has ['max', 'min']"),
        ({"profiles": [{"images": {"min": [1], "opt": [3], "max": [2]}}]}, "axis 0 has min 1, opt 3, max 2"),
        ({"profiles": [{"images": {"min": [1], "opt": [1, 2], "max": [2]}}]}, "1, 2 and 1 sizes"),
    ],
)
def test_impossible_options_are_refused(knobs: dict[str, Any], words: str, rtx: TensorRT) -> None:
    with pytest.raises(ReconError, match=r"engine\.") as caught:
        replace(rtx, **knobs).check()
    assert words in str(caught.value)
    rtx.check()


def test_profiles_are_held_against_the_graph() -> None:
    graph = {"images": (-1, 3, -1, 56), "scale": (1,)}
    profiles.fit([{"images": RANGE}], graph)
    profiles.fit([], {"images": (1, 3, 56, 56)})
    wrong: list[tuple[list[Any], str]] = [
        ([], "dynamic sizes (-1) and engine.profiles is empty"),
        ([{"image": RANGE}], "has no such input"),
        ([{"scale": {"min": [1], "opt": [1], "max": [1]}}], "lacks the dynamic inputs ['images']"),
        ([{"images": {**RANGE, "max": [4, 3, 112, 70]}}], "max=[4, 3, 112, 70]: the graph's input is [-1, 3, -1, 56]"),
        ([{"images": {point: sizes[:3] for point, sizes in RANGE.items()}}], "the graph's input is"),
    ]
    for given, words in wrong:
        with pytest.raises(ReconError) as caught:
            profiles.fit(given, graph)
        assert words in str(caught.value)


def test_the_profile_that_holds_a_shape_is_found() -> None:
    second = {"min": [5, 3, 56, 56], "opt": [8, 3, 56, 56], "max": [8, 3, 112, 56]}
    both = [{"images": RANGE}, {"images": second}]
    found = [profiles.matching(both, {"images": (count, 3, 112, 56)}) for count in (1, 4, 5, 8, 9)]
    assert found == [0, 0, 1, 1, None]
    assert profiles.matching(both, {"images": (1, 3, 112)}) is None


@pytest.mark.parametrize(
    ("formats", "rest", "able"),
    [
        ([], "fp16", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([], "fp32", ["sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([], "bf16", ["sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([CALIBRATED["int8"]], "fp16", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([CALIBRATED["fp8"]], "fp16", ["sm89", "sm120", "sm121"]),
        ([LayerFormat("nf4", block=64)], "fp16", ["sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([LayerFormat("nf4", block=64, exact=False)], "fp16", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]),
        ([LayerFormat("nvfp4", "nvfp4-dynamic", 16), CALIBRATED["int8"]], "fp16", ["sm120", "sm121"]),
    ],
)
def test_formats_decide_the_gpus(formats: list[LayerFormat], rest: Any, able: list[str], rtx: TensorRT) -> None:
    assert targets.able(targets.needs(formats, rest, portable=True)) == able
    assert rtx.refuses(formats, rest) == ""
    for target in targets.RTX_TARGETS:
        assert (replace(rtx, compute_capability=[target]).refuses(formats, rest) == "") == (target in able)


def test_a_refusal_names_tensorrts_reason(rtx: TensorRT) -> None:
    said = replace(rtx, compute_capability=["sm89", "sm86"]).refuses([CALIBRATED["fp8"]], "fp16")
    assert "fp8 needs sm89 or newer, sm86 is older" in said
    assert "the model contains HW-specific datatypes: fp8_e4m3" in said


def test_classic_tensorrt_says_what_is_missing(rtx: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    classic = replace(rtx, flavour="tensorrt")
    monkeypatch.setattr("recon.engines.tensorrt.library", lambda flavour: Library(flavour, object(), "10.16.1"))
    assert "only runs plans" in classic.refuses([], "fp16")
    builds = type("Module", (), {"Builder": object})
    monkeypatch.setattr("recon.engines.tensorrt.library", lambda flavour: Library(flavour, builds, "10.16.1"))
    monkeypatch.setattr(targets, "here", lambda: "")
    assert "on an NVIDIA GPU" in classic.refuses([], "fp16")
    monkeypatch.setattr(targets, "here", lambda: "sm90")
    assert classic.refuses([CALIBRATED["fp8"]], "bf16") == ""
    assert "nvfp4 needs sm100" in classic.refuses([LayerFormat("nvfp4", block=16)], "fp16")
    assert "11.0 has" in classic.refuses([LayerFormat("nvfp4", "nvfp4-dynamic", 16)], "fp16")


def test_an_absent_or_old_library_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_imported", lambda flavour: ImportError("No module named 'tensorrt'"))
    with pytest.raises(Refused, match=r"cannot import tensorrt: .*\n  remedy: pip install tensorrt"):
        library.library("tensorrt")
    monkeypatch.setattr(library, "_imported", lambda flavour: Library(flavour, object(), "8.6.1"))
    with pytest.raises(Refused, match=r"8\.6\.1 is older than 10\.10"):
        library.library("tensorrt_lean")


FACTS: dict[str, Any] = {"flavour": "tensorrt", "version": "10.16.1.11", "targets": ["sm90"], "gpu": "NVIDIA H200"}
COMPATIBLE = {"version_compatible": True, "host_code": True}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ""),
        ({"flavour": "tensorrt_rtx"}, "cannot read its format"),
        ({"version": "10.15.0.0"}, "plans belong to one version"),
        ({"version": "8.6.0", **COMPATIBLE}, ""),
        ({"version": "11.1.0", **COMPATIBLE}, "newer than tensorrt 10.16.1.11"),
        ({"targets": ["sm86"], "gpu": "NVIDIA A10"}, "built for sm86 (NVIDIA A10); this GPU, NVIDIA H200, is sm90"),
        ({"gpu": "NVIDIA H100"}, "tuned for it alone"),
        ({"gpu": "NVIDIA H100", "hardware_compatible": "same_compute_capability"}, ""),
        ({"targets": ["sm80"], "gpu": "NVIDIA A100", "hardware_compatible": "ampere_plus"}, ""),
        ({"host_code": True}, "engine.allow_host_code=true"),
    ],
)
def test_a_plan_has_to_belong_to_this_machine(changed: dict[str, Any], words: str) -> None:
    facts = plan.PlanFacts.of(FACTS | changed)
    arguments = (Path("a.engine"), facts, Library("tensorrt", object(), "10.16.1.11"), "sm90", "NVIDIA H200")
    allowed = changed.get("version") is not None
    if not words:
        plan.belongs(*arguments, allowed)
        return
    with pytest.raises(ReconError) as caught:
        plan.belongs(*arguments, allowed)
    assert words in str(caught.value)


def test_a_lean_runtime_wants_compatible_plans() -> None:
    runtime = Library("tensorrt_lean", object(), "10.16.1.11")
    with pytest.raises(ReconError, match=r"without engine\.version_compatible"):
        plan.belongs(Path("a"), plan.PlanFacts.of(FACTS), runtime, "sm90", "NVIDIA H200", True)


def test_a_plan_is_read_only_with_its_manifest_and_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    with pytest.raises(ReconError, match="no such file"):
        plan.vetted(path)
    path.write_bytes(b"plan")
    with pytest.raises(ReconError, match="no manifest"):
        plan.vetted(path)

    def make(folder: Path) -> dict[str, Any]:
        (folder / path.name).write_bytes(b"the plan")
        return {"plan": FACTS | {"profiles": [{"images": RANGE}]}}

    obtain(path, "engine", "key", make)
    facts, data = plan.vetted(path)
    assert (facts.version, facts.targets, facts.profiles, data) == (
        "10.16.1.11", ("sm90",), ({"images": RANGE},), b"the plan",
    )  # fmt: skip
    path.write_bytes(b"the pla")
    with pytest.raises(Damaged, match="does not match its manifest"):
        plan.vetted(path)
    obtain(path, "onnx", "other", make)
    with pytest.raises(ReconError, match="not that of a TensorRT plan"):
        plan.vetted(path)


def situation(**other: Any) -> failures.Situation:
    values = {"name": "a.onnx", "version": "10.16", "log": Path("a.log"), "workspace_mib": 64, "weights_mib": 100.0}
    return failures.Situation(**(values | {"peak_mib": 900.0, "free_mib": (2000.0, 512.0)} | other))


@pytest.mark.parametrize(
    ("said", "words"),
    [  # the messages are TensorRT's own, of 10.x (memory) and RTX 1.7 (the others)
        (
            "Requested amount of GPU memory (1073741824 bytes) could not be allocated. There may not be enough free memory",
            ["asked for 1024 MiB", "900 MiB that this process", "512 MiB of GPU memory", "fewer views"],
        ),
        (
            "Tactic Device request: 2048MB Available: 512MB. Device memory is insufficient to use tactic.",
            ["asked for 2048 MiB", "2000 MiB of host memory"],
        ),
        ("Unexpected exception std::bad_alloc", ["more than the 900 MiB", "100 MiB of weights"]),
        ("no tactics to implement the operation within workspace limit", ["workspace_mib=64 is too little"]),
        ("because the model contains HW-specific datatypes: fp8_e4m3.", ["GPUs that lack fp8_e4m3"]),
        ("FP32 GEMM is not supported.", ["precision=fp16"]),
        ("something new", ["something new", "a.log"]),
    ],
)
def test_failures_say_what_was_needed_and_what_to_change(said: str, words: list[str]) -> None:
    error = str(failures.explained(Heard(errors=[said]), situation()))
    assert all(word in error for word in words), error
    assert "a.log" in error


def test_the_inspectors_json_is_read_in_both_spellings() -> None:
    old = {"Name": "blocks.0.qkv|MatMul|3", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm_i8", "Metadata": "",
           "Inputs": [{"Name": "x", "Dimensions": [65, 32], "Format/Datatype": "Row major Int8 format"}],
           "Outputs": [{"Name": "y", "Dimensions": [65, 96], "Format/Datatype": "Row major linear FP16 format"}],
           "Weights": {"Type": "Int8", "Count": 3072}}  # fmt: skip
    new = {"Name": "fused", "LayerType": "gemm", "Metadata": "\x1e[ONNX Layer: blocks.0.qkv|MatMul|3]",
           "Inputs": [{"Name": "x", "Dimensions": [65, 32], "Format": "Linear", "Datatype": "Int8"}],
           "Constants": [{"Name": "w", "Dimensions": [32, 96], "Format": "Linear", "Datatype": "Int8"}],
           "Outputs": [{"Name": "y", "Dimensions": [65, 96], "Format": "Linear", "Datatype": "Half"}]}  # fmt: skip
    for layer in (old, new):
        (found,) = layers.from_inspector(json.dumps({"Layers": [layer], "Bindings": []}))
        assert (found.compute, found.weight, found.modules) == ("int8", "int8", ("blocks.0.qkv",))
        assert found.outputs == ("fp16",)
    (bare,) = layers.from_inspector(json.dumps({"Layers": ["blocks.0.qkv|MatMul|3"]}))
    assert bare.compute == ""


def test_both_options_have_a_yaml() -> None:
    assert option("engine", "tensorrt").settings()["flavour"] == "tensorrt"
    rtx = option("engine", "tensorrt-rtx")
    assert isinstance(rtx, TensorRT)
    assert (rtx.flavour, rtx.suffix) == ("tensorrt_rtx", ".rtx.engine")
