"""Kernels one by one on the shapes of VGGT-1B: time, rate and error against FP32 twins, beside the libraries' own.

    python benchmarks/kernels_gpu.py --out kernels.json [--only rows linear attention streaming] [--views 8 1]

Medians of replays of CUDA graphs. A kernel that does not build or run is a row too, which says why. Needs Triton.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import call_ms, host

from recon.kernels import launch, reference
from recon.kernels.launch import LinearTile

SCALE, LN2 = 1.4426950408889634 / 8, 0.6931471805599453
"""Queries of heads of 64 are stored times SCALE, so that exp2 makes the softmax; with LN2 the libraries agree."""
RECORD: dict[str, Any] = {}


def main() -> None:
    """Measure the chosen groups; the file is written after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["rows", "linear", "attention", "streaming"])
    parser.add_argument("--views", type=int, nargs="*", default=[8, 1])
    arguments = parser.parse_args()
    RECORD.update(host(), rows=[])
    torch.manual_seed(0)
    for views in arguments.views:
        for name in arguments.only:
            try:
                GROUPS[name](views, arguments.out)
            except Exception as error:  # one group must not take the others' results with it
                print(name, "failed:", type(error).__name__, str(error)[:300], flush=True)


def note(out: Path, group: str, label: str, call: Callable[[], Any], flop: float = 0, data: float = 0,
         error: Callable[[], float] | None = None) -> None:  # fmt: skip
    """Median of graph replays; a kernel that does not build or run is a row too."""
    row: dict[str, Any] = {"group": group, "label": label}
    try:
        call()
        torch.cuda.synchronize()
        row["error"] = error() if error else None
        row["ms"] = graph_time(call)
        row["tflops"], row["tbs"] = flop / row["ms"] / 1e9, data / row["ms"] / 1e9
        text = f"{row['ms'] * 1e3:9.1f} us {row['tflops']:7.0f} TF/s {row['tbs']:5.2f} TB/s err {row['error'] or 0:.1e}"
    except Exception as error_:
        row["failed"] = f"{type(error_).__name__}: {str(error_)[:200]}"
        text = row["failed"].replace("\n", " ")[:150]
    RECORD["rows"].append(row)
    out.write_text(json.dumps(RECORD, indent=1))
    print(f"{group:28s} {label:44s} {text}", flush=True)


def graph_time(call: Callable[[], Any], inner: int = 10, samples: int = 15) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph of `inner` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(inner):
                call()
        for _ in range(3):
            graph.replay()
        times = [call_ms(graph.replay) / inner for _ in range(samples)]
    return sorted(times)[len(times) // 2]


def rel(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def linear(views: int, out: Path) -> None:
    """The four products of a block: libraries, and the fused ones."""
    m, low, eight = 1374 * views, torch.bfloat16, torch.float8_e4m3fn
    for name, n, k in (("qkv", 3072, 1024), ("proj", 1024, 1024), ("fc1", 4096, 1024), ("fc2", 1024, 4096)):
        group, flop = f"{name} {m}x{n}x{k}", 2.0 * m * n * k
        a, w = torch.randn(m, k, device="cuda", dtype=low), torch.randn(n, k, device="cuda", dtype=low) / k**0.5
        b, one = torch.randn(n, device="cuda"), torch.ones((), device="cuda")
        bl, a8, w8 = b.bfloat16(), a.to(eight), (w * 64).to(eight)
        wanted = F.gelu((a8.float() @ w8.float().T) / 64 + b)
        note(out, group, "cublas bf16 + bias", partial(torch.addmm, bl, a, w.T), flop)
        scaled = partial(torch._scaled_mm, a8, w8.T, one, one, bias=bl, out_dtype=low, use_fast_accum=True)
        note(out, group, "cublas fp8 + bias", scaled, flop)
        if m > 16:
            ai = torch.randint(-99, 99, (m, k), device="cuda", dtype=torch.int8)
            note(out, group, "cublas int8", partial(torch._int_mm, ai, ai.new_ones(n, k).T), flop)
        if name != "fc1":
            continue
        activated = partial(torch._addmm_activation, bl, a, w.T, use_gelu=True)
        note(out, group, "cublas bf16 + bias + tanh gelu", activated, flop)
        target = torch.empty(m, n, device="cuda", dtype=eight)
        for tile in (launch.FUSED, LinearTile(128, 256, 128, 8, 3, 132)):
            call = partial(launch.linear, a8, w8, b, target, tile, gelu=True, scale=1 / 64)
            error = partial(lambda target, wanted: rel(target.float(), wanted), target, wanted)
            note(out, group, f"triton fp8 gelu {label(tile)}", call, flop, error=error)


def label(tile: Any) -> str:
    """The fields of a tile, in order, as the rows name it."""
    return "/".join(str(int(value)) for value in vars(tile).values())


@dataclass(frozen=True)
class Attention:
    """Attention of a VGGT block, heads of 64: inputs as the kernels and as the library take them, and FP32's answer.

    packed: [S,T,3072] 16 bit, query (scaled for exp2), key and value. parts: the same, [S,16,T,64] each. wanted: every
    fifth head of the first sequence. result: [S,T,1024], which the kernels write.
    """

    group: str
    flop: float
    packed: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    wanted: torch.Tensor
    result: torch.Tensor

    def error(self) -> float:
        """Relative error of what the kernels have written."""
        found = self.result.view(-1, self.result.shape[1], 16, 64)[: len(self.wanted), :, ::5]
        return rel(found.float(), self.wanted)

    def note(self, out: Path, label: str, kernel: Callable[..., None], scores: torch.Tensor | None = None) -> None:
        """The row of a kernel that takes query, key, value, result, columns, heads. scores: other queries and keys."""
        self.result.fill_(float("nan"))
        first = self.packed if scores is None else scores
        call = partial(kernel, first, first, self.packed, self.result, (0, 1024, 2048), 16)
        note(out, self.group, label, call, self.flop, error=self.error)


def attention(views: int, out: Path) -> None:
    """Attention within every frame and over all of them: the libraries', and both of ours."""
    frames = [("frame", views, 1374), ("global", 1, 1374 * views)]
    for name, sequences, tokens in frames if views > 1 else frames[:1]:
        case = attention_of(name, sequences, tokens)
        libraries(case, out)
        for bounded, m, n, warps, stages in (
            (True, 128, 64, 4, 3), (True, 64, 128, 4, 2), (False, 64, 64, 4, 4), (False, 64, 128, 4, 2),
        ):  # fmt: skip
            kernel = partial(launch.attention, bounded=bounded, m=m, n=n, warps=warps, stages=stages)
            case.note(out, f"triton {'bounded' if bounded else 'running'} {m}/{n}/{warps}/{stages}", kernel)
        specialised(case, ("bounded", "checked", "running"), out)
        low_scores(case, out)
        specialised(attention_of(name, sequences, tokens, torch.float16), ("anchored", "running"), out)


def attention_of(name: str, sequences: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Attention:
    """Random inputs, queries and keys normalised as the network's are."""
    group, flop = f"attention {name} {sequences}x{tokens}", 4.0 * sequences * 16 * tokens**2 * 64
    qkv = torch.randn(sequences, tokens, 3, 16, 64, device="cuda")
    q, k, v = F.layer_norm(qkv[:, :, 0], (64,)), F.layer_norm(qkv[:, :, 1], (64,)), qkv[:, :, 2]
    packed = torch.stack([q * SCALE, k, v], 2).to(dtype).reshape(sequences, tokens, 3072)
    parts = tuple(part.reshape(sequences, tokens, 16, 64).transpose(1, 2) for part in packed.chunk(3, -1))
    wanted = torch.cat([
        F.scaled_dot_product_attention(*(part[:1, h].float() for part in parts), scale=LN2)[:, :, None]
        for h in range(0, 16, 5)
    ], 2)  # fmt: skip
    result = torch.empty(sequences, tokens, 1024, device="cuda", dtype=dtype)
    return Attention(group, flop, packed, parts, wanted, result)


def libraries(case: Attention, out: Path) -> None:
    """PyTorch's own attention, by cuDNN and by FlashAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def library(backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(*case.parts, scale=LN2)

        note(out, case.group, backend.name.lower(), library, case.flop)


def specialised(case: Attention, forms: tuple[str, ...], out: Path) -> None:
    """Attention with specialised warps, without the second launch for rows that a form cannot hold."""
    marks = torch.empty(len(case.packed), 16, case.packed.shape[1], dtype=torch.uint8, device="cuda")
    for tile in (launch.WHOLE, launch.HALF):
        for form in forms:
            kernel = partial(launch.specialised_attention, tile=tile, form=form, marks=marks)
            case.note(out, f"gluon {form} {case.packed.dtype} {label(tile)}", kernel)


def low_scores(case: Attention, out: Path) -> None:
    """The same with scores from FP8 queries and keys."""
    balance = torch.tensor([SCALE**-0.5, SCALE**0.5], device="cuda").repeat_interleave(1024)
    scores = reference.cast(case.packed[..., :2048] * balance, torch.float8_e4m3fn)
    for tile in (launch.WHOLE, launch.HALF):
        kernel = partial(launch.specialised_attention, tile=tile, form="bounded")
        case.note(out, f"gluon bounded e4m3 scores {label(tile)}", kernel, scores)


def streaming(views: int, out: Path) -> None:
    """Attention of Depth Anything Small: six heads, which do not fill the card at one image."""
    group, flop = f"attention {views}x1370x6", 4.0 * views * 6 * 1370**2 * 64
    packed = torch.randn(views, 1370, 1152, device="cuda", dtype=torch.float16)
    result = torch.empty(views, 1370, 384, device="cuda", dtype=torch.float16)
    wanted = reference.attention(*packed.chunk(3, -1), 6, torch.float32)
    for m, n, warps, stages in (
        (64, 128, 4, 2), (64, 128, 8, 2), (64, 64, 4, 4), (64, 128, 8, 3), (64, 256, 8, 2), (64, 128, 4, 3)
    ):  # fmt: skip
        call = partial(
            launch.attention, packed, packed, packed, result, (0, 384, 768), 6, bounded=False, m=m, n=n, warps=warps,
            stages=stages,
        )  # fmt: skip
        note(out, group, f"triton running {m}/{n}/{warps}/{stages}", call, flop, error=lambda: rel(result, wanted))
    marks = torch.empty(views, 6, 1370, dtype=torch.uint8, device="cuda")
    for tile, form in ((launch.WHOLE, "running"), (launch.HALF, "anchored")):
        arguments = (packed, packed, packed, result, (0, 384, 768), 6, tile, form)
        call = partial(launch.specialised_attention, *arguments, marks=marks)
        note(out, group, f"gluon {form} {label(tile)}", call, flop, error=lambda: rel(result, wanted))
    call = partial(launch.split_attention, packed, packed, packed, result, (0, 384, 768), 6)
    note(out, group, "gluon split", call, flop, error=lambda: rel(result, wanted))


def rows(views: int, out: Path) -> None:
    """Row-wise kernels and the enlargement, against what the memory allows."""
    m, group, low, eight = 1374 * views, f"rows {1374 * views}", torch.bfloat16, torch.float8_e4m3fn
    x, w, b = torch.randn(m, 1024, device="cuda"), torch.randn(1024, device="cuda"), torch.randn(1024, device="cuda")
    wanted, change = F.layer_norm(x, (1024,), w, b, 1e-5), torch.zeros(m, 1024, device="cuda", dtype=low)
    qkv, h = torch.randn(m, 3072, device="cuda", dtype=low), torch.randn(m, 4096, device="cuda", dtype=low)
    for dtype in (low, eight):
        y, z = torch.empty(m, 1024, device="cuda", dtype=dtype), torch.empty(m, 4096, device="cuda", dtype=dtype)
        calls: list[tuple[str, Callable[[], None], int, Callable[[], float]]] = [
            ("layer_norm", partial(launch.layer_norm, x, w, b, 1e-5, y), m * 1024 * (4 + y.itemsize),
             lambda y=y: rel(y.float(), wanted)),
            ("add_layer_norm", partial(launch.add_layer_norm, x, [(change, None)], w, b, 1e-5, y),
             m * 1024 * (10 + y.itemsize), lambda y=y: rel(y.float(), wanted)),
            ("gelu", partial(launch.gelu, h, z), m * 4096 * (2 + z.itemsize),
             lambda z=z: rel(z.float(), F.gelu(h.float()))),
        ]  # fmt: skip
        for name, call, data, error in calls:
            note(out, group, f"{name} {dtype}", call, 0, data, error)
    rotation(qkv, group, out)
    enlargement(views, group, out)
    few_rows(views, group, out)


def rotation(qkv: torch.Tensor, group: str, out: Path) -> None:
    """Queries and keys of [T,3072] normalised and rotated by the angles of their places."""
    m, low = len(qkv), qkv.dtype
    weights, biases, angle = torch.randn(2, 64).cuda(), torch.randn(2, 64).cuda(), torch.rand(1374, 32).cuda() * 6
    qk, tables = torch.empty(m, 2048, device="cuda", dtype=low), (angle.cos(), angle.sin())
    turned = reference.qk_norm_rotate(qkv, weights, biases, *tables, 16, 1e-5, 1.0)
    call = partial(launch.qk_norm_rotate, qkv, weights, biases, *tables, qk, 16, 1e-5)
    note(out, group, "qk_norm_rotate", call, 0, m * 2048 * 4, lambda: rel(qk, turned))


def enlargement(views: int, group: str, out: Path) -> None:
    """The dense head's last enlargement, with the bias and the places' embedding that it adds."""
    low = torch.bfloat16
    bias, places = torch.randn(128).cuda(), (torch.randn(518, 128).cuda(), torch.randn(518, 128).cuda())
    image = torch.randn(views, 128, 296, 296, device="cuda", dtype=low).to(memory_format=torch.channels_last)
    large = torch.empty(views, 128, 518, 518, device="cuda", dtype=low).to(memory_format=torch.channels_last)
    full = reference.enlarge(image, 518, 518, bias, *places)
    call = partial(launch.enlarge, image, bias, *places, large)
    data = 2 * (image.numel() + large.numel())
    note(out, group, "enlarge 296 to 518, 128 channels", call, 0, data, lambda: rel(large, full))


def few_rows(views: int, group: str, out: Path) -> None:
    """The camera head's products, of one row a view, with weights in FP16."""
    for n, k in ((6144, 2048), (8192, 2048), (2048, 8192)):
        a, v, c = torch.randn(views, k).cuda(), torch.randn(n, k).cuda().half(), torch.randn(n).cuda()
        scale = torch.rand(n).cuda() / k**0.5
        few = torch.empty(views, n, device="cuda")
        exact = F.gelu(a.double() @ (v.double() * scale.double()[:, None]).T + c.double())
        call = partial(launch.few_rows, a, v, scale, c, None, few, True)
        note(out, group, f"few_rows {n}x{k}", call, 0, 2 * n * k, lambda few=few, exact=exact: rel(few, exact))


GROUPS = {"linear": linear, "attention": attention, "streaming": streaming, "rows": rows}

if __name__ == "__main__":
    main()
