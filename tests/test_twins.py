"""Both seeded twins through export, build and comparison: the whole way from torch to a running engine."""

from pathlib import Path

import pytest

from recon.compare import compare
from recon.config import option
from recon.depth import Depth
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.torch import Torch
from recon.export import ExportOptions, export
from recon.models import Model
from recon.network import Network

TOLERANCE = 1e-5  # relative L2, FP32 against FP32; measured: below 1e-6 on every output of both


def _twin(name: str) -> Network:
    found = option("model" if name == "vggt-twin" else "depth", name)
    if isinstance(found, Model):
        network = found.network(3)
    else:
        assert isinstance(found, Depth)
        network = found.network()
    assert network is not None
    return network


@pytest.mark.parametrize("name", ["vggt-twin", "da2-twin"])
def test_a_twin_becomes_an_engine_with_the_numbers_of_torch(name: str, tmp_path: Path) -> None:
    network = _twin(name)
    facts = export(network, tmp_path / "twin.onnx", ExportOptions(tolerance=TOLERANCE))
    assert facts["simplified"], facts["not_simplified_because"]
    assert facts["nodes"] <= facts["nodes_before"]
    assert set(facts["error_against_torch_fp32"]) == set(network.outputs)
    engine = OnnxRuntime(name="onnxruntime")
    engine.optimise(tmp_path / "twin.onnx", tmp_path / "twin.engine")
    with engine.load(tmp_path / "twin.engine") as session:
        assert session.inputs == network.inputs
        errors = compare(
            Torch(name="torch").session(network, None), session, [network.example(seed) for seed in (7, 8)]
        )
    assert all(error.passes(TOLERANCE) for error in errors.values()), errors
