"""Depth Anything V2 for inference: the same function as `DisparityNet`, in 16 bit where that does no harm.

FP32 stay the residual stream, every norm and softmax, all accumulation, and the last 1x1 convolution.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.depth.nets.depth_anything import DisparityNet
from recon.errors import ReconError
from recon.kernels import ops
from recon.kernels.graphs import Streams, allow_variants
from recon.kernels.transformer import BlockWeights, FastBlock, Norm, embedded, observe, patch_kernel

SPECIALS = 1  # the class token
EARLY_IMAGES = 2  # up to this many, which do not fill the card, the dense head starts beside the encoder


class FastDisparity(nn.Module):
    """Built from a DisparityNet, on the same device; shares no memory with it.

    dtype: of products, attention's operands and convolutions. compile: the dense head through torch.compile. FP8
    products of the transformer: `calibrate` on example inputs, then `quantise`.
    """

    kernel: Tensor
    offset: Tensor
    lead: Tensor
    last_weight: Tensor
    last_bias: Tensor

    def __init__(self, network: DisparityNet, dtype: torch.dtype = torch.float16, compile: bool = True) -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ReconError(f"fast network: dtype {dtype}", "torch.bfloat16 or torch.float16")
        backbone: Any = network.model.backbone
        self.grid, self.dtype, self.taps = network.grid, dtype, tuple(backbone.out_indices)
        self._embedding(backbone.embeddings)
        heads = backbone.config.num_attention_heads
        self.blocks = nn.ModuleList(FastBlock(block_weights(layer, heads), dtype) for layer in backbone.encoder.layer)
        norm = backbone.layernorm
        self.norm = Norm(norm.weight, norm.bias, norm.eps, None)
        low = {"dtype": dtype, "memory_format": torch.channels_last}
        self.neck = copy.deepcopy(network.model.neck).to(**low)  # type: ignore[arg-type]
        self.head = copy.deepcopy(network.model.head).to(**low)  # type: ignore[arg-type]
        last: Any = network.model.head.conv3
        self.register_buffer("last_weight", last.weight[0, :, 0, 0].detach().float().clone(), persistent=False)
        self.register_buffer("last_bias", last.bias.detach().float().clone(), persistent=False)
        self.largest = float(network.model.head.max_depth)
        convs = [layer.projection for layer in network.model.neck.fusion_stage.layers] + [network.model.head.conv1]
        for i, conv in enumerate(convs):
            self.register_buffer(f"bias{i}", conv.bias.detach().float().clone(), persistent=False)
        self.streams = Streams()
        self.level, self.fuse = self._level, self._fuse
        if compile:
            allow_variants()
            self.level = torch.compile(self._level, fullgraph=True, dynamic=False)
            self.fuse = torch.compile(self._fuse, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """As `DisparityNet.forward`: [N,3,H,W] FP32, normalised -> (disparity [N,H,W] FP32,)."""
        images, width = pixel_values.shape[0], self.lead.shape[-1]
        x = embedded(pixel_values, self.kernel, self.offset, self.lead, self.side)
        rows = x.view(-1, width)
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        normed = blocks[0].norm1(rows)
        early = x.is_cuda and images <= EARLY_IMAGES
        taps: list[Tensor] = []  # kept: another stream may read them
        levels: list[Tensor] = []
        for i, block in enumerate(blocks, 1):
            following = blocks[i].norm1 if i < len(blocks) else self.norm
            normed = block(rows, normed, following, images)
            if i in self.taps:
                norm = self.norm
                taps.append(ops.layer_norm(rows, norm.weight, norm.bias, norm.eps, self.dtype).view(images, -1, width))
                with self.streams.beside("dense", early):
                    levels.append(self.level(len(levels), taps[-1]))
        if early:
            self.streams.join("dense")
        return (self.fuse(levels),)

    def calibrate(self, pixel_values: Tensor) -> None:
        """Note the range of every product's input over example images; may be called again with more."""
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        observe(blocks, True)
        self(pixel_values)
        observe(blocks, False)

    def quantise(self) -> None:
        """After `calibrate`: the blocks' products to FP8, with the ranges seen."""
        for block in self.blocks:
            for product in block.products():  # type: ignore[operator, union-attr]
                product.quantise()

    def _embedding(self, embeddings: Any) -> None:
        conv = embeddings.patch_embeddings.projection
        positions = embeddings.static_positions
        self.side = conv.kernel_size[0]
        self.register_buffer("kernel", patch_kernel(conv.weight), persistent=False)
        self.register_buffer("offset", (positions[:, SPECIALS:] + conv.bias).detach().clone(), persistent=False)
        lead = embeddings.cls_token + positions[:, :SPECIALS]
        self.register_buffer("lead", lead.detach().clone(), persistent=False)

    def _level(self, index: int, tap: Tensor) -> Tensor:
        """A tap as far as it goes alone: projected, resized, and through the first unit of its fusion."""
        neck: Any = self.neck
        image = tap[:, SPECIALS:].reshape(-1, *self.grid, tap.shape[-1]).permute(0, 3, 1, 2)
        x: Tensor = neck.convs[index](neck.reassemble_stage.layers[index](image))
        return x if index == 3 else neck.fusion_stage.layers[3 - index].residual_layer1(x)  # type: ignore[no-any-return]

    def _fuse(self, levels: list[Tensor]) -> Tensor:
        x = levels[3]
        for i, fusion in enumerate(cast(Any, self.neck).fusion_stage.layers):
            level = 3 - i
            x = fusion.residual_layer2(x if i == 0 else x + levels[level])
            height, width = levels[level - 1].shape[2:] if level else (2 * x.shape[2], 2 * x.shape[3])
            # the 1x1 projection commutes with the resize, and costs a quarter before it
            x = ops.enlarge(F.conv2d(x, fusion.projection.weight), height, width, self.get_buffer(f"bias{i}"))
        head: Any = self.head
        x = F.conv2d(x, head.conv1.weight, padding=1)
        x = ops.enlarge(x, self.grid[0] * self.side, self.grid[1] * self.side, self.get_buffer("bias4"))
        x = F.relu(head.conv2(x)).float()
        return F.relu((x * self.last_weight[:, None, None]).sum(1) + self.last_bias) * self.largest


def block_weights(layer: Any, heads: int) -> BlockWeights:
    """A block of the backbone with its layer scales folded and the softmax scale in the queries."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not hasattr(layer.attention, "q_proj"):  # names of transformers before 5.20
        names = ("attention.query", "attention.key", "attention.value", "output.dense")
    q, k, v, o = (layer.attention.get_submodule(name) for name in names)
    scale = (q.weight.shape[0] // heads) ** -0.5
    first, second = layer.layer_scale1.lambda1, layer.layer_scale2.lambda1
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    return BlockWeights(
        (layer.norm1.weight, layer.norm1.bias),
        (torch.cat([q.weight * scale, k.weight, v.weight]), torch.cat([q.bias * scale, k.bias, v.bias])),
        (o.weight * first[:, None], o.bias * first),
        (layer.norm2.weight, layer.norm2.bias),
        (fc1.weight, fc1.bias),
        (fc2.weight * second[:, None], fc2.bias * second),
        heads,
        layer.norm1.eps,
    )
