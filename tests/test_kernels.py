"""Kernels and the fast networks built from them: torch twins against plain formulas, Triton against the twins (gpu)."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recon.depth.nets.depth_anything import build as build_depth
from recon.errors import ReconError
from recon.kernels import ops, reference
from recon.kernels.dense import DenseEnd
from recon.kernels.graphs import Streams
from recon.kernels.transformer import BlockWeights, FastBlock, Norm, Product, balanced, score_bound
from recon.models.nets.blocks import rotate, rotation_table
from recon.models.nets.config import PRESETS
from recon.models.nets.vggt import build

E4M3 = torch.float8_e4m3fn


def rel(found, wanted) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


# --- twins -----------------------------------------------------------------------------------------------------------


def test_cast_saturates_and_scales() -> None:
    value = torch.tensor([-1e4, -1.0, 0.0, 3.0, 1e4])
    assert reference.cast(value, E4M3, 2.0).float().tolist() == [-448, -2, 0, 6, 448]
    assert reference.cast(value, torch.float32).tolist() == value.tolist()


def test_add_layer_norm_is_both_and_keeps_the_sum() -> None:
    x, change, weight, bias = draw(5, 64), draw(5, 64, seed=1), draw(64, seed=2), draw(64, seed=3)
    total = x + change
    normed = reference.add_layer_norm(x, [(change, None)], weight, bias, 1e-6, torch.float32, 0.5)
    assert torch.equal(x, total)
    assert torch.allclose(normed, 0.5 * F.layer_norm(total, (64,), weight, bias, 1e-6))


def test_a_sum_that_is_not_stored_is_added_again_with_the_next() -> None:
    x, weight, bias, gain = draw(5, 64), draw(64, seed=2), draw(64, seed=3), draw(64, seed=6)
    before, first, second = x.clone(), (draw(5, 64, seed=4), gain), (draw(5, 64, seed=5), None)
    stepwise = x.clone()
    wanted = [reference.add_layer_norm(stepwise, [one], weight, bias, 1e-6, torch.float32) for one in (first, second)]
    settings = weight, bias, 1e-6, torch.float32
    assert torch.equal(ops.add_layer_norm(x, [first], *settings, store=False), wanted[0])
    assert torch.equal(x, before)
    assert torch.equal(ops.add_layer_norm(x, [first, second], *settings), wanted[1])
    assert torch.equal(x, stepwise)


def test_joined_layer_norm_drops_special_tokens() -> None:
    left, right, weight, bias = draw(2, 7, 8), draw(2, 7, 8, seed=1), draw(16, seed=2), draw(16, seed=3)
    wanted = F.layer_norm(torch.cat([left, right], -1), (16,), weight, bias, 1e-5)[:, 5:]
    assert torch.equal(reference.joined_layer_norm(left, right, weight, bias, 1e-5, torch.float32, 5), wanted)


def test_qk_norm_rotate_is_what_the_plain_network_does() -> None:
    heads, width, frames = 2, 16, 3
    cos, sin = rotation_table(2, 3, width, specials=5)
    qkv = draw(frames * 11, 3 * heads * width)
    weights, biases = draw(2, width, seed=1), draw(2, width, seed=2)
    q, k, _ = (part.reshape(frames, 11, heads, width) for part in qkv.chunk(3, -1))
    q, k = (
        rotate(F.layer_norm(part, (width,), weights[i], biases[i], 1e-5), (cos, sin)) for i, part in enumerate((q, k))
    )
    wanted = torch.cat([4 * q.reshape(33, -1), k.reshape(33, -1)], -1)
    found = reference.qk_norm_rotate(qkv, weights, biases, cos[:, 0], sin[:, 0], heads, 1e-5, 4.0)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_attention_weighs_by_powers_of_two() -> None:
    q, k, v = draw(2, 9, 32), draw(2, 9, 32, seed=1), draw(2, 9, 32, seed=2)
    found = reference.attention(q, k, v, 2, torch.float32, 3.0)
    for head in (slice(0, 16), slice(16, 32)):
        weights = 2 ** (q[..., head] @ k[..., head].mT)
        assert torch.allclose(found[..., head], 3 * weights @ v[..., head] / weights.sum(-1, keepdim=True), atol=1e-4)


def test_enlarge_puts_corners_on_corners() -> None:
    x, bias = draw(1, 4, 3, 5), draw(4, seed=1)
    found = ops.enlarge(x, 6, 9, bias)
    assert torch.allclose(found[0, :, 5, 8], x[0, :, 2, 4] + bias, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def dense_end(channels, middle, outputs, size, dtype=torch.float32, device="cpu"):
    """The end of a dense head with seeded weights, what it stands for in FP32, and a small image."""
    conv, last = nn.Conv2d(channels, middle, 3, padding=1), nn.Conv2d(middle, outputs, 1)
    for i, tensor in enumerate([*conv.parameters(), *last.parameters()]):
        tensor.data = draw(*tensor.shape, seed=i) / tensor[0].numel() ** 0.5
    conv, last, x = conv.to(device), last.to(device), draw(2, channels, 11, 13, seed=9, device=device)
    across, down = (draw(1, channels, *side, device=device) for side in ((1, size[1]), (size[0], 1)))
    offset = draw(channels, device=device)

    def plain(x):
        large = F.interpolate(x.float(), size, mode="bilinear", align_corners=True) + offset[:, None, None]
        return last(F.relu(conv(large + across + down)))

    return DenseEnd(conv, last, dtype, offset, across, down), plain, x.to(dtype)


@pytest.mark.parametrize("size", [(19, 23), (11, 13), (3, 7)])
def test_the_end_of_a_dense_head_is_a_convolution_of_the_enlarged_image(size) -> None:
    end, plain, x = dense_end(8, 6, 2, size)
    with torch.no_grad():
        wanted = plain(x)
    found = end(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    for edge in (found[..., 0, :] - wanted[..., 0, :], found[..., -1] - wanted[..., -1]):
        assert edge.abs().max() < 1e-5  # taps beyond the border do not count, in the tables neither


def test_few_rows_in_half_with_row_scales() -> None:
    a, weight, bias, addend = draw(3, 32), draw(16, 32, seed=1), draw(16, seed=2), draw(3, 16, seed=3)
    scale = weight.abs().amax(1)
    found = ops.few_rows(a, (weight / scale[:, None]).half(), scale, bias, addend, gelu=True)
    assert rel(found, F.gelu(a @ weight.T + bias) + addend) < 1e-3


def test_few_tokens_attention() -> None:
    qkv = draw(5, 3 * 32)
    q, k, v = (part.reshape(5, 2, 16).transpose(0, 1) for part in qkv.chunk(3, -1))
    wanted = (torch.softmax(q @ k.mT, -1) @ v).transpose(0, 1).reshape(5, 32)
    assert torch.allclose(ops.few_tokens_attention(qkv, 2), wanted, atol=1e-5)


def test_scores_may_be_multiplied_instead_of_queries() -> None:
    q, k, v = draw(2, 9, 32), draw(2, 9, 32, seed=1), draw(2, 9, 32, seed=2)
    wanted = reference.attention(0.3 * q, k, v, 2, torch.float32)
    found = ops.attention(q, k, v, 2, torch.float32, bounded=False, score_scale=0.3)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_gain_multiplies_what_is_added() -> None:
    x, change, gain, one = draw(5, 64), draw(5, 64, seed=1).bfloat16(), draw(64, seed=2), torch.ones(64)
    total = x + change.float() * gain
    ops.add_layer_norm(x, [(change, gain)], one, one, 1e-6, torch.float32)
    assert torch.equal(x, total)


# --- blocks and networks ---------------------------------------------------------------------------------------------


def test_the_bound_holds_for_the_worst_tokens() -> None:
    weights, biases = draw(2, 64).abs(), draw(2, 64, seed=1)
    bound = score_bound(weights, biases)
    tokens = F.layer_norm(torch.cat([draw(500, 64, seed=2), 50 * torch.eye(64)]), (64,))
    q, k = (tokens * weights[i] + biases[i] for i in range(2))
    assert float((q @ k.T).abs().max()) * math.log2(math.e) <= bound


def test_scores_without_a_safe_bound_take_the_running_form() -> None:
    def block(factor: float) -> FastBlock:
        pair = {name: (draw(size, 64), draw(size)) for name, size in {"qkv": 192, "proj": 64, "fc1": 256}.items()}
        norm = (torch.ones(64), torch.zeros(64))
        return FastBlock(
            BlockWeights(
                norm, [pair["qkv"]], pair["proj"], norm, pair["fc1"], (draw(64, 256), draw(64)), 1, 1e-5,
                (torch.full((2, 64), factor), torch.zeros(2, 64)),
            ),
            torch.bfloat16,
        )  # fmt: skip

    assert block(0.35).bounded  # trained and seeded norms of VGGT, with the softmax scale in the queries
    assert not block(3.0).bounded


def test_low_scores_use_the_range_of_their_type() -> None:
    weights = torch.stack([torch.full((64,), 0.125), torch.ones(64)])
    q, k = balanced(weights)
    assert q * k == pytest.approx(math.log2(math.e))
    assert 0.125 * q == pytest.approx(k)


def test_products_refuse_to_quantise_unseen() -> None:
    product = Product(draw(8, 16), draw(8), torch.bfloat16)
    with pytest.raises(ReconError, match="no input was observed"):
        product.quantise()


def test_quantised_product_is_close_and_its_norm_feeds_it() -> None:
    product = Product(draw(32, 64), draw(32, seed=1), torch.bfloat16)
    norm = Norm(torch.ones(64), torch.zeros(64), 1e-5, [product])
    x = draw(40, 64, seed=2)
    product.observing = True
    wanted = product(norm(x))
    product.observing = False
    product.quantise()
    low = norm(x)
    assert low.dtype == E4M3
    assert 400 < float(low.float().abs().max()) <= 448
    assert rel(product(low), wanted) < 5e-2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_fast_vggt_is_the_same_function(dtype, limit) -> None:
    network = build(PRESETS["vggt-twin"], ("camera", "depth", "points"), (56, 84), seed=0)
    images = torch.rand(3, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = network(images)
    errors = [rel(a, b) for a, b in zip(network.to_inference(dtype, compile=False)(images), wanted, strict=True)]
    assert max(errors) < limit
    assert min(errors) > 1e-5  # it is not the FP32 network


def test_fp8_vggt_is_calibrated_on_other_images() -> None:
    network = build(PRESETS["vggt-twin"], ("camera", "depth"), (56, 56), seed=0)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    others = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = network(images)
    fast = network.to_inference(torch.bfloat16, fp8=[others], compile=False)
    assert all(product.input_dtype == E4M3 for block in fast.blocks() for product in block.products())
    errors = [rel(a, b) for a, b in zip(fast(images), wanted, strict=True)]
    assert max(errors) < 8e-2


def test_frames_in_chunks_change_nothing(monkeypatch) -> None:
    from recon.models.nets import fast

    network = build(PRESETS["vggt-twin"], ("depth",), (56, 56), seed=0).to_inference(torch.float16, compile=False)
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    whole = network(images)
    monkeypatch.setattr(fast, "FRAMES_AT_ONCE", 2)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(network(images), whole, strict=True))


def test_fast_network_leaves_the_plain_one_alone() -> None:
    network = build(PRESETS["vggt-twin"], ("camera", "depth"), (56, 56), seed=0)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(images)
    network.to_inference(torch.float16, fp8=[images], compile=False)(images)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(network(images), before, strict=True))


def test_the_dense_head_traces_whole() -> None:
    network = build(PRESETS["vggt-twin"], ("depth",), (56, 84), seed=0).to_inference(torch.bfloat16, compile=False)
    head = network.dense["depth"]
    taps = [draw(2, 24, 128, seed=i).bfloat16() for i in range(4)]
    level = torch.compile(head._level, fullgraph=True, dynamic=False, backend="aot_eager")
    fuse = torch.compile(head._fuse, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        found = fuse([level(i, tap) for i, tap in enumerate(taps)])
        assert all(torch.equal(a, b) for a, b in zip(found, head(taps), strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_fast_depth_is_the_same_function(dtype, limit) -> None:
    network = build_depth((56, 84), seed=0, architecture="twin", folder=None)
    images = draw(2, 3, 56, 84)
    with torch.inference_mode():
        (wanted,) = network(images)
    assert 1e-5 < rel(network.to_inference(dtype, compile=False)(images)[0], wanted) < limit
    assert rel(network.to_inference(dtype, fp8=[draw(2, 3, 56, 84, seed=1)], compile=False)(images)[0], wanted) < 5e-2


def test_odd_dtypes_are_refused() -> None:
    network = build(PRESETS["vggt-twin"], ("camera",), (56, 56), seed=0)
    with pytest.raises(ReconError, match="float64"):
        network.to_inference(torch.float64)


# --- streams ---------------------------------------------------------------------------------------------------------


class FakeStream:
    """Notes who waits for whom; `captured` are the streams that a capture has reached, as CUDA follows them."""

    current: "FakeStream"

    def __init__(self) -> None:
        self.captured, self.waiting = False, set[FakeStream]()

    def wait_stream(self, other: "FakeStream") -> None:
        if self.captured and not other.captured:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        self.captured = self.captured or other.captured
        self.waiting.add(other)


@contextmanager
def on_stream(stream):
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream.current)
    FakeStream.current = FakeStream()
    return FakeStream.current


def run_of(streams: Streams, main: FakeStream, views: int) -> None:
    """The forks and joins of `FastVGGT.forward`, under capture: by CUDA's rules no stream may be left behind."""
    main.captured = True
    early, entered = views <= 2, []
    streams.begin()
    for _ in range(4):
        with streams.beside("dense", early):
            entered.append(FakeStream.current)
    with streams.beside("camera", True):
        entered.append(FakeStream.current)
    main.waiting.clear()
    streams.join("dense")
    streams.join("camera")
    assert {stream for stream in entered if stream is not main} == main.waiting
    for stream in (main, *streams._streams.values()):
        stream.captured = False  # the capture ends


def test_graphs_of_many_views_after_few_wait_for_no_idle_stream(fake_cuda) -> None:
    streams = Streams()
    for views in (1, 9, 2, 64):
        run_of(streams, fake_cuda, views)


def test_a_run_that_failed_leaves_nothing_to_wait_for(fake_cuda) -> None:
    streams = Streams()
    with streams.beside("dense", True):
        pass  # and here it ended with an error
    run_of(streams, fake_cuda, 9)


def test_a_stream_that_took_no_part_would_end_a_capture(fake_cuda) -> None:
    """The fault that was repaired, to see that the stand-in above knows it."""
    idle, fake_cuda.captured = FakeStream(), True
    with pytest.raises(RuntimeError, match="uncaptured"):
        fake_cuda.wait_stream(idle)


# --- Triton ----------------------------------------------------------------------------------------------------------

cuda = pytest.mark.gpu


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, E4M3])
@pytest.mark.parametrize("width", [384, 1024])
def test_layer_norms_on_the_gpu(dtype, width) -> None:
    x, change = draw(37, width, device="cuda"), draw(37, width, seed=1, device="cuda").bfloat16()
    weight, bias = draw(width, seed=2, device="cuda"), draw(width, seed=3, device="cuda")
    limit = 4e-2 if dtype == E4M3 else 4e-3
    wanted = reference.layer_norm(x, weight, bias, 1e-6, torch.float32, 3.0)
    assert rel(ops.layer_norm(x, weight, bias, 1e-6, dtype, 3.0).float(), wanted) < limit
    gain, other = draw(width, seed=4, device="cuda"), draw(37, width, seed=5, device="cuda").bfloat16()
    for changes in (
        [(change, None)],
        [(change, gain)],
        [(change, gain), (other, None)],
        [(change, None), (other, gain)],
    ):
        for store in (True, False):
            y, z = x.clone(), x.clone()
            wanted = reference.add_layer_norm(y, changes, weight, bias, 1e-6, torch.float32, 3.0, store)
            found = ops.add_layer_norm(z, changes, weight, bias, 1e-6, dtype, 3.0, store)
            assert rel(found.float(), wanted) < limit
            assert rel(z, y) < 1e-6
            assert torch.equal(z, x) is not store
    pair = (draw(2, 9, width, device="cuda"), draw(2, 9, width, seed=1, device="cuda"))
    weight, bias = draw(2 * width, seed=2, device="cuda"), draw(2 * width, seed=3, device="cuda")
    wanted = reference.joined_layer_norm(*pair, weight, bias, 1e-5, torch.float32, 5)
    assert rel(ops.joined_layer_norm(*pair, weight, bias, 1e-5, dtype, 5).float(), wanted) < limit


@cuda
@pytest.mark.parametrize("heads", [6, 16])
def test_qk_norm_rotate_on_the_gpu(heads) -> None:
    angle = draw(11, 32, device="cuda")
    tables = angle.cos(), angle.sin()
    qkv = draw(33, 192 * heads, device="cuda").bfloat16()
    settings = (draw(2, 64, seed=1, device="cuda"), draw(2, 64, seed=2, device="cuda"), *tables, heads, 1e-5, 1.44)
    assert rel(ops.qk_norm_rotate(qkv, *settings), reference.qk_norm_rotate(qkv, *settings)) < 1e-3


@cuda
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(("sequences", "tokens", "heads"), [(8, 1374, 16), (1, 1370, 6), (1, 5000, 16), (3, 100, 2)])
def test_attention_on_the_gpu(bounded, sequences, tokens, heads) -> None:
    qkv = draw(sequences, tokens, 3, heads, 64, device="cuda")
    qkv[:, :, :2] = F.layer_norm(qkv[:, :, :2], (64,))
    qkv[:, :, 0] *= math.log2(math.e) / 8
    q, k, v = qkv.reshape(sequences, tokens, -1).bfloat16().chunk(3, -1)
    found = ops.attention(q, k, v, heads, torch.bfloat16, bounded=bounded)
    assert rel(found, reference.attention(q, k, v, heads, torch.float32)) < 5e-3
    low = [reference.cast(part, E4M3, scale) for part, scale in ((q, 2.0), (k, 0.5))]
    found = ops.attention(*low, v, heads, torch.bfloat16, bounded=bounded)
    assert rel(found, reference.attention(*low, v, heads, torch.float32)) < (2e-2 if bounded else 5e-3)
    found = ops.attention(*low, torch.ones_like(v), heads, torch.bfloat16, bounded=bounded)
    assert abs(float(found.double().mean()) - 1) < 5e-4  # weights over their sum, without the keys past the end
    if not bounded:
        found = ops.attention(q, k, v, heads, torch.bfloat16, bounded=False, score_scale=0.7)
        assert rel(found, reference.attention(q, k, v, heads, torch.float32, 1.0, 0.7)) < 5e-3


@cuda
@pytest.mark.parametrize(
    ("form", "dtype", "low"),
    [
        ("bounded", torch.bfloat16, False), ("bounded", torch.bfloat16, True), ("running", torch.bfloat16, True),
        ("running", torch.float16, False), ("checked", torch.bfloat16, False), ("anchored", torch.float16, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("sequences", "tokens"), [(2, 1374), (1, 64), (1, 192), (7, 2000), (200, 100)])
def test_forms_and_tiles_of_specialised_attention_on_the_gpu(form, dtype, low, sequences, tokens) -> None:
    from recon.kernels import launch

    qkv = draw(sequences, tokens, 3, 16, 64, device="cuda")
    qkv[:, :, :2] = F.layer_norm(qkv[:, :, :2], (64,)) * (math.log2(math.e) / 8) ** 0.5
    q, k, v = qkv.reshape(sequences, tokens, -1).to(dtype).chunk(3, -1)
    if low:
        q, k = reference.cast(q, E4M3), reference.cast(k, E4M3)
    wanted = reference.attention(q, k, v, 16, torch.float32)
    for tile in (launch.WHOLE, launch.HALF):
        for _ in range(3):  # a race would not show every time
            out = torch.full((sequences, tokens, 1024), float("nan"), dtype=dtype, device="cuda")
            marks = torch.full((sequences, 16, tokens), 7, dtype=torch.uint8, device="cuda")
            launch.specialised_attention(q, k, v, out, (0, 0, 0), 16, tile, form, marks=marks)
            assert rel(out, wanted) < (2e-2 if low and form == "bounded" else 1e-3 if dtype == torch.float16 else 5e-3)
            assert bool((marks == (0 if form in ("checked", "anchored") else 7)).all())


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [129, 300, 385, 1370, 1536])
def test_keys_divided_among_two_warpgroups_on_the_gpu(tokens, dtype) -> None:
    from recon.kernels import launch

    qkv = draw(2, tokens, 3, 6, 64, device="cuda")
    qkv[0, ::7, 0] *= 6  # scores of a hundred
    qkv[1, 5, 1] *= 9  # one key with the largest score of most rows, in one half
    q, k, v = qkv.reshape(2, tokens, -1).to(dtype).chunk(3, -1)
    for scale in (1.0, 0.7):
        for out_dtype, out_scale in ((dtype, 1.0), (E4M3, 8.0)):
            wanted = reference.attention(q, k, v, 6, torch.float32, out_scale, scale)
            for _ in range(3):  # a race would not show every time
                out = torch.full((2, tokens, 384), float("nan"), device="cuda").to(out_dtype)
                launch.split_attention(q, k, v, out, (0, 0, 0), 6, out_scale, scale)
                assert rel(out.float(), wanted.clamp(-448, 448)) < (4e-2 if out_dtype == E4M3 else 5e-3)


@cuda
@pytest.mark.parametrize("score_scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_their_type_cannot_hold_are_done_again_on_the_gpu(dtype, score_scale) -> None:
    from recon.kernels import launch

    qkv = draw(8, 1374, 3, 16, 64, device="cuda")
    qkv[2, 100:900:7, 0] *= 40  # scores of hundreds, as powers of two
    qkv[5, :, 1, 3] += 60 * qkv[5, :1, 1, 3]  # all scores of a row far from zero, on either side
    q, k, v = qkv.reshape(8, 1374, -1).to(dtype).chunk(3, -1)
    found = ops.attention(q, k, v, 16, dtype, bounded=False, score_scale=score_scale)
    wanted = reference.attention(q, k, v, 16, torch.float32, 1.0, score_scale)
    assert rel(found, wanted) < (1e-3 if dtype == torch.float16 else 5e-3)
    marks = torch.full((8, 16, 1374), 7, dtype=torch.uint8, device="cuda")
    form = "checked" if dtype == torch.bfloat16 else "anchored"
    launch.specialised_attention(q, k, v, found, (0, 0, 0), 16, launch.HALF, form, 1.0, score_scale, marks)
    assert marks[2, :, 100:900:7].sum() > 0
    assert (marks[5, 3].float().mean() > 0.5) == (form == "checked")  # where all are far from zero, the first are, too
    if form == "checked":
        assert marks[[0, 1, 3, 4, 6, 7]].sum() == 0
    else:  # scores of 60 lie 20 above the first block's in a few rows
        assert marks[[0, 1, 3, 4, 6, 7]].float().mean() < 0.02


@cuda
def test_gelu_and_fused_product_on_the_gpu() -> None:
    x = 4 * draw(100, 384, device="cuda").bfloat16()
    assert rel(ops.gelu(x, torch.bfloat16, 2.0), reference.gelu(x, torch.float32, 2.0)) < 4e-3
    a, w, bias = draw(5000, 1024, device="cuda"), draw(512, 1024, seed=1, device="cuda"), draw(512, device="cuda")
    a8, w8 = reference.cast(a, E4M3, 50.0), reference.cast(w, E4M3, 50.0)
    wanted = reference.gelu(a8.float() @ w8.float().T / 2500 / 32 + bias, torch.float32, 7.0)
    found = ops.linear_gelu(a8, w8, bias, 1 / 2500 / 32, E4M3, 7.0)
    assert rel(found.float(), wanted) < 4e-2


@cuda
@pytest.mark.parametrize(("n", "limit"), [(96, 1e-6), (4096, 2e-5)])  # the second goes through the tensor cores
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows_on_the_gpu(rows, n, limit) -> None:
    a, weight, bias = draw(rows, 2048, device="cuda"), draw(n, 2048, seed=1, device="cuda"), draw(n, device="cuda")
    addend, scale = draw(rows, n, seed=2, device="cuda"), weight.abs().amax(1)
    half = (weight / scale[:, None]).half()
    wanted = F.gelu(a.double() @ (half.double() * scale.double()[:, None]).T + bias.double()) + addend.double()
    assert rel(ops.few_rows(a, half, scale, bias, addend, gelu=True), wanted) < limit
    qkv = draw(rows, 3 * 256, device="cuda")
    assert rel(ops.few_tokens_attention(qkv, 2), reference.few_tokens_attention(qkv.cpu(), 2).cuda()) < 1e-5


@cuda
@pytest.mark.parametrize("channels", [32, 128])
def test_enlarge_on_the_gpu(channels) -> None:
    x = draw(2, channels, 19, 23, device="cuda").half()
    bias = draw(channels, device="cuda")
    assert rel(ops.enlarge(x, 37, 41, bias), reference.enlarge(x, 37, 41, bias)) < 1e-3


@cuda
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("middle", "outputs", "size"), [(32, 2, (37, 75)), (32, 4, (19, 130)), (24, 1, (70, 64))])
def test_the_end_of_a_dense_head_on_the_gpu(middle, outputs, size, dtype, limit) -> None:
    end, plain, x = dense_end(64, middle, outputs, size, dtype, "cuda")
    x = x.to(memory_format=torch.channels_last)
    wide = ops.enlarge(x, x.shape[2], size[1], end.offset)
    parts = F.conv2d(wide, end.taps, padding=(0, 1))
    twin = reference.enlarged_taps(parts, end.across, end.down, end.weight, end.bias)
    found = ops.enlarged_taps(parts, end.across, end.down, end.weight, end.bias)
    assert rel(found, twin) < 1e-3  # the twin's last convolution is TF32
    with torch.no_grad():
        assert rel(end(x), plain(x)) < limit


@cuda
@pytest.mark.parametrize("views", [1, 3])
def test_fast_vggt_as_a_graph_on_the_gpu(views) -> None:
    from recon.kernels.graphs import Captured

    network = build(PRESETS["vggt-mini"], ("camera", "depth"), (112, 112), seed=0).cuda()
    images = torch.rand(views, 3, 112, 112, device="cuda")
    with torch.inference_mode():
        wanted = network(images)
    captured = Captured(network.to_inference(torch.float16, compile=False), torch.rand_like(images))
    for _ in range(3):
        errors = [rel(a, b) for a, b in zip(captured(images), wanted, strict=True)]
        assert max(errors) < 1e-2


@cuda
def test_counts_of_views_follow_each_other_on_the_gpu() -> None:
    from recon.kernels.graphs import Captured

    fast = build(PRESETS["vggt-mini"], ("camera", "depth"), (112, 112), seed=0).cuda().to_inference(compile=False)
    for views in (1, 9, 2):  # few use a stream that many must not wait for
        images = torch.rand(views, 3, 112, 112, device="cuda")
        assert all(torch.isfinite(output).all() for output in Captured(fast, images)(images))
