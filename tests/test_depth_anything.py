"""Depth Anything V2 through transformers: its image processing, its static form, and the option around it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DepthAnythingForDepthEstimation, DPTImageProcessor

from recon.config import option
from recon.depth.depth_anything import DepthAnything, keep_aspect
from recon.depth.metric_depth_anything import MetricDepthAnything
from recon.depth.nets.depth_anything import ARCHITECTURES, _seeded, configuration
from recon.depth.nets.images import preprocess, restore
from recon.engines.torch import Torch
from recon.errors import ReconError
from recon.geometry.preprocess import example_images
from recon.geometry.views import View

GREY_LEVEL = 1 / 255 / 0.224


def twin(**knobs) -> DepthAnything:
    return DepthAnything(
        **{"name": "da2-twin", "weights": "seeded:0", "architecture": "twin", "input_size": 112} | knobs
    )


def processor() -> DPTImageProcessor:
    """As the published checkpoints configure it (preprocessor_config.json of Depth-Anything-V2-*-hf)."""
    return DPTImageProcessor(
        size={"height": 518, "width": 518}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3, do_pad=False,
        do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip


def batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


# --- image processing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (317, 211), (1280, 720), (480, 640), (518, 518)])
def test_preprocessing_is_the_processor_s(size: tuple[int, int]) -> None:
    image = example_images(1, size, 0)[0]
    wanted = processor()(image, return_tensors="pt")["pixel_values"]
    shape = keep_aspect(*size, 518)
    assert tuple(wanted.shape[-2:]) == shape
    difference = (preprocess(batch(image), shape) - wanted).abs()
    if "torchvision" in type(processor()).__mro__[1].__name__.lower():
        assert difference.max() < 1e-5  # the same kernel
    assert (difference < 1e-3).float().mean() > 0.99
    assert difference.max() < 2.2 * GREY_LEVEL  # Pillow rounds between its two passes


def test_preprocessing_takes_a_batch() -> None:
    images = example_images(3, (90, 60), 1)
    together = preprocess(torch.from_numpy(images).permute(0, 3, 1, 2), (56, 84))
    assert together.shape == (3, 3, 56, 84)
    assert all(torch.equal(together[i], preprocess(batch(images[i]), (56, 84))[0]) for i in range(3))


def test_output_is_restored_as_the_processor_does() -> None:
    from transformers.modeling_outputs import DepthEstimatorOutput

    disparity = torch.from_numpy(np.random.default_rng(0).random((1, 56, 84), np.float32))
    wanted = processor().post_process_depth_estimation(
        DepthEstimatorOutput(predicted_depth=disparity), target_sizes=[(61, 97)]
    )[0]["predicted_depth"]
    assert torch.equal(restore(disparity, (61, 97))[0], wanted)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [[], [150, 100]])
@torch.inference_mode()
def test_static_form_equals_the_library_s(image_size: list[int]) -> None:
    network = twin(image_size=image_size).network()
    pixels = network.example(0)["pixel_values"]
    found = network.load()(pixels)[0]
    wanted = _seeded("twin", 0).eval()(pixel_values=pixels).predicted_depth
    assert found.shape == wanted.shape == (1, *pixels.shape[-2:])
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.std() > 0.1  # the twin answers to its input
    assert not torch.allclose(found, network.load()(network.example(1)["pixel_values"])[0], rtol=0.05)


def test_exported_file_computes_the_same(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    network = twin(image_size=[150, 100]).network()
    module, pixels = network.load(), network.example(0)["pixel_values"]
    program = torch.export.export(module, (pixels,))
    path = tmp_path / "net.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=20, input_names=["pixel_values"], verbose=False).save(path)
    fresh = network.example(7)["pixel_values"]
    with torch.inference_mode():
        wanted = module(fresh)[0].numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": fresh.numpy()})[0]
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    nodes = [node for node in onnx.load(path).graph.node]
    assert not {node.op_type for node in nodes} & {"IsNaN", "Where", "Shape"}  # no mask at attention, nothing dynamic
    modes = {a.s for node in nodes if node.op_type == "Resize" for a in node.attribute if a.name == "mode"}
    assert modes == {b"linear"}  # the position table is a constant


@pytest.mark.parametrize("architecture", ["small", "base", "large"])
def test_architectures_have_the_published_sizes(architecture: str) -> None:
    published = {"small": 24.8e6, "base": 97.5e6, "large": 335.3e6}  # parameters, table in the model's README
    with torch.device("meta"):
        model = DepthAnythingForDepthEstimation(configuration(architecture))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published[architecture], rel=2e-3)


# --- the option ------------------------------------------------------------------------------------------------------


def test_an_image_of_odd_size_end_to_end(caplog: pytest.LogCaptureFixture) -> None:
    view = View("cam_0", 0, example_images(1, (157, 101), 2)[0])
    option = twin()
    with Torch(name="torch").session(option.network(), None) as session, caplog.at_level(logging.WARNING):
        found = option.predict(view, session)
        again = option.predict(view, session)
    assert found.shape == (101, 157)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.std() > 0.1
    assert np.array_equal(found, again)
    assert caplog.text.count("stretched to the network's 112x112; depth.image_size=[157,101]") == 1


def test_keeping_the_aspect_needs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    option = twin(image_size=[163, 109])
    assert option.size() == (112, 168)
    with Torch(name="torch").session(option.network(), None) as session, caplog.at_level(logging.WARNING):
        found = option.predict(View("cam_0", 0, example_images(1, (163, 109), 2)[0]), session)
    assert found.shape == (109, 163)
    assert not caplog.text


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([(160, 120)], (112, 154)),
        ([(640, 480), (1280, 720), (1920, 1080)], (112, 196)),  # the commonest shape, whatever the resolution
        ([(640, 480), (1280, 720)], (112, 154)),  # of equally many, the first
        ([(480, 640), (480, 640)], (154, 112)),
        ([], (112, 112)),
    ],
)
def test_the_input_takes_its_shape_from_the_images(sizes: list[tuple[int, int]], wanted: tuple[int, int]) -> None:
    known = {f"cam{number}": size for number, size in enumerate(sizes)}
    fitted = twin().for_images(known)
    assert fitted.size() == wanted
    assert fitted.network().inputs["pixel_values"].shape == (1, 3, *wanted)
    assert fitted.feeds([View("a", 0, example_images(1, (40, 30), 0)[0])])["pixel_values"].shape == (1, 3, *wanted)
    assert not fitted.wants_image_sizes or not sizes


def test_a_shape_that_was_asked_for_stays() -> None:
    square = twin(image_size=[1, 1])
    assert (square.wants_image_sizes, square.for_images({"a": (640, 480)}).size()) == (False, (112, 112))
    trained = option("depth", "da-mini")
    assert isinstance(trained, DepthAnything)
    assert not trained.wants_image_sizes
    assert trained.for_images({"a": (1280, 720)}).size() == (168, 224)  # the shape that its weights were trained at


@pytest.mark.parametrize("name", ["da2-small", "da2-base", "da2-large", "da2-metric-indoor", "da2-metric-outdoor"])
def test_every_published_network_follows_the_source(name: str) -> None:
    published = option("depth", name)
    assert isinstance(published, DepthAnything)
    assert published.wants_image_sizes
    assert published.for_images({"a": (1280, 720)}).size() == (518, 924)  # as the model's own processor


def test_the_network_describes_itself() -> None:
    network = twin().network()
    assert network.name == "da2-twin-1x3x112x112"
    assert network.outputs == ("disparity",)
    assert network.inputs["pixel_values"].shape == (1, 3, 112, 112)
    assert network.weights_key == "seeded:0:twin"
    json.dumps(network.settings)
    assert twin(input_size=0).size() == (518, 518)
    assert keep_aspect(640, 480, 518) == (518, 686)


@torch.inference_mode()
def test_a_local_folder_loads_strictly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = _seeded("twin", 3)
    model.save_pretrained(tmp_path)
    network = twin(weights=str(tmp_path)).network()
    assert network.weights_key.startswith("sha256:")
    pixels = network.example(0)["pixel_values"]
    assert torch.equal(network.load()(pixels)[0], twin(weights="seeded:3").network().load()(pixels)[0])

    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReconError, match="do not fit the network") as caught:
        twin(weights=str(tmp_path)).network().load()
    assert name in caught.value.problem
    save_file(weights | {"surprise": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReconError, match="surprise"):
        twin(weights=str(tmp_path)).network().load()
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ReconError, match="cannot be loaded"):
        twin(weights=str(tmp_path)).network().load()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ReconError, match=r"no config\.json beside model\.safetensors"):
        twin(weights=str(tmp_path)).check()


def test_metric_and_relative_models_are_not_taken_for_each_other(tmp_path: Path) -> None:
    _seeded("twin", 0, metric=True).save_pretrained(tmp_path / "metric")
    _seeded("twin", 0).save_pretrained(tmp_path / "relative")
    with pytest.raises(ReconError, match="predicts metric depth"):
        twin(weights=str(tmp_path / "metric")).network().load()
    with pytest.raises(ReconError, match="predicts relative depth"):
        metric_twin(weights=str(tmp_path / "relative")).network().load()


def metric_twin(**knobs: object) -> MetricDepthAnything:
    return MetricDepthAnything(
        name="metric-twin", architecture="twin", **{"weights": "seeded:0", "input_size": 56, **knobs}
    )


@torch.inference_mode()
def test_a_metric_model_gives_the_library_s_metres(tmp_path: Path) -> None:
    model = _seeded("twin", 4, metric=True).eval()
    model.save_pretrained(tmp_path)
    depth = metric_twin(weights=str(tmp_path))
    assert depth.type == "metric"
    network = depth.network()
    assert network.outputs == ("depth",)
    pixels = network.example(0)["pixel_values"]
    wanted = model(pixel_values=pixels).predicted_depth
    assert torch.allclose(network.load()(pixels)[0], wanted, rtol=1e-5, atol=1e-6)
    assert 0 < float(wanted.min()) <= float(wanted.max()) < 20
    with Torch(name="torch").session(network, None) as session:
        found = depth.predict(View("a", 0, np.zeros((60, 80, 3), np.uint8)), session)
    assert found.shape == (60, 80)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"input_size": 100}, "depth.input_size=100"),
        ({"input_size": -14}, "depth.input_size=-14"),
        ({"architecture": "giant"}, "depth.architecture=giant"),
        ({"image_size": [640]}, "depth.image_size"),
        ({"image_size": [640, 0]}, "depth.image_size"),
        ({"weights": "./nowhere/"}, "no such file or folder"),
        ({"every": 0}, "depth.every=0"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message: str) -> None:
    with pytest.raises(ReconError, match=message):
        twin(**knobs).check()


def test_every_architecture_is_known() -> None:
    from recon.depth.depth_anything import PARAMETERS, WIDTHS

    assert ARCHITECTURES.keys() == PARAMETERS.keys() == WIDTHS.keys()


def test_images_are_processed_without_the_library_that_builds_networks() -> None:
    """Importing it takes two seconds, which a run with cached engines would wait for before its first frame."""
    script = (
        "import sys; from recon.depth.depth_anything import _example; "
        "assert _example(1, (28, 42), 0)['pixel_values'].shape == (1, 3, 28, 42); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
