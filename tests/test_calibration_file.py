"""calibration.json is read back for the same network, lens, size and map, and refused for any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recon.errors import ReconError
from recon.live.align import Align
from recon.live.calibration_file import Provenance, read_calibration, require_size, write_calibration

K = {"left": np.array([[80.0, 0, 47.5], [0, 80.0, 35.5], [0, 0, 1]]), "right": np.eye(3)}
FOUND_FOR = Provenance({"name": "da-mini", "input_size": 168}, "disparity", "arbitrary", "key of the map")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    aligners = {name: Align().aligner(name, "disparity", False, {"s": 0.5, "t": 0.1}) for name in K}
    states = {name: aligner.state() for name, aligner in aligners.items()}
    write_calibration(tmp_path / "calibration.json", FOUND_FOR, states, dict.fromkeys(K, (96, 72)), K)
    return tmp_path / "calibration.json"


def test_a_pair_comes_back_as_it_was_and_starts_the_aligner(file: Path) -> None:
    found = read_calibration(file, FOUND_FOR, ["right", "left"], K)
    for camera in K:
        aligner = Align().aligner(camera, "disparity", False, found[camera])
        assert (aligner.s, aligner.t) == (0.5, 0.1)
        depth = aligner.to_depth(np.full((2, 2), 0.8, np.float32))
        np.testing.assert_allclose(depth, 1 / (0.5 * 0.8 + 0.1), rtol=1e-6)
    require_size(str(file), "left", found["left"], (96, 72))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(FOUND_FOR, depth={"name": "da-mini", "input_size": 224}), "depth.input_size"),
        (replace(FOUND_FOR, depth_type="metric"), "depth_type"),
        (replace(FOUND_FOR, unit="m"), "unit"),
        (replace(FOUND_FOR, map_key="another map"), "arbitrary"),
    ],
)
def test_what_it_was_not_found_for_is_refused(file: Path, other: Provenance, words: str) -> None:
    with pytest.raises(ReconError, match=words):
        read_calibration(file, other, ["left"], K)


def test_a_metric_pair_holds_on_another_metric_map(tmp_path: Path) -> None:
    metric = replace(FOUND_FOR, unit="m")
    state = Align().aligner("left", "disparity", True, {"s": 0.5, "t": 0.1}).state()
    write_calibration(tmp_path / "calibration.json", metric, {"left": state}, {"left": (96, 72)}, K)
    assert (
        read_calibration(tmp_path / "calibration.json", replace(metric, map_key="new"), ["left"], K)["left"]["s"] == 0.5
    )


def test_other_cameras_lenses_and_sizes_are_refused(file: Path) -> None:
    with pytest.raises(ReconError, match="no camera 'top'"):
        read_calibration(file, FOUND_FOR, ["top"], K)
    with pytest.raises(ReconError, match="other intrinsics"):
        read_calibration(file, FOUND_FOR, ["left"], {"left": K["left"] * 1.001})
    entry = read_calibration(file, FOUND_FOR, ["left"], K)["left"]
    with pytest.raises(ReconError, match="96x72, now 192x144"):
        require_size(str(file), "left", entry, (192, 144))


@pytest.mark.parametrize("damage", ["nan", "none", "list", "text", "old", "missing"])
def test_damaged_files_are_refused(file: Path, damage: str) -> None:
    data = json.loads(file.read_text())
    if damage == "nan":
        data["cameras"]["left"]["s"] = float("nan")
    elif damage == "none":
        data["cameras"]["left"] |= {"s": None, "t": None}
    elif damage == "list":
        data = [data]
    elif damage == "old":
        del data["format"]
    file.write_text("{half" if damage == "text" else json.dumps(data))
    if damage == "missing":
        file.unlink()
    with pytest.raises(ReconError) as caught:
        read_calibration(file, FOUND_FOR, ["left"], K)
    assert caught.value.remedy
