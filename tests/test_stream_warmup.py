"""The warm start: with it a stream gives the same bytes as without, and nothing of it is seen or counted anywhere."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from recon.config import Config, option
from recon.depth.recorded import Recorded
from recon.fusion import Fusion, Map
from recon.fusion.surfel import Surfel, SurfelMap
from recon.fusion.tsdf import Tsdf, TsdfMap
from recon.geometry.cameras import scale_intrinsics
from recon.geometry.views import DepthImage, View
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.stream import FrameResult, Streamer
from recon.live.warmup import ROUNDS, warm_up
from recon.pipeline import Run, finish, run
from recon.sources.synthetic import Synthetic
from recon.store import Store

DEVICES = ["host", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ALIGN = Align(render_width=40, pixels=1000)


@dataclass
class Live(Synthetic):
    """As cameras give them, the second one with images of half the size."""

    live: ClassVar[bool] = True

    def bootstrap(self) -> list[View]:
        return mixed(super().bootstrap())

    def batches(self) -> Iterator[list[View]]:
        yield from map(mixed, super().batches())


def mixed(views: list[View]) -> list[View]:
    one = views[1]
    assert one.K is not None
    assert one.depth is not None
    K = scale_intrinsics(one.K, one.size, (one.size[0] // 2, one.size[1] // 2))
    half = replace(one, image=one.image[::2, ::2].copy(), depth=one.depth[::2, ::2].copy(), K=K)
    return [views[0], half, *views[2:]]


@dataclass
class Told(Recorded):
    """Recorded depth that notes what it was asked for, and takes its time at first."""

    asked: list[tuple[str, int]] = field(default_factory=list)
    first_s: float = 0.0

    def predict(self, view: View, session: object) -> DepthImage:
        if not self.asked:
            time.sleep(self.first_s)
        self.asked.append((view.camera, view.frame))
        return super().predict(view, None)


def empty(fusion: type[Fusion], device: str) -> Map:
    """device: `host`, or that of the tensors."""
    options = fusion(name="", voxel=0.1)
    if device == "host":
        return options.create()
    from recon.fusion.device.surfels import DeviceSurfelMap
    from recon.fusion.device.tsdf import DeviceTsdfMap

    return DeviceTsdfMap(options, device) if isinstance(options, Tsdf) else DeviceSurfelMap(options, device)


def streamer(fusion: type[Fusion], device: str, depth: Any, source: Synthetic | None = None, **knobs: Any) -> Streamer:
    """Over the bootstrap's maps; its pool ends with the test process at the latest."""
    source = source or Live(name="live", width=96, height=72, steps=3, count=3)
    bootstrap = option("model", "recorded").bootstrap(source.bootstrap(), source.scale(), None)
    maps = [empty(fusion, device) for _ in range(2)]
    for one in maps:
        one.integrate_all(bootstrap.views[:1], 0)
    pool = DepthAnythingPool(
        knobs.pop("engine", lambda: None), workers=2, predict=depth.predict, predict_several=depth.predict_several,
        predict_all=depth.predict_all,
    )  # fmt: skip
    return Streamer(source, depth, pool, bootstrap, maps[0], maps[1], knobs.pop("align", ALIGN), **knobs)


def streamed(found: Streamer) -> list[FrameResult]:
    results: list[FrameResult] = []
    for _ in found.run(results.append):
        pass
    found.pool.close()
    return results


def content(fused: Any) -> dict[str, bytes]:
    """Every value that a map holds."""
    if isinstance(fused, TsdfMap):
        held = fused.grid.arrays()
    elif isinstance(fused, SurfelMap):
        held = {name: column[: fused.size] for name, column in fused.columns.items()}
    else:
        rows = fused.pool if hasattr(fused, "pool") else fused
        columns = {k: getattr(rows, k) for k in ("tsdf", "weight", "color")} if rows is not fused else fused.columns
        held = {name: column[: rows.size].cpu().numpy() for name, column in columns.items()}
        held |= {"keys": rows.keys.cpu().numpy()} if rows is not fused else {}
    return {name: values.tobytes() for name, values in held.items()}


def compare(cold: Streamer, warm: Streamer, fusion: type[Fusion], device: str) -> None:
    before = content(warm.fused), content(warm.anchor), vars(warm.pool)["frames"], dict(warm.aligners)
    assert warm_up(warm, partial(empty, fusion, device)) > 0
    assert (content(warm.fused), content(warm.anchor), vars(warm.pool)["frames"], warm.aligners) == before
    assert all(aligner.frames == 0 and aligner.s is None for aligner in warm.aligners.values())
    ours, theirs = streamed(warm), streamed(cold)
    assert len(ours) == len(theirs) == 9
    assert sum(frame.align.accepted for frame in ours) >= 3
    assert min(frame.anchored for frame in ours) < 1  # the live map fills in
    for one, other in zip(ours, theirs, strict=True):
        rows = [{k: v for k, v in frame.row().items() if "ms" not in k.split("_")} for frame in (one, other)]
        assert json.dumps(rows[0]) == json.dumps(rows[1])
        assert (one.depth is None) == (other.depth is None)
        if one.depth is not None and other.depth is not None:
            assert one.depth.tobytes() == other.depth.tobytes()
    assert content(warm.fused) == content(cold.fused)
    assert [a.state() for a in warm.aligners.values()] == [a.state() for a in cold.aligners.values()]
    assert warm.sizes == cold.sizes
    loose = ("most_batches_ahead", "most_images_waiting")  # the threads' luck
    reports = [{k: v for k, v in found.report().items() if k not in loose} for found in (warm, cold)]
    assert reports[0] == reports[1]
    assert warm.pool.frames == cold.pool.frames == 9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fusion", [Tsdf, Surfel])
def test_a_warm_stream_gives_the_bytes_of_a_cold_one(fusion: type[Fusion], device: str) -> None:
    depth = Told(**option("depth", "recorded").settings())
    cold, warm = (streamer(fusion, device, depth) for _ in range(2))
    depth.asked.clear()
    compare(cold, warm, fusion, device)
    warmed = [("cam0", 0), ("cam1", 0), ("cam2", 0)]
    assert sorted(depth.asked[: 3 * ROUNDS]) == sorted(warmed * ROUNDS)
    assert all(frame > 0 for _, frame in depth.asked[3 * ROUNDS :])


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_that_takes_several_images_is_warmed_with_as_many(device: str) -> None:
    """The small trained network in batches of two, which the third camera does not fill."""
    from recon.engines.torch import TorchSession

    depth: Any = replace(option("depth", "da-mini"), batch=2)
    network = depth.network()
    module, shapes = network.load(), []

    class Seen(TorchSession):
        def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
            shapes.append(tuple(feeds["pixel_values"].shape))
            return super()._run(feeds)

    def engine() -> Seen:
        return Seen(network, module, device if device == "cuda" else "cpu")

    source = Live(name="live", width=160, height=120, steps=3, count=3)
    cold, warm = (streamer(Tsdf, device, depth, source, engine=engine) for _ in range(2))
    compare(cold, warm, Tsdf, device)
    inferences = 2 if device == "host" else 3  # of a batch: on a device each size goes in on its own
    assert shapes == [(2, 3, 168, 224)] * inferences * (ROUNDS + 2 * 3)


@pytest.mark.parametrize("device", DEVICES[:2])
def test_gates_and_faults_do_not_keep_a_part_of_the_work_cold(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """No frame of this stream is accepted; the warm start fuses all the same. One camera's depth fails in it, which is
    not counted, but said."""

    class Fails(Recorded):
        def predict(self, view: View, session: object) -> DepthImage:
            if (view.camera, view.frame) == ("cam1", 0):
                raise RuntimeError("out of memory")
            return super().predict(view, None)

    depth = Fails(**option("depth", "recorded").settings())
    found = streamer(Tsdf, device, depth, align=replace(ALIGN, min_coverage=1.0, min_inlier=1.0))
    made: list[Map] = []
    warm_up(found, lambda: made.append(empty(Tsdf, device)) or made[-1])
    assert len(made[0].points().points) > 1000
    (line,) = [record.getMessage() for record in caplog.records if record.name == "recon.live.warmup"]
    assert "not all is ready" in line
    assert "out of memory" in line
    assert found.pool.failures == found.pool.frames == found.pool.most_waiting == 0
    assert not any(frame.align.accepted for frame in streamed(found))


def test_fits_and_references_are_those_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph is recorded at the second call of an object for a set of shapes: the stream's own must have had it.
    And the bootstrap's map has been rendered into cameras that stand still."""
    found = streamer(Tsdf, "cpu", option("depth", "recorded"))
    step: Any = found.step
    plain, shapes = step.aligner._figures.function, []

    def told(*tensors: Any) -> Any:
        shapes.append(tuple(tensors[0].shape))
        return plain(*tensors)

    step.aligner._figures.function = told
    warm_up(found, partial(empty, Tsdf, "cpu"))
    monkeypatch.setattr(found.anchor, "render_all", lambda *_: pytest.fail("rendered again"))
    assert found.step is step
    assert shapes == [(1, 72, 96), (1, 36, 48), (1, 72, 96)] * ROUNDS
    streamed(found)
    assert shapes == [(1, 72, 96), (1, 36, 48), (1, 72, 96)] * (ROUNDS + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_a_warm_stream_on_a_gpu_records_nothing_more(graphs: bool) -> None:
    from recon.live.stream import StreamOptions

    options = StreamOptions(cuda_graph=graphs)
    found = streamer(Tsdf, "cuda", option("depth", "recorded"), options=options)
    warm_up(found, partial(empty, Tsdf, "cuda"))
    step: Any = found.step
    before = dict(step.aligner._figures._known)
    assert all(before.values())
    assert len(before) == 2 * graphs
    streamed(found)
    assert dict(step.aligner._figures._known) == before


def test_files_with_the_map_on_the_host_are_not_kept_waiting() -> None:
    depth = Told(**option("depth", "recorded").settings())
    found = streamer(Tsdf, "host", depth, Synthetic(name="synthetic", width=96, height=72, steps=1, count=3))
    warm_up(found, lambda: pytest.fail("nothing to warm"))
    assert not depth.asked
    assert len(streamed(found)) == 3


def test_a_live_run_waits_for_what_is_slow_before_its_cameras_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first inference takes over a second here; no frame of the run does, and its files count what streamed."""
    caplog.set_level(logging.INFO)
    source = Live(name="live", width=96, height=72, steps=3, count=3)
    depth = Told(**option("depth", "recorded").settings(), first_s=1.05)
    config = Config(
        model=option("model", "recorded"), depth=depth, quant_mode=option("quant_mode", "none"),
        precision=option("precision", "fp32"), engine=option("engine", "torch"), source=source,
        fusion=replace(option("fusion", "surfel"), voxel=0.1), tracking=option("tracking", "none"),
        stages=["reconstruct"], output=str(tmp_path / "outputs"),
    )  # fmt: skip
    state = Run(config, tmp_path / "run", Store(config))
    state.folder.mkdir()
    run(state)
    metrics = json.loads(finish(state).read_text())
    assert (metrics["frames_seen"], metrics["stream"]["batches"], metrics["stream"]["depth_failures"]) == (9, 3, 0)
    rows = [json.loads(line) for line in (state.folder / "frames.jsonl").read_text().splitlines()]
    assert [(row["camera"], row["frame"]) for row in rows] == [(f"cam{c}", k) for k in (1, 2, 3) for c in (0, 1, 2)]
    assert max(row["ms_latency"] for row in rows) < 1000
    assert 1.05 < metrics["seconds"]["warm_up"] < 30
    assert state.record.metrics["time/warm_up_s"] == metrics["seconds"]["warm_up"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "recon.live.warmup"]
    assert line.startswith("ready for the first frame after ")
    calibration = json.loads((state.folder / "calibration.json").read_text())
    assert {camera["frames"] for camera in calibration["cameras"].values()} == {3}
    np.testing.assert_equal(len(depth.asked), 3 * (ROUNDS + 3))
