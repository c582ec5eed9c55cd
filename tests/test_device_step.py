"""The stream with a map on a device (torch's CPU here; CUDA with `-m gpu`) beside the stream on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from recon.depth.depth_anything import DepthAnything
from recon.depth.recorded import Recorded
from recon.errors import ReconError
from recon.fusion import Map
from recon.fusion.device.tsdf import DeviceTsdfMap
from recon.fusion.tsdf import Tsdf, TsdfMap
from recon.geometry.cameras import scale_intrinsics
from recon.geometry.views import View
from recon.live import DepthAnythingPool
from recon.live.align import Align
from recon.live.device_movers import DeviceMovers
from recon.live.movers import MoverMask
from recon.live.stream import FrameResult, Streamer
from recon.models.recorded import Recorded as RecordedModel
from recon.optional import open3d
from recon.sources.synthetic import Synthetic

DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OPTION = Tsdf(voxel=0.08)
ALL = Align(render_width=64)  # 3072 pixels: every fit takes all of them, so no draw matters once it has settled


def require_open3d() -> None:
    """Skip where the map of the host cannot be made."""
    try:
        open3d()
    except ReconError as error:
        pytest.skip(str(error))


@dataclass
class Mixed(Synthetic):
    """The second camera has images of half the size."""

    def batches(self) -> Iterator[list[View]]:
        for views in super().batches():
            one = views[1]
            assert one.K is not None
            assert one.depth is not None
            K = scale_intrinsics(one.K, one.size, (one.size[0] // 2, one.size[1] // 2))
            half = replace(one, image=one.image[::2, ::2].copy(), depth=one.depth[::2, ::2].copy(), K=K)
            yield [views[0], half, *views[2:]]


def streamed(
    device: str | None, align: Align, predict: Any = None, kind: type[Synthetic] = Synthetic, anchors: int = 9,
    **scene: Any,
) -> tuple[list[FrameResult], Streamer]:  # fmt: skip
    """A synthetic scene through recorded depth; device None: on the host. anchors: cameras in the bootstrap map."""
    source = kind(**{"name": "synthetic", "width": 128, "height": 96, "steps": 3, "count": 3, **scene})
    depth = Recorded(name="recorded")
    bootstrap = RecordedModel(name="recorded").bootstrap(source.bootstrap(), source.scale(), None)
    maps: list[Any] = [TsdfMap(OPTION) if device is None else DeviceTsdfMap(OPTION, device) for _ in range(2)]
    for fused in maps:
        fused.integrate_all(bootstrap.views[:anchors], 0)
    results: list[FrameResult] = []
    with DepthAnythingPool(lambda: None, workers=2, predict=predict or depth.predict) as pool:
        streamer = Streamer(source, depth, pool, bootstrap, maps[0], maps[1], align)
        for _ in streamer.run(results.append):
            pass
    return results, streamer


@DEVICE
def test_the_device_gives_what_the_host_gives(device: str) -> None:
    """Same frames accepted, scale, depth and moving share alike, and the same surface in the map."""
    require_open3d()
    host, on_host = streamed(None, ALL)
    ours, on_device = streamed(device, ALL)
    assert sum(frame.align.accepted for frame in host) >= 8
    for one, other in zip(ours, host, strict=True):
        assert (one.view.camera, one.view.frame) == (other.view.camera, other.view.frame)
        assert (one.align.accepted, one.align.reason) == (other.align.accepted, other.align.reason)
        assert one.row().keys() == other.row().keys()
        assert one.anchored == other.anchored
        if one.align.accepted:
            assert one.depth is not None
            assert other.depth is not None
            assert one.align.s == pytest.approx(other.align.s, rel=0.01)
            both = (one.depth > 0) & (other.depth > 0)
            assert both.mean() > 0.98 * (other.depth > 0).mean()
            assert np.median(np.abs(one.depth[both] / other.depth[both] - 1)) < 2e-3
            assert one.moving == pytest.approx(other.moving, abs=0.02)  # holes in the reference count, too
    a, b = on_host.fused.points().points, on_device.fused.points().points
    assert len(b) == pytest.approx(len(a), rel=0.01)
    K, pose = on_host.bootstrap.K_source["cam1"], on_host.bootstrap.T_world_cam["cam1"]
    wanted, found = (s.fused.render_depth(K, pose, 128, 96) for s in (on_host, on_device))
    both = (wanted > 0) & (found > 0)
    assert both.mean() > 0.97 * (wanted > 0).mean()
    assert np.median(np.abs(found[both] / wanted[both] - 1)) < 1e-3
    assert on_device.report().keys() == on_host.report().keys()


def arrays(fused: Map) -> dict[str, Any]:
    assert isinstance(fused, DeviceTsdfMap)
    return fused.pool.arrays()


@pytest.mark.gpu
def test_a_gpu_gives_what_torchs_cpu_gives() -> None:
    """The draws are the same on every device, so little more than rounding differs, over frames that are recorded as a
    graph and replayed."""
    (ours, on_gpu), (theirs, on_cpu) = (
        streamed(device, Align(render_width=64, pixels=1000)) for device in ("cuda", "cpu")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.align.accepted, one.align.reason) == (other.align.accepted, other.align.reason)
        assert one.align.s == pytest.approx(other.align.s, rel=1e-3)
        assert one.moving == pytest.approx(other.moving, abs=0.01)
    a, b = arrays(on_gpu.fused), arrays(on_cpu.fused)
    assert len(a["block_keys"]) == pytest.approx(len(b["block_keys"]), rel=0.01)


@DEVICE
def test_the_live_map_fills_in_and_sizes_may_differ(device: str) -> None:
    """A bootstrap map of one camera alone covers too little of the others' images; the second one's are small ones."""
    require_open3d()
    host, _ = streamed(None, ALL, kind=Mixed, anchors=1, moving=0, steps=2)
    ours, _ = streamed(device, ALL, kind=Mixed, anchors=1, moving=0, steps=2)
    assert [frame.view.size[0] for frame in ours[:3]] == [128, 64, 128]
    assert min(frame.anchored for frame in host) < 1
    assert [frame.align.reason for frame in ours[:3]] == [frame.align.reason for frame in host[:3]]
    assert sum(frame.align.accepted for frame in ours) >= 3
    for one, other in zip(ours, host, strict=True):
        assert one.anchored == pytest.approx(other.anchored, abs=0.15)  # the live maps are not of the same moment
        if one.align.accepted and other.align.accepted:
            assert one.align.s == pytest.approx(other.align.s, rel=0.05)


@DEVICE
def test_a_stream_on_a_device_gives_the_same_bytes_twice(device: str) -> None:
    (one, first), (two, second) = (streamed(device, Align(render_width=64, pixels=1000), steps=2) for _ in range(2))
    assert [frame.align.s for frame in one] == [frame.align.s for frame in two]
    for name, values in arrays(first.fused).items():
        assert values.tobytes() == arrays(second.fused)[name].tobytes(), name


@DEVICE
def test_depth_leaves_the_device_only_when_asked_for(device: str) -> None:
    results, _ = streamed(device, ALL, steps=1, moving=0, width=96, height=72)
    accepted = [frame for frame in results if frame.align.accepted]
    assert accepted
    for frame in accepted:
        assert isinstance(frame.kept, torch.Tensor)
        assert frame.kept.device.type == device
        assert "depth" not in vars(frame)
        assert frame.depth is frame.depth
        assert frame.depth is not None
        assert frame.depth.dtype == np.float32


@DEVICE
def test_a_camera_whose_depth_fails_costs_its_own_frame(device: str) -> None:
    predict = Recorded(name="recorded").predict

    def sometimes(view: View, session: None) -> np.ndarray:
        if view.camera == "cam1" and view.frame == 2:
            raise RuntimeError("out of memory\nlong story")
        return predict(view, session)

    results, streamer = streamed(device, ALL, sometimes, steps=2, moving=0, width=96, height=72)
    lost = [frame for frame in results if not frame.align.accepted]
    assert [(frame.view.camera, frame.view.frame) for frame in lost] == [("cam1", 2)]
    assert lost[0].align.reason == "no depth: RuntimeError: out of memory"
    assert lost[0].depth is None
    assert streamer.report()["depth_failures"] == 1


class Elsewhere:
    """As much of a session as is looked at before any frame."""

    device = "cuda:0"

    def sibling(self) -> None:
        return None

    def close(self) -> None:
        pass


def test_depth_on_another_device_than_the_map_is_refused() -> None:
    source, depth = Synthetic(name="synthetic", width=64, height=48), Recorded(name="recorded")
    fused = DeviceTsdfMap(OPTION, "cpu")
    with DepthAnythingPool(Elsewhere, predict=depth.predict) as pool:  # type: ignore[arg-type]
        bootstrap: Any = RecordedModel(name="recorded").bootstrap(source.bootstrap(), source.scale(), None)
        with pytest.raises(ReconError, match=r"map is on cpu .* depth engine runs on cuda:0") as refused:
            Streamer(source, depth, pool, bootstrap, fused, fused, Align())
    assert "fusion.device=cpu" in refused.value.remedy


@DEVICE
def test_moving_things_are_judged_as_on_the_host(device: str) -> None:
    """Two cameras over eight frames: something walks, something stays, and the second camera is turned once."""
    rng = np.random.default_rng(0)
    reference = rng.uniform(2, 4, (30, 40)).astype(np.float32)
    reference[:, 30:] = 0
    anchored = (reference > 0) & (np.arange(40) < 20)
    masks = [MoverMask(3, 0.04) for _ in range(2)]
    ours = DeviceMovers(3, 0.04)
    for k in range(8):
        depth = np.stack([np.kron(reference, np.ones((4, 4), np.float32)) * rng.uniform(0.99, 1.01, (120, 160))] * 2)
        depth = depth.astype(np.float32)
        depth[:, 40:80, 10 * k : 10 * k + 30] = 1.0
        depth[:, 10:30, 100:110] = 1.5
        depth[:, 90:110, 90:100] = 5.0 + k  # behind what the live map has
        poses = [np.eye(4), np.diag([1, 1, 1, 1 + (k >= 5)]).astype(np.float64)]
        found, shares = ours.apply(
            ["a", "b"], torch.from_numpy(depth).to(device), torch.from_numpy(np.stack([reference] * 2)).to(device),
            torch.from_numpy(np.stack([anchored] * 2)).to(device), poses,
            torch.full((2,), 0.05, dtype=torch.float64, device=device),
        )  # fmt: skip
        assert shares is not None
        for i, mask in enumerate(masks):
            wanted, share = mask.apply(depth[i], reference, poses[i], 0.025, anchored)
            np.testing.assert_array_equal(found[i].cpu().numpy(), wanted)
            assert shares[i].item() == pytest.approx(np.nan if share is None else share, nan_ok=True)
    assert shares.min() > 0


@pytest.mark.parametrize(
    ("engine", "changes", "fine"),
    [
        ("onnxruntime", {}, False), ("onnxruntime", {"provider": "cuda"}, True), ("torch", {}, False),
        ("inductor", {"device": "cuda:0"}, True), ("tensorrt", {}, True),
    ],
)  # fmt: skip
def test_a_configuration_with_map_and_depth_apart_is_refused(engine: str, changes: dict[str, str], fine: bool) -> None:
    from types import SimpleNamespace

    pytest.importorskip("omegaconf")
    from recon.config import _check_devices, option

    chosen = replace(option("engine", engine), **changes)
    fusion, depth = replace(option("fusion", "tsdf"), device="cuda"), option("depth", "da-mini")
    config: Any = SimpleNamespace(stages=["reconstruct"], fusion=fusion, depth=depth, engine=chosen)
    if fine:
        _check_devices(config)
    else:
        with pytest.raises(ReconError, match=r"fusion.device=cuda: .* on cpu"):
            _check_devices(config)
    _check_devices(SimpleNamespace(**vars(config) | {"depth": option("depth", "recorded")}))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_recorded_graph_gives_what_single_launches_give() -> None:
    """Every frame of a stream, the second of which records and the others replay; and a batch that lacks a camera."""
    from recon.geometry.views import Array
    from recon.live.device_align import DeviceAligner

    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 4, (3, 48, 64)).astype(np.float32)
    results: list[list[Array]] = []
    for graphs in (False, True):
        aligners = [ALL.aligner(name, "disparity", metric=True) for name in "abc"]
        ours, found = DeviceAligner(aligners[0], graphs), []
        for k in range(6):
            cameras = 2 if k == 4 else 3
            prediction = torch.from_numpy((1 / depth[:cameras] + 0.1 * k) / (1 + k)).to("cuda")
            maps = torch.from_numpy(depth[:cameras]).to("cuda")
            done = ours.update_all(aligners[:cameras], prediction, maps, [k] * cameras)
            found.append(np.array([(one.s, one.t) for one in done]))
        results.append(found)
    for alone, replayed in zip(*results, strict=True):
        np.testing.assert_allclose(replayed, alone, rtol=1e-9)
        assert np.isfinite(replayed).all()


def test_the_fits_wait_for_nothing() -> None:
    """What is recorded as a CUDA graph must not read values: none of its operations may bring one to the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from recon.live.device_align import _figures

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(call))
            return call(*args, **(kwargs or {}))

    depth = torch.rand(2, 48, 64) + 1
    known = torch.tensor([[float("nan"), float("nan"), 1], [1.0, 0.0, 2]], dtype=torch.float64)
    for kind, metric in (("disparity", True), ("relative", True), ("metric", True)):
        like = ALL.aligner("a", kind, metric)  # type: ignore[arg-type]
        _figures(like, 1 / depth, depth, known)  # fills caches, as the first call does
        with torch.inference_mode(), Watch():
            found = _figures(like, 1 / depth, depth, known)
        assert found.shape[0] == 2
    assert len(seen) > 30
    waits = ("local_scalar", "nonzero", "unique", "masked_select", "item", "index.Tensor_mask", "_to_copy.cpu")
    assert not [name for name in seen if any(word in name for word in waits)]


class Counting(torch.nn.Module):
    """Mean of the channels as depth: tells images and their order apart."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        return (pixel_values.mean(1),)


def session_of(batch: int) -> Any:
    from recon.engines.torch import TorchSession
    from recon.network import Network, TensorSpec

    shape = (batch, 3, 28, 42)
    network = Network(
        "counting", {"pixel_values": TensorSpec(shape)}, ("disparity",), f"none{batch}", Counting,
        lambda seed: {"pixel_values": torch.zeros(shape)},
    )  # fmt: skip
    return TorchSession(network, Counting())


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_images_on_a_device_give_the_depth_of_images_on_the_host(batch: int) -> None:
    """Whatever the engine takes at once: parts that it does not fill are filled up, and nothing of that comes back."""
    depth = DepthAnything(name="da-mini", architecture="mini", input_size=168)
    rng = np.random.default_rng(0)
    views = [View("", i, rng.integers(0, 255, (60, 80, 3), np.uint8)) for i in range(3)]
    one, all_at_once = session_of(1), session_of(batch)
    wanted = np.stack([depth.predict(view, one) for view in views])
    images = torch.from_numpy(np.stack([view.image for view in views]))
    np.testing.assert_allclose(depth.predict_all(views, images, all_at_once).numpy(), wanted, atol=1e-5)
    with DepthAnythingPool(
        lambda: session_of(batch), workers=2, predict=depth.predict, predict_all=depth.predict_all
    ) as p:
        assert (p.batch, p.device) == (batch, "cpu")
        parts = [future.result() for future in p.submit_images(views, images)]
    assert [part.views for part in parts] == {1: [1, 1, 1], 2: [2, 1], 4: [3]}[batch]
    assert all(part.error == "" and part.span.ms()[0] > 0 for part in parts)
    np.testing.assert_allclose(torch.cat([part.depth for part in parts]).numpy(), wanted, atol=1e-5)
    assert p.frames == 3


@DEVICE
def test_resize_on_a_device_is_within_a_grey_level_of_the_processors(device: str) -> None:
    from recon.depth.nets.images import IMAGE_STD, prepare, preprocess, resized
    from recon.geometry.preprocess import example_images

    images = torch.from_numpy(example_images(2, (160, 120), 0))
    wanted = preprocess(images.permute(0, 3, 1, 2), (98, 126))
    found = resized(images.to(device).permute(0, 3, 1, 2), (98, 126)).cpu()
    off = (found - wanted).abs() * torch.tensor(IMAGE_STD).reshape(3, 1, 1) * 255
    assert off.max() < 1.01
    assert (off > 0.5).float().mean() < 0.02
    same = (lambda a: a < 1e-6) if device == "cpu" else (lambda a: a < 1.01)
    assert same((prepare(images.to(device), (98, 126)).cpu() - wanted).abs().max())
