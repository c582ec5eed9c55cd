"""Packages of recon's kernels as files: other machines, other versions, damage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_networks import depth, engine, made, recipe
from safetensors.torch import load_file, save_file

from recon.engines.aoti import form
from recon.engines.aoti.package import read
from recon.errors import ReconError
from recon.kernels.form import FastNetwork, rebuild


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = depth()
    return made(of, recipe(of, "bf16"), tmp_path_factory.mktemp("form"))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.0"}, r"compiled for PyTorch 1\.0"),
        ({"device": "cuda"}, "compiled for cuda, not cpu"),
        ({"hardware": "NVIDIA A100 (sm80)"}, "compiled for NVIDIA A100"),
    ],
)
def test_packages_of_other_machines_are_refused(
    package: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    text = json.loads(read(package)[0].to_json()) | change
    save_file(load_file(package), other := tmp_path / "other.pt2", metadata={"recon": json.dumps(text)})
    with pytest.raises(ReconError, match=message):
        engine().load(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "form.0"}, r"version form\.0"),
        ({"family": "os"}, "family 'os'"),
        ({"settings": {}}, "cannot be rebuilt"),
        ({"settings": {"config": 7, "size": [1], "dtype": "bfloat16", "fp8": []}}, "cannot be rebuilt"),
    ],
)
def test_packages_that_say_other_things_are_refused(
    package: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    text = json.loads(read(package)[0].to_json())
    text["form"] |= change
    save_file(load_file(package), other := tmp_path / "other.pt2", metadata={"recon": json.dumps(text)})
    with pytest.raises(ReconError, match=message):
        engine().load(other)


@pytest.mark.parametrize("damage", ["truncated", "header", "junk"])
def test_damaged_packages_are_named(package: Path, tmp_path: Path, damage: str) -> None:
    whole, bad = package.read_bytes(), tmp_path / "bad.pt2"
    bad.write_bytes({"truncated": whole[:-9], "header": b"\xff" * 8 + whole[8:], "junk": b"\x07junk" * 99}[damage])
    for act in (engine(allow_foreign=True).load, engine().inspect):
        with pytest.raises(ReconError, match=r"bad\.pt2"):
            act(bad)


def test_missing_and_left_over_tensors_are_refused(package: Path) -> None:
    identity, tensors = read(package)[0], load_file(package)
    family, settings = identity.form["family"], identity.form["settings"]
    assert isinstance(rebuild(family, settings, tensors), FastNetwork)
    with pytest.raises(ReconError, match=r"1 tensors are missing or left over, lead"):
        rebuild(family, settings, {name: value for name, value in tensors.items() if name != "lead"})
    with pytest.raises(ReconError, match="extra"):
        rebuild(family, settings, tensors | {"extra": torch.zeros(1)})


def test_the_versions_agree_and_the_file_holds_no_code(package: Path) -> None:
    assert read(package)[0].form["tools"] == form.tools()
    assert (
        int.from_bytes(package.read_bytes()[:8], "little") < package.stat().st_size
    )  # safetensors: a length, JSON, data
    assert json.loads(package.read_bytes()[8 : 8 + int.from_bytes(package.read_bytes()[:8], "little")])
