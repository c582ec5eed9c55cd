"""depth.batch: frames for calibration and accuracy come in inputs of as many images as the network takes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recon.calibration import CalibrationOptions
from recon.config import option
from recon.errors import ReconError
from recon.frames import require, sample


def settings(batch: int, **source: Any) -> Any:
    scene = replace(option("source", "synthetic"), **{"width": 64, "height": 48, "steps": 3, "moving": 0} | source)
    depth = replace(option("depth", "da2-twin"), batch=batch).for_images(scene.image_sizes())
    return SimpleNamespace(calibration=CalibrationOptions(), source=scene, depth=depth, model=None)


def test_an_input_is_a_batch_of_different_frames() -> None:
    config = settings(3)
    network = config.depth.network()
    shape = network.inputs["pixel_values"].shape
    found = sample(config, network, "depth", 2)
    assert shape[0] == 3
    assert [feeds["pixel_values"].shape for feeds in found.feeds] == [shape, shape]
    assert [len(set(ids)) for ids in found.ids] == [3, 3]
    assert network.name.startswith("da2-twin-3x3x")
    example = network.example(0)["pixel_values"]
    assert example.shape == shape
    assert not torch.equal(example[0], example[1])


def test_the_batch_changes_the_memory_of_images_and_not_of_weights() -> None:
    one, four, seven = (settings(batch).depth.network().memory_mib for batch in (1, 4, 7))
    assert seven - four == pytest.approx(four - one)
    assert four < 4 * one


def test_too_few_frames_for_a_batch_are_refused_with_the_knob_named() -> None:
    config = settings(30, steps=1)
    with pytest.raises(ReconError, match="takes 30 views at once") as refused:
        require(config, config.depth.network(), "depth")
    assert "depth.batch" in refused.value.remedy
