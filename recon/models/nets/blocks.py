"""The transformer block that the patch encoder, the trunk and the camera head of VGGT share.

A checkpoint holds parameters in the form they were trained in; `finish` methods turn them, once after loading, into the
form that is computed. Every fold is exact up to FP32 rounding, and is made in FP64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each [N,1,head channels / 2] FP32."""


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised and rotated queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_width, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_width, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None = None, across: bool = False) -> Tensor:
        """x [S,N,C] -> [S,N,C]. Each of the S sequences attends within itself, or with `across` to all S*N tokens.

        Normalisation and rotation are FP32 by design: their output is what may be cast down for the matrix products.
        """
        frames, tokens, width = x.shape
        q, k, v = (part.reshape(frames, tokens, self.heads, self.head_width) for part in self.qkv(x).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if across:
            q, k, v = (part.reshape(1, frames * tokens, self.heads, self.head_width) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # `finish` put the scale into the queries
        return self.proj(out.transpose(1, 2).reshape(frames, tokens, width))  # type: ignore[no-any-return]

    def finish(self, rotated: bool) -> None:
        """Fold the softmax scale into the queries and, where rotated, order head channels for one half-split rotation.

        Trained order is [y first halves, y second halves, x first halves, x second halves]; after it, both first halves
        lie in the lower and both second halves in the upper half of a head. Scores do not depend on a common order.
        """
        scale = self.head_width**-0.5
        if isinstance(self.q_norm, nn.LayerNorm):
            _scale_rows(self.q_norm, scale)
        else:
            width = self.heads * self.head_width
            factor = torch.ones(3 * width, dtype=torch.float64)
            factor[:width] = scale
            _scale_rows(self.qkv, factor)
        if rotated:
            quarters = torch.arange(self.head_width).chunk(4)
            order = torch.cat([quarters[i] for i in (0, 2, 1, 3)])
            heads = torch.arange(3 * self.heads * self.head_width).reshape(3, self.heads, self.head_width)
            heads[:2] = heads[:2, :, order]
            _take_rows(self.qkv, heads.flatten())
            _take_rows(self.q_norm, order)
            _take_rows(self.k_norm, order)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """One learned factor per channel: only storage, `Block.finish` folds it into the layer before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))


class Block(nn.Module):
    """Pre-norm transformer block. The residual stream `x` and both norms are FP32 by design."""

    def __init__(self, width: int, heads: int, eps: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1: nn.Module = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, 4 * width, width)
        self.ls2: nn.Module = LayerScale(width)

    def forward(self, x: Tensor, rotation: Rotation | None = None, across: bool = False) -> Tensor:
        """x [S,N,C] -> [S,N,C]; `rotation` and `across` as in `Attention`."""
        x = x + self.attn(self.norm1(x), rotation, across)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def finish(self, rotated: bool = False) -> None:
        """Fold LayerScale into the projections; the rest is `Attention.finish`."""
        self.attn.finish(rotated)
        for scale, linear in ((self.ls1, self.attn.proj), (self.ls2, self.mlp.fc2)):
            assert isinstance(scale, LayerScale), "finished twice"
            _scale_rows(linear, scale.gamma.double())
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position (Su et al. 2021): channel i of a head turns with channel i + half. x [S,N,heads,C] FP32."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotation_table(rows: int, columns: int, head_width: int, specials: int, base: float = 100.0) -> Rotation:
    """Axial 2-D rotation of one frame's tokens: cos and sin [specials + rows*columns, 1, head_width/2] FP32.

    The first half of the angles turns with the row, the second with the column, both counted from 1; special tokens
    stand at 0, which is no rotation. Angles are formed in FP64.
    """
    frequency = base ** (-torch.arange(head_width // 4, dtype=torch.float64) / (head_width // 4))
    grid = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).double()
    position = torch.cat([torch.zeros(specials, 2, dtype=torch.float64), grid])
    angle = (position[:, :, None] * frequency).flatten(1)[:, None]
    return angle.cos().float(), angle.sin().float()


def _scale_rows(layer: nn.Module, factor: Tensor | float) -> None:
    """Multiply the outputs of a layer: its rows and its bias."""
    for name, parameter in list(layer.named_parameters()):
        column = factor[:, None] if isinstance(factor, Tensor) and parameter.ndim == 2 else factor
        _replace(layer, name, (parameter.double() * column).to(parameter.dtype))


def _take_rows(layer: nn.Module, order: Tensor) -> None:
    """Reorder the outputs of a layer."""
    for name, parameter in list(layer.named_parameters()):
        _replace(layer, name, parameter[order])


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter rather than a change in place: the old one may be a file mapped into memory."""
    setattr(layer, name, nn.Parameter(value.detach().contiguous(), requires_grad=False))
