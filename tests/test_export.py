"""Export: what is written, what is checked, and what is refused."""

import logging
import sys
from pathlib import Path

import onnx
import onnxsim
import pytest
import torch
from small_network import images, network, seeded
from torch import nn

from recon.compare import compare
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.torch import Torch, TorchSession
from recon.errors import ReconError
from recon.export import ExportOptions, export


def test_the_file_computes_what_the_module_does_and_says_what_is_in_it(tmp_path: Path) -> None:
    facts = export(network(), tmp_path / "small.onnx", ExportOptions())
    assert facts["opset"] == 20
    assert facts["ir_version"] == 10
    assert facts["simplified"] is True
    assert facts["ops"]["Conv"] == 2
    assert facts["ops"]["MatMul"] == facts["ops_before"]["MatMul"] == 4, "Linear layers stay MatMul and Add"
    assert facts["nodes"] == sum(facts["ops"].values())
    assert facts["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0 < max(error["rel_l2"] for error in facts["error_against_torch_fp32"].values()) < 1e-5


def test_nodes_keep_their_module_path_and_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    export(network(), tmp_path / "small.onnx", ExportOptions())
    nodes = onnx.load(str(tmp_path / "small.onnx"), load_external_data=False).graph.node
    scopes = [entry.value for node in nodes for entry in node.metadata_props if entry.key.endswith("name_scopes")]
    assert any("'qkv'" in scope for scope in scopes)
    assert str(Path(__file__).parent).encode() not in (tmp_path / "small.onnx").read_bytes()


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        export(network(), tmp_path / folder / "small.onnx", ExportOptions())
    for name in ("small.onnx", "small.onnx.data"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_pair_of_files_may_be_moved(tmp_path: Path) -> None:
    made, final = tmp_path / "made", tmp_path / "final"
    made.mkdir()
    export(network(), made / "small.onnx", ExportOptions())
    made.rename(final)
    with OnnxRuntime(name="onnxruntime").open(final / "small.onnx", "basic") as session:
        assert compare(Torch(name="torch").session(network(), None), session, [images(5)])["tokens"].passes(1e-5)


def test_a_failing_simplifier_leaves_the_plain_graph_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr(onnxsim, "simplify", fails)
    with caplog.at_level(logging.WARNING):
        facts = export(network(), tmp_path / "small.onnx", ExportOptions())
    assert facts["simplified"] is False
    assert "exceeds maximum protobuf size" in facts["not_simplified_because"]
    assert facts["ops"] == facts["ops_before"]
    assert "small.onnx is not simplified" in caplog.text
    with OnnxRuntime(name="onnxruntime").open(tmp_path / "small.onnx", "none") as session:
        assert compare(TorchSession(network(), seeded()), session, [images(5)])["tokens"].passes(1e-5)


def test_without_the_simplifier_the_plain_graph_is_written_and_the_reason_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)  # to Python, a package that is not there
    facts = export(network(), tmp_path / "small.onnx", ExportOptions())
    assert facts["not_simplified_because"] == "the package onnxsim is not installed"
    assert facts["ops"] == facts["ops_before"]


def test_a_simplifier_that_changes_results_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = onnxsim.simplify

    def wrong(model: onnx.ModelProto, **settings: object) -> tuple[onnx.ModelProto, bool]:
        simplified, agreed = honest(model, **settings)
        for node in simplified.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Sigmoid"
        return simplified, agreed

    monkeypatch.setattr(onnxsim, "simplify", wrong)
    facts = export(network(), tmp_path / "small.onnx", ExportOptions())
    assert "differs from torch" in facts["not_simplified_because"]
    assert facts["ops"]["Relu"] == 1


def test_not_simplifying_is_a_choice_that_is_recorded(tmp_path: Path) -> None:
    facts = export(network(), tmp_path / "small.onnx", ExportOptions(simplify=False))
    assert facts["not_simplified_because"] == "export.simplify=false"


class NoOnnxForm(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.special.bessel_j0(images),)


class DataDependent(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images[..., : int(images.sum())],)


class AlwaysTracedWrong(nn.Module):
    """Adds a random number in eager mode; the exporter freezes nothing, so the two can never agree."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images + torch.rand_like(images),)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoOnnxForm, "bessel_j0"),
        (DataDependent, "shapes that are fixed|cannot be exported"),
        (AlwaysTracedWrong, "tolerance"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, module: type[nn.Module], message: str) -> None:
    with pytest.raises(ReconError, match=message) as caught:
        export(network(lambda: module().eval(), ("out",)), tmp_path / "small.onnx", ExportOptions())
    assert caught.value.remedy


@pytest.mark.parametrize("options", [ExportOptions(opset=16), ExportOptions(opset=24), ExportOptions(tolerance=0.0)])
def test_impossible_options_are_refused_before_the_network_is_loaded(options: ExportOptions, tmp_path: Path) -> None:
    def never() -> nn.Module:
        raise AssertionError("loaded")

    with pytest.raises(ReconError, match=r"export\."):
        export(network(never), tmp_path / "small.onnx", options)


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets(tmp_path: Path, opset: int) -> None:
    facts = export(network(), tmp_path / "small.onnx", ExportOptions(opset=opset))
    assert facts["opset"] == opset
    assert facts["ir_version"] == (11 if opset == 23 else 10)
    assert ("Attention" in facts["ops"]) == (opset == 23)
