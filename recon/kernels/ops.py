"""The operations of the fast networks: a Triton kernel on CUDA, its torch twin elsewhere. No autograd.

Products and attention are operators of torch (`recon::...`), so that `record.Recorder` sees them and their operands.

Nothing switches silently: which kernel a CUDA tensor takes depends on its shape and type alone, and shapes that no
kernel takes raise. Where attention's first kernel cannot hold a row's scores, a second one does that row again.
Import of this module needs torch alone; Triton is imported at the first call on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.kernels import reference
from recon.kernels.reference import Change

HEAD = 64
FEW = 8


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """x [rows, width] -> LayerNorm(x) * scale [rows, width] in dtype (FP32, 16 bit or E4M3, saturated)."""
    if not x.is_cuda:
        return reference.layer_norm(x, weight, bias, eps, dtype, scale)
    out = x.new_empty(x.shape, dtype=dtype)
    _launch().layer_norm(x, weight, bias, eps, out, scale)
    return out


def add_layer_norm(
    x: Tensor, changes: Sequence[Change], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    scale: float = 1.0, store: bool = True,
) -> Tensor:  # fmt: skip
    """LayerNorm(x + changes) * scale in dtype: one pass over x [rows, width] FP32, which becomes the sum if `store`.

    changes: one or two pairs of a change [rows, width] and the gain [width] it is multiplied by, or None.
    """
    if not x.is_cuda:
        return reference.add_layer_norm(x, changes, weight, bias, eps, dtype, scale, store)
    out = x.new_empty(x.shape, dtype=dtype)
    _launch().add_layer_norm(x, changes, weight, bias, eps, out, scale, store)
    return out


def joined_layer_norm(
    left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, skipped: int
) -> Tensor:
    """left, right [sequences, tokens, width] FP32 -> [sequences, tokens - skipped, 2 * width] in dtype."""
    if not left.is_cuda:
        return reference.joined_layer_norm(left, right, weight, bias, eps, dtype, skipped)
    sequences, tokens, width = left.shape
    out = left.new_empty(sequences, tokens - skipped, 2 * width, dtype=dtype)
    _launch().joined_layer_norm(left, right, weight, bias, eps, out, skipped)
    return out


def qk_norm_rotate(
    qkv: Tensor, weights: Tensor, biases: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, q_scale: float,
    k_scale: float = 1.0, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """qkv [rows, 3C] -> normalised and rotated queries and keys [rows, 2C] in dtype (qkv's); tables as the twin."""
    dtype = dtype or qkv.dtype
    if not qkv.is_cuda:
        return reference.qk_norm_rotate(qkv, weights, biases, cos, sin, heads, eps, q_scale, k_scale, dtype)
    _require_head(qkv.shape[1] // 3, heads)
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3 * 2, dtype=dtype)
    _launch().qk_norm_rotate(qkv, weights, biases, cos, sin, out, heads, eps, q_scale, k_scale)
    return out


def gelu(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """GELU(x) * scale in dtype, same shape."""
    if not x.is_cuda:
        return reference.gelu(x, dtype, scale)
    out = torch.empty_like(x, dtype=dtype)
    _launch().gelu(x, out, scale)
    return out


@torch.library.custom_op("recon::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, dtype: torch.dtype, *, bounded: bool, scale: float = 1.0,
    score_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """q, k, v [sequences, tokens, C], rows of any stride; weights 2^(q.k * score_scale) / sum -> [sequences, tokens, C]
    in dtype.

    bounded: the caller knows that no score exceeds what the operands' type can hold as a power of two (110 in BF16,
    14 in FP16), which saves the running maximum; score_scale is 1 then. q and k may be E4M3 beside a 16-bit v.
    """
    assert score_scale == 1 or not bounded, "normalised queries take the factor with them"
    if not q.is_cuda:
        return reference.attention(q, k, v, heads, dtype, scale, score_scale)
    _require_head(q.shape[2], heads)
    out = q.new_empty(q.shape, dtype=dtype)
    _launch().attend(q, k, v, out, heads, bounded, scale, score_scale)
    return out


@torch.library.custom_op("recon::linear_gelu", mutates_args=())
def linear_gelu(a: Tensor, weight: Tensor, bias: Tensor, scale: float, dtype: torch.dtype, out_scale: float) -> Tensor:
    """GELU(a [M,K] x weight [N,K]^T * scale + bias) * out_scale in dtype: an 8-bit product that gives 8 bit."""
    if not a.is_cuda:
        one, factor = torch.ones(()), torch.tensor(scale)
        product = torch._scaled_mm(a, weight.t(), one, factor, out_dtype=torch.float32)
        return reference.gelu(product + bias, dtype, out_scale)
    out = a.new_empty(a.shape[0], weight.shape[0], dtype=dtype)
    launch = _launch()
    launch.linear(a, weight, bias, out, launch.FUSED, gelu=True, scale=scale, out_scale=out_scale)
    return out


@torch.library.custom_op("recon::enlarge", mutates_args=())
def enlarge(x: Tensor, height: int, width: int, bias: Tensor) -> Tensor:
    """x [n,C,h,w] -> bilinear [n,C,height,width] channels last, + bias; one operator to torch.compile."""
    if not x.is_cuda:
        return reference.enlarge(x, height, width, bias)
    x = x.contiguous(memory_format=torch.channels_last)
    out = _enlarged(x, height, width)
    _launch().enlarge(x, bias, out)
    return out


@enlarge.register_fake
def _(x: Tensor, height: int, width: int, bias: Tensor) -> Tensor:
    return _enlarged(x, height, width)


@torch.library.custom_op("recon::enlarged_taps", mutates_args=())
def enlarged_taps(parts: Tensor, across: Tensor, down: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The end of a dense head from what the rows of its 3x3 convolution make of a low image, in FP32: see the twin.

    parts [n,3*C or more,h,W] -> [n,outputs,H,W].
    """
    if not parts.is_cuda:
        return reference.enlarged_taps(parts, across, down, weight, bias)
    out = weight.new_empty(parts.shape[0], weight.shape[0], down.shape[1], across.shape[1])
    _launch().enlarged_taps(parts.contiguous(memory_format=torch.channels_last), across, down, weight, bias, out)
    return out


@enlarged_taps.register_fake
def _(parts: Tensor, across: Tensor, down: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight.new_empty(parts.shape[0], weight.shape[0], down.shape[1], across.shape[1])


@torch.library.custom_op("recon::few_rows", mutates_args=())
def few_rows(
    a: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, addend: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """FP32 product with a weight [N,K] in FP16 of one FP32 scale a row; GELU, then addend.

    Up to 8 rows it costs little more than reading the weight; more rows go through a general product.
    """
    if not a.is_cuda or a.shape[0] > FEW:
        return reference.few_rows(a, weight, scale, bias, addend, gelu)
    if weight.shape[0] % 16 or weight.shape[1] % 64:
        raise ReconError(f"few_rows: weight {tuple(weight.shape)}", "rows must divide by 16 and columns by 64")
    out = a.new_empty(a.shape[0], weight.shape[0])
    _launch().few_rows(a.contiguous(), weight, scale, bias, addend, out, gelu)
    return out


@torch.library.custom_op("recon::few_tokens_attention", mutates_args=())
def few_tokens_attention(qkv: Tensor, heads: int) -> Tensor:
    """FP32 attention over one short sequence: qkv [rows, 3C], queries scaled -> [rows, C]; fast up to 8 rows."""
    if not qkv.is_cuda or qkv.shape[0] > FEW:
        return reference.few_tokens_attention(qkv, heads)
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    _launch().few_tokens_attention(qkv, out, heads)
    return out


def _enlarged(x: Tensor, height: int, width: int) -> Tensor:
    shape = (x.shape[0], x.shape[1], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _require_head(width: int, heads: int) -> None:
    if width != heads * HEAD:
        raise ReconError(
            f"fast network on CUDA: heads of {width // heads} channels, and the kernels are for {HEAD}",
            "run this network as it is (without to_inference), or on the CPU",
        )


def _launch() -> ModuleType:
    from recon.kernels import launch

    return launch
