"""Both seeded twins through export, build and comparison: the whole way from torch to a running engine."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from recon.benchmark.contract import BenchmarkOptions
from recon.benchmark.stage import benchmark_engines
from recon.compare import compare
from recon.config import Config, option
from recon.depth import Depth
from recon.engines.onnxruntime import OnnxRuntime
from recon.engines.torch import Torch
from recon.export import ExportOptions, export
from recon.models import Model
from recon.network import Network
from recon.store import Store, built

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration and its built depth engine."""
    from test_pipeline import config

    settings = config(tmp_path_factory.mktemp("modes"), ["benchmark"])
    settings.accuracy.examples, settings.accuracy.batches = True, 1
    store = Store(settings)
    return settings, built(store, store.networks()["depth"]).path


@pytest.mark.parametrize(
    ("options", "names", "samples"),
    [
        ({"engine": "FILE", "streams": 2}, ["FILE", "FILE#0", "FILE#1"], [6, 6, 6]),
        ({"co_run": ["FILE", "FILE"], "every": [1, 3]}, ["FILE", "FILE#1"], [6, 2]),
        ({"engine": "FILE", "input": "source"}, ["FILE"], [6]),
        ({"streams": 2}, ["NETWORK", "NETWORK#0", "NETWORK#1"], [6, 6, 6]),
    ],
)
def test_benchmark_modes_time_what_they_say(
    made: tuple[Config, Path],
    options: dict[str, object],
    names: list[str],
    samples: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings, file = made
    filled = {
        key: str(file) if value == "FILE" else [str(file)] * 2 if key == "co_run" else value
        for key, value in options.items()
    }
    timing = BenchmarkOptions(iterations=6, warmup=1, **filled)  # type: ignore[arg-type]
    timing.check()
    store = Store(replace(settings, benchmark=timing))
    before = _rows(store.root / "benchmarks.csv")
    found = benchmark_engines(store)
    network = Store(settings).networks()["depth"].name
    assert list(found) == [name.replace("FILE", file.name).replace("NETWORK", network) for name in names]
    assert [len(result.latency_samples_ms) for result in found.values()] == samples
    together = [result for result in found.values() if result.company > 1]
    assert len(together) == (2 if "streams" in options or "co_run" in options else 0)
    if "co_run" in options or any(result.combined_per_s is not None for result in together):
        assert all(result.combined_per_s and result.combined_per_s > 0 for result in together)
    elif (
        together
    ):  # on a busy machine so few inferences of so small a network may all be over before the other stream begins
        assert "no combined throughput" in caplog.text
    kinds = {result.input for result in found.values()}
    assert kinds == {"source=synthetic" if "input" in options else "random" if len(filled) > 1 else "example"}
    assert len(_rows(store.root / "benchmarks.csv")) == len(before) + len(found)


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with table.open() as file:
        return list(csv.DictReader(file))
