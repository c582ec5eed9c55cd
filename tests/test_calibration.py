"""Calibration: which frames a network is shown, what is measured on them, and what is refused before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_network import images, network, seeded
from torch import nn

from recon.accuracy import AccuracyOptions, require_frames
from recon.calibration import CalibrationOptions, calibrate, data_key, read_ranges
from recon.config import Config, option
from recon.engines import Session
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.frames import feeds, sample
from recon.graph.read import read_graph
from recon.machine import peak_rss_mib, reset_peak_rss, rss_mib
from recon.network import Network, TensorSpec
from recon.observe import Observer, entropy_range, graph_maxima, layer_inputs, percentile_range
from recon.sources.synthetic import Synthetic

SIDE = 56


def config(**calibration: Any) -> Config:
    found = Config()
    found.model = replace(option("model", "vggt-twin"), height=SIDE, width=SIDE)  # type: ignore[assignment]
    found.depth = replace(option("depth", "da2-twin"), input_size=SIDE)  # type: ignore[assignment]
    found.source = Synthetic(name="synthetic", count=3, steps=8, width=64, height=48)
    found.calibration = CalibrationOptions(**calibration)
    return found


def vggt(views: int = 2) -> Network:
    found = config().model.network(views)
    assert found is not None
    return found


def depth() -> Network:
    found = config().depth.network()
    assert found is not None
    return found


def write_images(folder: Path, count: int, size: tuple[int, int] = (64, 48)) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    stream = np.random.default_rng(count)
    for index in range(count):
        Image.fromarray(stream.integers(0, 255, (*size[::-1], 3), np.uint8)).save(folder / f"f{index}.png")


class Watched(Session):
    """Keeps what it is fed and stops there."""

    def __init__(self, inputs: dict[str, TensorSpec]) -> None:
        self.inputs, self.fed = inputs, {}

    def _run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.fed = feeds
        raise StopIteration

    def memory_mib(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def test_preprocessing_is_that_of_bootstrap_and_predict() -> None:
    settings = config()
    views = settings.source.bootstrap()[:2]
    session = Watched(vggt().inputs)
    with pytest.raises(StopIteration):
        settings.model.bootstrap(views, settings.source.scale(), session)
    assert torch.equal(session.fed["images"], settings.model.feeds(views)["images"])
    session = Watched(depth().inputs)
    with pytest.raises(StopIteration):
        settings.depth.predict(views[1], session)
    assert torch.equal(session.fed["pixel_values"], settings.depth.feeds(views)["pixel_values"][1:])


def test_inputs_are_one_moment_each_and_spread_over_the_recording() -> None:
    found = sample(config(), vggt(3), "model", 3)
    assert [{name.split("/")[0] for name in ids} for ids in found.ids] == [{"cam0", "cam1", "cam2"}] * 3
    steps = [{int(name.split("/")[1]) for name in ids} for ids in found.ids]
    assert all(len(step) == 1 for step in steps), "one moment per input"
    assert max(step.pop() for step in steps) >= 5, "not the first frames alone"
    assert found.feeds[0]["images"].shape == (3, 3, SIDE, SIDE)


def test_fewer_cameras_than_views_are_joined_over_time() -> None:
    found = sample(config(), vggt(5), "model", 2)
    assert [len(ids) for ids in found.ids] == [5, 5]
    assert len({name for ids in found.ids for name in ids}) == 10


def test_more_cameras_than_views_never_mix_moments() -> None:
    for ids in sample(config(), vggt(2), "model", 4).ids:
        assert len({name.split("/")[1] for name in ids}) == 1


@pytest.mark.parametrize(("role", "net"), [("model", vggt(3)), ("depth", depth())])
def test_frames_for_accuracy_are_others(role: str, net: Network) -> None:
    seen = sample(config(), net, role, 3)
    judged = sample(config(), net, role, 4, skip=3)
    assert judged.shared == 0
    assert len(judged.ids) == 4
    assert not {name for ids in seen.ids for name in ids} & {name for ids in judged.ids for name in ids}


def test_a_short_recording_leaves_a_third_for_accuracy_and_a_single_moment_is_shared_openly() -> None:
    short = config()
    short.source = replace(short.source, steps=2)  # type: ignore[type-var]
    assert len(sample(short, vggt(3), "model", 8).ids) == 2
    judged = sample(short, vggt(3), "model", 4, skip=8)
    assert (len(judged.ids), judged.shared) == (1, 0)
    short.source = replace(short.source, steps=0)  # type: ignore[type-var]
    judged = sample(short, vggt(3), "model", 4, skip=8)
    assert (len(judged.ids), judged.shared) == (1, 1)


def test_folders_globs_and_tensors(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 7)
    assert len(feeds(config(path=str(tmp_path / "flat")), vggt(), "model", 8)) == 2, "groups of 2 files, a third spared"
    assert len(feeds(config(path=str(tmp_path / "flat" / "f[0-4].png")), vggt(), "model", 1)) == 1
    for camera in ("a", "b"):
        write_images(tmp_path / "rig" / camera, 4)
    found = sample(config(path=str(tmp_path / "rig")), vggt(), "model", 2)
    assert {name.split("/")[0] for name in found.ids[0]} == {"a", "b"}
    values = np.random.default_rng(0).random((5, 2, 3, SIDE, SIDE), np.float32)
    np.save(tmp_path / "many.npy", values)
    np.save(tmp_path / "one.npy", values[0])
    np.savez(tmp_path / "one.npz", images=values[0])
    assert len(feeds(config(path=str(tmp_path / "many.npy")), vggt(), "model", 3)) == 3
    for name in ("one.npy", "one.npz"):
        got = feeds(config(path=str(tmp_path / name)), vggt(), "model", 3)
        assert torch.equal(got[0]["images"], torch.from_numpy(values[0]))
    np.save(tmp_path / "grey.npy", (255 * values[:, :, :, :40]).astype(np.uint8))
    assert feeds(config(path=str(tmp_path / "grey.npy")), vggt(), "model", 1)[0]["images"].shape == (2, 3, SIDE, SIDE)
    np.save(tmp_path / "depth.npy", values[0])
    assert len(feeds(config(path=str(tmp_path / "depth.npy")), depth(), "depth", 1)) == 1


def never() -> nn.Module:
    raise AssertionError("loaded before the frames were looked at")


def _bad(folder: Path, kind: str) -> str:
    good = np.random.default_rng(0).random((2, 3, SIDE, SIDE), np.float32)
    path = folder / "x.npy"
    if kind == "empty":
        (folder / "empty").mkdir()
        return str(folder / "empty")
    if kind == "missing":
        return str(folder / "nowhere")
    if kind == "few":
        write_images(folder / "few", 1)
        return str(folder / "few")
    if kind == "grey images":
        from PIL import Image

        for index in range(2):
            Image.new("RGB", (64, 48), (9, 9, 9)).save(folder / f"{index}.png")
        return str(folder / "*.png")
    if kind == "mixed":
        write_images(folder, 2)
    if kind == "pickled":
        np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
        return str(path)
    if kind == "damaged":
        path = folder / "x.npz"
        np.savez(path, images=good)
        path.write_bytes(path.read_bytes()[:-200])
        return str(path)
    arrays: dict[str, np.ndarray] = {
        "geometry": good[:, :, :28], "views": good[:1], "layout": good.transpose(0, 2, 3, 1), "integers": good.astype(int),
        "nan": np.where(np.arange(SIDE) == 3, np.nan, good), "range": good * 255, "constant": np.full_like(good, 0.5),
    }  # fmt: skip
    np.save(path, arrays.get(kind, good))
    return str(folder) if kind == "mixed" else str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "no files"),
        ("missing", "no such file"),
        ("few", "1 images, and the network takes 2 views"),
        ("grey images", "every pixel has the value 9"),
        ("mixed", "both images and tensors"),
        ("pickled", "cannot be read"),
        ("damaged", "cannot be read"),
        ("geometry", r"geometry \[2, 3, 28, 56\]"),
        ("views", r"geometry \[1, 3, 56, 56\]"),
        ("layout", "shape"),
        ("integers", "holds int64"),
        ("nan", "NaN"),
        ("range", "values from"),
        ("constant", "every value is 0.5"),
    ],
)
def test_bad_frames_are_refused_before_the_network_is_loaded(kind: str, message: str, tmp_path: Path) -> None:
    settings = config(path=_bad(tmp_path, kind))
    with pytest.raises(ReconError, match=message) as caught:
        calibrate(replace(vggt(), load=never), tmp_path / "x.onnx", tmp_path / "x.npz", settings, "model", "key")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "knobs", [{"batches": 0}, {"method": "mean"}, {"percentile": 20}, {"bins": 300}, {"file": "nowhere.npz"}]
)
def test_impossible_options(knobs: dict[str, Any]) -> None:
    with pytest.raises(ReconError, match=f"calibration.{next(iter(knobs))}"):
        CalibrationOptions(**knobs).check()


def test_histograms_double_their_range_without_losing_counts() -> None:
    observer = Observer(256)
    for scale in (0.3, 2.0, 77.0, 0.1):
        observer.add(scale * torch.linspace(-1, 1, 1001))
    assert observer.counts.sum() == 4004
    assert observer.largest == 77.0
    assert observer.width == 128.0
    assert observer.range("max", 0) == 77.0


def test_percentile_and_entropy_cut_off_what_is_rare() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values[0] = 60.0
    observer = Observer(2048)
    observer.add(values)
    exact = float(values.abs().quantile(0.999))
    assert observer.range("percentile", 99.9) == pytest.approx(exact, abs=2 * observer.width / 2048)
    assert 2.5 < observer.range("entropy", 0) < 10, "a normal distribution is cut at a few sigma, far below 60"
    flat = np.ones(2048)
    assert entropy_range(flat, 1.0) == pytest.approx(1.0), "nothing is rare in a uniform distribution"
    assert percentile_range(flat, 1.0, 100) == pytest.approx(1.0)


def test_ranges_of_layers_are_those_of_the_module() -> None:
    fed = [images(seed) for seed in (1, 2)]
    found = layer_inputs(network(), fed, 0, (0, 0))
    module, largest = seeded(), 0.0
    with torch.no_grad():
        for item in fed:
            tokens = module.patch(torch.relu(module.stem(item["images"]))).flatten(2).transpose(1, 2)
            largest = max(largest, float(module.norm(tokens).abs().max()))
    assert list(found) == ["qkv", "out"]
    assert found["qkv"].largest == pytest.approx(largest)


class Led(nn.Module):
    """A sequence that starts with a class token of another size than the patches'."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.mix(torch.cat([torch.full((2, 1, 3), 1000.0), x.flatten(2).transpose(1, 2)], 1)),)


def test_special_tokens_can_be_left_out() -> None:
    net = replace(network(Led, ("out",)), inputs={"images": TensorSpec((2, 3, 4, 4))})
    fed = [{"images": torch.rand(2, 3, 4, 4)}]
    assert layer_inputs(net, fed, 0, (0, 0))["mix"].largest == 1000
    assert layer_inputs(net, fed, 0, (1, 16))["mix"].largest <= 1
    settings = config()
    assert settings.model.special_tokens() == (5, 16)
    assert settings.depth.special_tokens() == (1, 16)


def test_skipping_special_tokens_changes_the_ranges_of_a_real_network() -> None:
    net = depth()
    fed = feeds(config(), net, "depth", 1)
    every, patches = (layer_inputs(net, fed, 0, specials) for specials in ((0, 0), (1, 16)))
    assert every.keys() == patches.keys()
    assert any(patches[path].largest < every[path].largest for path in every)


def test_a_network_that_is_not_finite_is_named() -> None:
    def broken() -> nn.Module:
        module = seeded()
        module.norm.weight.data[3] = torch.nan
        return module

    with pytest.raises(ReconError, match="qkv"):
        layer_inputs(network(broken), [images(0)], 0, (0, 0))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export(network(), path, ExportOptions())
    return path


def test_values_of_the_graph_are_those_of_onnxruntime(small: Path) -> None:
    fed = [images(seed) for seed in (1, 2)]
    found = graph_maxima(small, fed)
    model = onnx.load(str(small))
    names = [name for node in model.graph.node for name in node.output if name in found]
    assert len(names) == len(found) - 1, "every value that a node makes, and the input"
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(names, {"images": item["images"].numpy()}) for item in fed]
    for index, name in enumerate(names):
        assert found[name] == pytest.approx(max(float(np.abs(run[index]).max()) for run in runs), rel=1e-5)


def test_values_of_a_large_graph_are_not_all_kept(tmp_path: Path) -> None:
    count, shape = 40, [4, 1024, 1024]
    nodes = [onnx.helper.make_node("Sin", [f"v{i}"], [f"v{i + 1}"]) for i in range(count)]
    nodes.append(onnx.helper.make_node("ReduceMean", [f"v{count}"], ["y"], keepdims=0))
    ends = [onnx.helper.make_tensor_value_info(name, 1, dims) for name, dims in (("v0", shape), ("y", []))]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "chain.onnx"))
    fed = [{"v0": torch.rand(shape)}]
    if not reset_peak_rss():
        pytest.skip("the kernel does not let the high-water mark of memory be reset")
    before = rss_mib()
    assert len(graph_maxima(tmp_path / "chain.onnx", fed)) == count + 2
    assert peak_rss_mib() - before < 320, "16 MiB per value: all 40 would be 640"


def run(settings: Config, base: Path | None, out: Path, net: Network | None = None, key: str = "key") -> dict[str, Any]:
    return calibrate(net or vggt(), base, out, settings, "model", key)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twin") / "twin.onnx"
    export(vggt(), path, ExportOptions(simplify=False))
    return path


def test_what_is_written_is_read_back_and_holds_no_pickled_object(twin: Path, tmp_path: Path) -> None:
    facts = run(config(batches=2, method="entropy"), twin, tmp_path / "a.npz")
    ranges = read_ranges(tmp_path / "a.npz")
    assert (ranges.method, ranges.key, ranges.count) == ("entropy", "key", 2)
    assert facts["layers"] == len(ranges.inputs) == 52
    assert facts["smallest_share_of_max"] < 1, "entropy cuts some range"
    assert {"aggregator.global_blocks.3.attn.qkv", "camera_head.trunk.0.mlp.fc2"} <= set(ranges.inputs)
    assert min(ranges.inputs.values()) > 0
    assert ranges.values["images"] <= 1
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert all(data[name].dtype.kind in "fU" for name in data.files)


def test_a_given_file_is_taken_when_it_fits_and_refused_with_what_changed(twin: Path, tmp_path: Path) -> None:
    run(config(batches=1), twin, tmp_path / "a.npz")
    taken = config(batches=1, file=str(tmp_path / "a.npz"))
    assert run(taken, twin, tmp_path / "b.npz")["taken_from"] == str(tmp_path / "a.npz")
    assert read_ranges(tmp_path / "a.npz") == read_ranges(tmp_path / "b.npz")
    other_data = replace_source(taken, seed=5)
    cases = {
        "data": (other_data, vggt()),
        "weights": (taken, replace(vggt(), weights_key="other")),
        "settings": (taken, replace(vggt(), settings={"points": True})),
        "geometry": (taken, vggt(3)),
        "options": (config(batches=1, method="entropy", file=taken.calibration.file), vggt()),
    }
    for word, (settings, net) in cases.items():
        with pytest.raises(ReconError, match=f"another .*{word}"):
            run(settings, twin, tmp_path / "c.npz", net, key="another")


def test_an_engine_without_a_graph_has_no_graph_made_and_takes_ranges_of_one(twin: Path, tmp_path: Path) -> None:
    facts = run(config(batches=1), None, tmp_path / "vggt_layers.npz")
    alone = read_ranges(tmp_path / "vggt_layers.npz")
    assert facts["values"] == 0
    assert alone.values == {}
    run(config(batches=1), twin, tmp_path / "a.npz", key="with graph")
    assert alone.inputs == read_ranges(tmp_path / "a.npz").inputs
    given = config(batches=1, file=str(tmp_path / "a.npz"))
    assert run(given, None, tmp_path / "b.npz", key="of layers")["taken_from"] == str(tmp_path / "a.npz")
    with pytest.raises(ReconError, match="another settings"):
        run(given, None, tmp_path / "c.npz", replace(vggt(), settings={"points": True}), key="of layers")
    with pytest.raises(ReconError, match="another exported graph"):
        run(config(batches=1, file=str(tmp_path / "vggt_layers.npz")), twin, tmp_path / "c.npz", key="with graph")


def replace_source(settings: Config, **knobs: Any) -> Config:
    found = config(**vars(settings.calibration))
    found.source = replace(settings.source, **knobs)  # type: ignore[type-var]
    return found


def test_the_key_of_the_data_is_its_content() -> None:
    settings = config(batches=2)
    key = data_key(settings.calibration, settings.source, 3)
    assert key == data_key(settings.calibration, settings.source, 3)
    assert key != data_key(settings.calibration, replace(settings.source, seed=1), 3)  # type: ignore[type-var]
    assert key != data_key(settings.calibration, settings.source, 2)


@pytest.mark.parametrize("damage", ["short", "text", "version", "missing"])
def test_a_damaged_calibration_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    meta = {"version": 99 if damage == "version" else 1, "method": "max", "key": "", "count": 1, "source": ""}
    empty = {
        f"{part}{end}": np.array([], kind)
        for part in ("inputs", "values")
        for end, kind in (("", float), ("_names", str))
    }
    if damage != "missing":
        np.savez(path, meta=np.array(json.dumps(meta)), **empty)
        if damage == "version":
            with pytest.raises(ReconError, match="version 99"):
                read_ranges(path)
            return
        assert read_ranges(path).count == 1
    if damage == "short":
        path.write_bytes(path.read_bytes()[:80])
    if damage == "text":
        path.write_text("{}")
    with pytest.raises(ReconError, match=r"a\.npz"):
        read_ranges(path)


def _copy(path: Path, folder: Path) -> Path:
    for file in (path, path.with_name(f"{path.name}.data")):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / path.name


def test_a_damaged_graph_is_named(small: Path, tmp_path: Path) -> None:
    path = _copy(small, tmp_path)
    data = path.with_name(f"{path.name}.data")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ReconError, match=r"small\.onnx\.data with its weights is 100 bytes"):
        graph_maxima(path, [images(0)])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ReconError, match="damaged"):
        graph_maxima(path, [images(0)])
    path.write_bytes(b"")
    with pytest.raises(ReconError, match="no graph"):
        read_graph(path)


def test_an_unknown_operator_is_named_with_its_module(small: Path, tmp_path: Path) -> None:
    path = _copy(small, tmp_path)
    model = onnx.load(str(path), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and "qkv" in str(node.metadata_props))
    node.op_type = "MatMulOfTomorrow"
    onnx.save(model, str(path))
    with pytest.raises(ReconError, match=r"MatMulOfTomorrow .*module qkv.*operator set 20"):
        read_graph(path)


def test_too_few_frames_for_accuracy_are_refused_before_an_engine_is_built() -> None:
    settings = config()
    settings.engine, settings.accuracy = option("engine", "onnxruntime"), AccuracyOptions()  # type: ignore[assignment]
    settings.source = replace(settings.source, steps=0)  # type: ignore[type-var]
    with pytest.raises(ReconError, match="has 3 frames, and the network takes 5 views"):
        require_frames(settings, vggt(5), "model")
    require_frames(settings, vggt(3), "model")
    settings.accuracy = AccuracyOptions(examples=True)
    require_frames(settings, vggt(5), "model")
