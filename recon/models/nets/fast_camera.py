"""The camera head, FP32 as ever, but bound by reading its weights instead of by launches.

Four iterations read 216 million weights each. They are stored in FP16 with one FP32 scale a row, the largest magnitude
of the row, which keeps eleven bits and halves the bytes; all arithmetic is FP32. Up to eight frames a block is seven
launches: through general products and one launch for each operation the head took 5 ms at eight frames. Layers that a
recipe makes FP8 are `recon.lowbit`'s own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.formats import Recipe
from recon.kernels import ops
from recon.lowbit.apply import linear_at, reach_of
from recon.lowbit.linear import Fp8Linear
from recon.models.nets.camera_head import POSE, CameraHead
from recon.models.nets.vggt import VGGT

HEAD = "camera_head"


class FastCamera(nn.Module):
    """Same function as the finished network's camera head; shares no memory with it."""

    empty: Tensor

    def __init__(self, network: VGGT, recipe: Recipe | None = None) -> None:
        super().__init__()
        head: CameraHead = network.camera_head
        self.iterations = head.iterations
        self.token_norm, self.trunk_norm = RowNorm(head.token_norm), RowNorm(head.trunk_norm)
        self.embed = row_layer(network, f"{HEAD}.embed_pose", recipe)
        self.modulation = row_layer(network, f"{HEAD}.poseLN_modulation.1", recipe)
        self.first = row_layer(network, f"{HEAD}.pose_branch.fc1", recipe)
        self.last = row_layer(network, f"{HEAD}.pose_branch.fc2", recipe)
        paths = [f"{HEAD}.trunk.{i}" for i in range(len(head.trunk))]
        self.trunk = nn.ModuleList(RowBlock(network, path, recipe) for path in paths)
        self.register_buffer("empty", head.empty_pose_tokens[0].detach().clone(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [S,2C] FP32 -> [S,9] FP32."""
        token = self.token_norm(tokens)
        plain = F.layer_norm(token, token.shape[-1:], eps=1e-6)
        pose: Tensor | None = None
        for _ in range(self.iterations):
            known = self.empty.expand(tokens.shape[0], POSE) if pose is None else pose
            shift, scale, gate = self.modulation(F.silu(self.embed(known))).chunk(3, -1)
            x = token + gate * (plain * (1 + scale) + shift)
            for block in self.trunk:
                x = block(x)
            change = self.last(self.first(self.trunk_norm(x), gelu=True))
            pose = change if pose is None else pose + change
        assert pose is not None
        return torch.cat([pose[:, :7], F.relu(pose[:, 7:])], -1)


class RowBlock(nn.Module):
    """A transformer block over a few rows."""

    def __init__(self, network: VGGT, path: str, recipe: Recipe | None) -> None:
        super().__init__()
        block: Any = network.get_submodule(path)
        self.heads = block.attn.heads
        self.norm1, self.norm2 = RowNorm(block.norm1), RowNorm(block.norm2)
        places = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        self.qkv, self.proj, self.fc1, self.fc2 = (row_layer(network, f"{path}.{at}", recipe) for at in places)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(ops.few_tokens_attention(self.qkv(self.norm1(x)), self.heads), addend=x)
        return self.fc2(self.fc1(self.norm2(x), gelu=True), addend=x)  # type: ignore[no-any-return]


def row_layer(network: VGGT, path: str, recipe: Recipe | None) -> RowProduct | LowRows | _Plain:
    """The layer at `path` in the form that the recipe, its shape and nothing else ask for."""
    layer = linear_at(network, path)
    if recipe is not None and path in recipe.layers:
        low = Fp8Linear(layer, recipe.weights[path], torch.float32, reach_of(recipe, path))
        return LowRows(path, low.to(layer.weight.device))  # a recipe may lie elsewhere
    return (_Plain if POSE in layer.weight.shape else RowProduct)(layer, path)


class LowRows(nn.Module):
    """An FP8 product; what follows it FP32."""

    def __init__(self, path: str, product: Fp8Linear) -> None:
        super().__init__()
        self.product, self.origin = product, (path,)

    def forward(self, a: Tensor, addend: Tensor | None = None, gelu: bool = False) -> Tensor:
        value: Tensor = self.product(a)
        value = F.gelu(value) if gelu else value
        return value if addend is None else value + addend


class RowProduct(nn.Module):
    """A product whose weight is FP16 with one scale a row; arithmetic FP32."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, path: str) -> None:
        super().__init__()
        assert layer.bias is not None
        self.origin = (path,)
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-30)
        self.register_buffer("weight", (weight / scale[:, None]).half(), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", layer.bias.detach().float().clone(), persistent=False)

    def forward(self, a: Tensor, addend: Tensor | None = None, gelu: bool = False) -> Tensor:
        return ops.few_rows(a, self.weight, self.scale, self.bias, addend, gelu)  # type: ignore[no-any-return]


class RowNorm(nn.Module):
    """LayerNorm, FP32 in and out."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", norm.bias.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, torch.float32)


class _Plain(nn.Module):
    """A product with nine rows or columns: too small to gain anything."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear, path: str) -> None:
        super().__init__()
        self.origin = (path,)
        self.register_buffer("weight", layer.weight.detach().float().clone(), persistent=False)
        self.register_buffer("bias", layer.bias.detach().float().clone(), persistent=False)

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.weight, self.bias)
