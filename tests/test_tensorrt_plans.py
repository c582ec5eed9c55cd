"""Real plans of TensorRT for RTX, built on the CPU: what is in them, and what is refused. All pairs of both twins are in
test_tensorrt_matrix.py."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import MODES, PRECISIONS, Base, base_of, built, engine, refused_in_words, require_proof, require_tool
from small_network import network as small

from recon.console import Phases
from recon.engines import Build
from recon.errors import ReconError, Refused
from recon.export import ExportOptions, export
from recon.formats import LayerFormat, Recipe

pytestmark = [pytest.mark.trt]
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'recon[trt]'")

PAIRS = [("none", precision) for precision in PRECISIONS] + [(mode, "fp16") for mode in MODES]


@pytest.fixture(scope="module")
def da2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of("da2-twin", tmp_path_factory.mktemp("da2"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP32 graph of a network with one attention block."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export(small(), path, ExportOptions())
    return path


def from_file(onnx: Path, folder: Path, **knobs: Any) -> dict[str, Any]:
    return engine(**knobs).build(Build(small(), onnx, Recipe), folder / "plan.engine")


@pytest.mark.parametrize(("mode", "precision"), PAIRS)
def test_depth_anything_in_every_mode_and_precision(mode: str, precision: str, da2: Base, tmp_path: Path) -> None:
    require_tool(mode)
    require_proof(built(da2, mode, precision, tmp_path), da2.name, mode, precision)


@pytest.mark.parametrize(
    ("mode", "precision", "target"),
    [
        ("none", "fp32", "sm75"),
        ("none", "bf16", "sm75"),
        ("none", "fp8", "sm86"),
        ("bitsandbytes-nf4", "fp16", "sm75"),
        ("modelopt-nvfp4", "fp16", "sm89"),
    ],
)
def test_an_unsupported_pair_is_refused_with_tensorrts_own_reason(
    mode: str, precision: str, target: str, da2: Base, tmp_path: Path
) -> None:
    require_tool(mode)
    refused_in_words(da2, mode, precision, target, tmp_path)


def test_targets_are_those_asked_for_or_those_that_have_the_types(plain: Path, tmp_path: Path) -> None:
    facts = from_file(plain, tmp_path, compute_capability=["sm86", "sm89", "sm120"])
    assert facts["plan"]["targets"] == ["sm86", "sm89", "sm120"]
    assert from_file(plain, tmp_path)["plan"]["targets"] == ["sm80", "sm86", "sm89", "sm120", "sm121"]


def test_the_log_has_everything_and_the_layers_their_modules(plain: Path, tmp_path: Path) -> None:
    facts = from_file(plain, tmp_path)
    text = (tmp_path / facts["log"]).read_text()
    assert "VERBOSE " in text
    assert facts["attention"]["recognised"] == [""] or len(facts["attention"]["recognised"]) == 1
    layers = engine().inspect(tmp_path / "plan.engine").layers
    assert len(layers) == facts["layers"]
    assert {"stem", "patch", "qkv", "out"} <= {module for layer in layers for module in layer.modules}


def test_without_its_log_a_plan_is_unseen_here(plain: Path, tmp_path: Path) -> None:
    facts = from_file(plain, tmp_path)
    (tmp_path / facts["log"]).unlink()
    seen = engine().inspect(tmp_path / "plan.engine")
    assert not seen.layers
    if not torch.cuda.is_available():
        assert "PyTorch sees none here" in seen.unseen


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_plan_cannot_run_without_a_gpu(plain: Path, tmp_path: Path) -> None:
    from_file(plain, tmp_path)
    assert "NVIDIA GPU" in engine().runs_here()
    with pytest.raises(Refused, match="NVIDIA GPU"):
        engine().load(tmp_path / "plan.engine")


def test_workspace_that_is_too_small_is_named(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.engines.trt.builder.MIB", 64)  # an MiB holds all that this network needs
    with pytest.raises(ReconError, match=r"workspace_mib=1 is too little\n  remedy: raise engine\.workspace_mib"):
        from_file(plain, tmp_path, workspace_mib=1)


OUT_OF_MEMORY = """
import resource, sys
import onnx, psutil, torch
from pathlib import Path
from recon.console import Phases
from recon.engines import Build
from recon.engines.tensorrt import TensorRT
from recon.errors import ReconError
engine = TensorRT(name="tensorrt-rtx", flavour="tensorrt_rtx")
engine.check()
limit = psutil.Process().memory_info().vms + 60 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    engine.build(Build(None, Path(sys.argv[1]), None), Path(sys.argv[2]))
except ReconError as error:
    sys.exit(str(error))
"""


def test_out_of_memory_says_how_much_and_what_to_change(plain: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(plain), str(tmp_path / "plan.engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "bad_alloc" in done.stderr or "out of memory" in done.stderr
    assert "it needed more than the" in done.stderr
    assert "use fewer views" in done.stderr


def edited(plain: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    import onnx

    model = onnx.load(str(plain))
    change(model)
    onnx.save(model, str(folder / "edited.onnx"))
    return folder / "edited.onnx"


def test_an_unsupported_operator_is_named_with_its_module(plain: Path, tmp_path: Path) -> None:
    from onnx import helper

    def change(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        odd = helper.make_node("BlackmanWindow", [node.output[0]], ["odd"])
        odd.metadata_props.extend(node.metadata_props)
        entry = next(item for item in odd.metadata_props if item.key.endswith("name_scopes"))
        entry.value = "['', 'stem', 'window']"
        model.graph.node.append(odd)

    with pytest.raises(ReconError, match="operator BlackmanWindow of module stem") as caught:
        from_file(edited(plain, tmp_path, change), tmp_path)
    assert "TensorRT 1." in str(caught.value)


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    for content in (b"", b"\x08\x0a\x12garbage that is no protobuf"):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(ReconError, match=r"broken\.onnx: (is no ONNX file|holds no graph)"):
            from_file(tmp_path / "broken.onnx", tmp_path)
    with pytest.raises(ReconError, match="no such file"):
        from_file(tmp_path / "absent.onnx", tmp_path)


def test_dynamic_sizes_need_a_profile_and_take_several(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    count = torch.export.Dim("count", min=1, max=8)
    program = torch.onnx.export(
        module, (torch.rand(2, 3, 32, 32),), dynamo=True, dynamic_shapes=({0: count},), input_names=["images"], verbose=False
    )  # fmt: skip
    assert program is not None
    onnx = tmp_path / "dynamic.onnx"
    program.save(str(onnx))
    with pytest.raises(ReconError, match=r"images\[-1, 3, 32, 32\] have dynamic sizes"):
        from_file(onnx, tmp_path)
    ranges = [
        {"images": {"min": [low, 3, 32, 32], "opt": [low, 3, 32, 32], "max": [high, 3, 32, 32]}}
        for low, high in ((1, 4), (5, 8))
    ]
    facts = from_file(onnx, tmp_path, profiles=ranges)
    assert facts["plan"]["profiles"] == ranges
    log = (tmp_path / facts["log"]).read_text()
    assert "MinShape: [5,3,32,32]" in log
    with pytest.raises(ReconError, match="the graph's input is"):
        from_file(onnx, tmp_path, profiles=[{"images": {point: [1, 3, 32, 48] for point in ("min", "opt", "max")}}])


def test_attention_of_opset_23_builds_in_fp32(tmp_path: Path) -> None:
    """It has no kernel of its own there, so it has to be taken apart."""
    onnx = tmp_path / "attention.onnx"
    export(small(), onnx, ExportOptions(opset=23))
    facts = from_file(onnx, tmp_path)
    assert facts["attention_nodes"] == 1


def test_streaming_weights_and_true_fp32_are_options(plain: Path, tmp_path: Path) -> None:
    facts = from_file(plain, tmp_path, weight_streaming=True, tf32=False, optimization_level=0)
    assert facts["plan"]["weight_streaming"] is True


def test_weights_in_a_file_of_their_own_are_found(plain: Path, tmp_path: Path) -> None:
    assert plain.with_name("small.onnx.data").is_file()
    other = Path(os.path.relpath(plain))  # relative to where we are, not to the graph
    assert from_file(other, tmp_path)["bytes"] > 100_000


def test_ctrl_c_ends_a_build(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pressed while TensorRT is at work; its own handler is back afterwards."""
    steps = []

    def step(self: Phases, name: str, done: int) -> None:
        steps.append(name)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Phases, "step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            from_file(plain, tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "plan.engine").exists()


def test_errors_are_said_once(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ReconError):
        from_file(plain, tmp_path, compute_capability=["sm75"])
    assert not caplog.records  # what TensorRT said is in the exception


def test_formats_that_a_rest_of_fp16_has_are_in_the_table() -> None:
    assert engine().refuses([LayerFormat("int8", "int8-dynamic")], "fp16") == ""
