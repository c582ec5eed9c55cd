"""What other options say about a source is refused before a network is exported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recording import write_recording

from recon.benchmark.contract import BenchmarkOptions
from recon.config import Config, Evaluate, option
from recon.errors import ReconError
from recon.geometry.scale import ScaleOptions
from recon.live.align import Align
from recon.pipeline import Run, run
from recon.plan import plan
from recon.preflight import preflight
from recon.sources.images import Images
from recon.sources.synthetic import Synthetic
from recon.sources.videos import Videos
from recon.store import Store

SOURCE = replace(option("source", "synthetic"), width=96, height=72, steps=1, count=3, moving=0)


def config(folder: Path, **changed: object) -> Config:
    """Real networks that would have to be exported and built; nothing of that may happen."""
    names = {"model": "vggt-twin", "depth": "da2-twin", "quant_mode": "none", "precision": "fp32",
             "engine": "onnxruntime", "fusion": "tsdf", "tracking": "none"}  # fmt: skip
    options = {group: option(group, name) for group, name in names.items()}
    stages = ["export", "build", "reconstruct", "evaluate"]
    return Config(**{**options, "source": SOURCE, "stages": stages, "output": str(folder / "out"), **changed})  # type: ignore[arg-type]


def board(folder: Path) -> Evaluate:
    for name in ("xy_CHARUCO.csv", "timestamps.csv"):
        (folder / name).write_text("no,such,columns\n1,2,3\n")
    return Evaluate(board=str(folder))


def reference(folder: Path) -> Evaluate:
    np.savez(folder / "K.npz", K=np.eye(3))
    return Evaluate(reference=str(folder / "K.npz"))


def calibration(folder: Path) -> Align:
    (folder / "calibration.json").write_text("camera,scale\n")
    return Align(per_camera_calib=str(folder / "calibration.json"))


def other_cameras(folder: Path) -> Align:
    (folder / "calibration.json").write_text('{"format": 1, "cameras": {"left": {}}}')
    return Align(per_camera_calib=str(folder / "calibration.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {"scale": ScaleOptions(baseline=["cam0", "cam9"], baseline_m=0.1)}, ["cam9", "cam0, cam1, cam2"]),
        (lambda _: {"model": replace(option("model", "vggt-twin"), views=5)}, ["model.views=5", "3 cameras"]),
        (lambda _: {"align": Align(per_camera_calib="none.json")}, ["align.per_camera_calib=none.json"]),
        (lambda folder: {"align": calibration(folder)}, ["calibration.json", "no JSON"]),
        (lambda folder: {"align": other_cameras(folder)}, ["no camera 'cam0'; it has left"]),
        (lambda folder: {"evaluate": reference(folder)}, ["K.npz", "points_mm or points"]),
        (lambda folder: {"evaluate": board(folder)}, ["xy_CHARUCO.csv"]),
    ],
    ids=["baseline", "views", "no calibration", "calibration", "cameras", "reference", "board"],
)
def test_refused_before_any_work(tmp_path: Path, change, words: list[str]) -> None:
    settings = config(tmp_path, **change(tmp_path))
    with pytest.raises(ReconError) as caught:
        run(Run(settings, tmp_path / "run", Store(settings)))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert not list((tmp_path / "out").rglob("*.onnx"))
    with pytest.raises(ReconError, match=caught.value.problem.partition(":")[0].replace("[", r"\[")):
        plan(settings)


def test_metres_that_are_demanded_have_a_source(tmp_path: Path) -> None:
    write_recording(tmp_path)
    images = Images(name="images", path=str(tmp_path / "images"))
    for wanted, remedy in {
        "baseline": "scale.baseline=",
        "board": "square_m",
        "depth": "source.depth",
        "model": "da2-",
    }.items():
        with pytest.raises(ReconError, match=f"scale.source={wanted}: nothing here gives it") as caught:
            preflight(config(tmp_path, source=images, scale=ScaleOptions(source=wanted)))
        assert remedy in caught.value.remedy
        known = replace(images, poses=str(tmp_path / "poses.npz"))
        preflight(config(tmp_path, source=known, scale=ScaleOptions(source=wanted)))
    preflight(
        config(tmp_path, source=replace(images, depth=str(tmp_path / "depth")), scale=ScaleOptions(source="depth"))
    )
    preflight(
        config(tmp_path, source=images, scale=ScaleOptions(source="baseline", baseline=["cam0", "cam1"], baseline_m=1))
    )
    preflight(config(tmp_path, source=images, scale=ScaleOptions(source="board", columns=3, rows=3, square_m=0.1)))
    preflight(config(tmp_path, source=images, scale=ScaleOptions(source="none")))


def test_recorded_depth_is_asked_for_where_there_is_some(tmp_path: Path) -> None:
    write_recording(tmp_path)
    images = Images(name="images", path=str(tmp_path / "images"))
    with_depth = replace(images, depth=str(tmp_path / "depth"))
    assert [source.has_depth() for source in (images, with_depth, replace(with_depth, live_path="L"))] == [0, 1, 0]
    assert isinstance(SOURCE, Synthetic)
    assert SOURCE.has_depth()
    assert not Videos(name="videos", path="v").has_depth()
    recorded = option("depth", "recorded")
    preflight(config(tmp_path, depth=recorded, source=with_depth, stages=["depth"]))
    for stages in (["depth"], ["reconstruct"]):
        with pytest.raises(ReconError, match="source=images has no recorded depth"):
            preflight(config(tmp_path, depth=recorded, source=images, stages=stages))
    with pytest.raises(ReconError, match="model=recorded: camera cam0 has no intrinsics and no poses"):
        preflight(config(tmp_path, model=option("model", "recorded"), source=with_depth))


def test_stages_that_need_no_source_do_not_look_at_one(tmp_path: Path) -> None:
    preflight(config(tmp_path, source=Images(name="images", path="none"), stages=["export", "build"]))


ABSENT = "nobody/has-no-such-weights"


def test_weights_of_a_network_that_no_stage_uses_need_not_be_here(tmp_path: Path) -> None:
    model = replace(option("model", "vggt-1b"), weights=ABSENT)
    engine = option("engine", "torch")
    settings = config(tmp_path, model=model, engine=engine, stages=["depth"])
    assert plan(settings)
    run(Run(settings, tmp_path / "run", Store(settings)))
    assert (tmp_path / "run" / "depth_video" / "all.mp4").is_file()
    depth = replace(option("depth", "da2-small"), weights=ABSENT)
    for stages, benchmark in ((["report"], BenchmarkOptions()), (["benchmark"], BenchmarkOptions(root=str(tmp_path)))):
        settings = config(tmp_path, model=model, depth=depth, stages=stages, benchmark=benchmark)
        assert plan(settings)
        assert not Store(settings).networks()


@pytest.mark.parametrize("stages", [["export"], ["build", "reconstruct"], ["depth", "reconstruct"]])
@pytest.mark.parametrize("role", ["model", "depth"])
def test_weights_that_are_used_are_missed_before_any_work(tmp_path: Path, stages: list[str], role: str) -> None:
    absent = replace(option(role, {"model": "vggt-1b", "depth": "da2-small"}[role]), weights=ABSENT)
    settings = config(tmp_path, stages=stages, **{role: absent})
    state = Run(settings, tmp_path / "run", Store(settings))
    with pytest.raises(ReconError, match=f"weights={ABSENT}@main: not in the local cache"):
        run(state)
    assert not state.rows
    assert not list(tmp_path.rglob("*.onnx"))
    assert not (tmp_path / "run").exists()


def test_a_keep_list_is_judged_where_all_networks_are_used(tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text('{"keep": ["encoder.*"], "weights": "of the model", "network": "vggt"}')
    mode = replace(option("quant_mode", "torch-int8-dynamic"), keep=[str(tmp_path / "keep.json")])
    assert list(Store(config(tmp_path, quant_mode=mode, stages=["depth"])).networks()) == ["depth"]
    with pytest.raises(ReconError, match="made for the weights of the model of vggt"):
        Store(config(tmp_path, quant_mode=mode, stages=["build"])).networks()
