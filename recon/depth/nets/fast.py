"""Depth Anything V2 for inference: the same function as `DisparityNet`, in 16 bit where that does no harm.

FP32 stay the residual stream, every norm and softmax, all accumulation, and the last 1x1 convolution. In 16 bit, query,
key and value are one product, and layer scales and softmax scale are folded into weights. FP8 layers of a recipe keep
the codes that its tool chose: query, key and value are three products, and the scales are multiplied in later.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

from recon.depth.nets.depth_anything import DisparityNet
from recon.errors import ReconError
from recon.formats import Recipe
from recon.kernels import ops
from recon.kernels.dense import DenseEnd
from recon.kernels.form import FastNetwork
from recon.kernels.graphs import Streams, allow_variants
from recon.kernels.transformer import BlockWeights, FastBlock, Norm, embedded, observe, patch_kernel
from recon.lowbit.apply import linear_at
from recon.lowbit.fast import low_of, skeleton_recipe

SPECIALS = 1  # the class token
EARLY_IMAGES = 2  # up to this many, which do not fill the card, the dense head starts beside the encoder


class FastDisparity(FastNetwork):
    """Built from a DisparityNet, on the same device; shares no memory with it.

    dtype: of products, attention's operands and convolutions. recipe: which layers are FP8. compile: the dense head
    through torch.compile. FP8 without a recipe: `calibrate` on example inputs, then `quantise`.
    """

    family: ClassVar[str] = "depth-anything"
    full: ClassVar[tuple[str, ...]] = ("model.head.conv3",)

    kernel: Tensor
    offset: Tensor
    lead: Tensor

    def __init__(
        self,
        network: DisparityNet,
        dtype: torch.dtype = torch.float16,
        compile: bool = True,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ReconError(f"fast network: dtype {dtype}", "torch.bfloat16 or torch.float16")
        backbone: Any = network.model.backbone
        self.grid, self.dtype, self.taps = network.grid, dtype, tuple(backbone.out_indices)
        self._embedding(backbone.embeddings)
        self.config = json.loads(network.model.config.to_json_string(use_diff=False))
        self.fp8 = sorted(recipe.layers) if recipe is not None else []
        paths = [f"model.backbone.encoder.layer.{i}" for i in range(len(backbone.encoder.layer))]
        self.blocks = nn.ModuleList(FastBlock(block_weights(network, path, recipe), dtype) for path in paths)
        norm = backbone.layernorm
        self.norm = Norm(norm.weight, norm.bias, norm.eps)
        low = {"dtype": dtype, "memory_format": torch.channels_last}
        self.neck = copy.deepcopy(network.model.neck).to(**low)  # type: ignore[arg-type]
        head: Any = network.model.head
        self.conv1 = copy.deepcopy(head.conv1).to(**low)
        none = head.conv1.bias.new_zeros(1, head.conv1.out_channels, *(side * self.side for side in self.grid))
        self.end = DenseEnd(head.conv2, head.conv3, dtype, head.conv1.bias, none[:, :, :1], none[..., :1])
        self.largest = float(head.max_depth)
        for i, layer in enumerate(network.model.neck.fusion_stage.layers):
            self.register_buffer(f"bias{i}", layer.projection.bias.detach().float().clone(), persistent=False)
        self.streams = Streams()
        self.level, self.fuse = self._level, self._fuse
        if compile:
            self.compile_dense()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """As `DisparityNet.forward`: [N,3,H,W] FP32, normalised -> (disparity [N,H,W] FP32,)."""
        images, width = pixel_values.shape[0], self.lead.shape[-1]
        x = embedded(pixel_values, self.kernel, self.offset, self.lead, self.side)
        rows = x.view(-1, width)
        blocks: list[FastBlock] = list(self.blocks)  # type: ignore[arg-type]
        normed = blocks[0].norm1(rows)
        early = x.is_cuda and images <= EARLY_IMAGES
        self.streams.begin()
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
        self.streams.join("dense")
        return (self.fuse(levels),)

    def settings(self) -> dict[str, Any]:
        """What `skeleton` takes."""
        size, dtype = [side * self.side for side in self.grid], str(self.dtype).removeprefix("torch.")
        return {"config": self.config, "size": size, "dtype": dtype, "fp8": self.fp8}

    def compile_dense(self) -> None:
        """From now on the dense head runs through torch.compile."""
        allow_variants()
        self.level = torch.compile(self._level, fullgraph=True, dynamic=False)
        self.fuse = torch.compile(self._fuse, fullgraph=True, dynamic=False)

    def dense_origins(self) -> dict[str, str]:
        """Convolutions: of the patches, and of the dense head."""
        head = {"conv1.weight": "conv1", "end.taps": "conv2", "end.weight": "conv3"}
        found = {name: f"model.head.{conv}" for name, conv in head.items()}
        found["kernel"] = "model.backbone.embeddings.patch_embeddings.projection"
        for name, module in self.neck.named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                found[f"neck.{name}.weight"] = f"model.neck.{name}"
        return found

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
        x = F.conv2d(x, self.conv1.weight, padding=1)
        return F.relu(self.end(x)[:, 0]) * self.largest


def skeleton(settings: Mapping[str, Any]) -> FastDisparity:
    """The network of `FastDisparity.settings` on the meta device."""
    config = DepthAnythingConfig.from_dict(settings["config"])
    with torch.device("meta"):
        network = DisparityNet(DepthAnythingForDepthEstimation(config).eval(), *settings["size"])
        dtype = getattr(torch, settings["dtype"])
        rest = "bf16" if dtype == torch.bfloat16 else "fp16"
        return FastDisparity(network, dtype, compile=False, recipe=skeleton_recipe(network, settings["fp8"], rest))


def block_weights(network: DisparityNet, path: str, recipe: Recipe | None = None) -> BlockWeights:
    """The backbone's block at `path`; layer scales and softmax scale folded where nothing there is FP8."""
    layer: Any = network.get_submodule(path)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if not hasattr(layer.attention, "q_proj"):  # names of transformers before 5.20
        names = ["attention.query", "attention.key", "attention.value", "output.dense"]
    places = [f"{path}.attention.{name}" for name in names] + [f"{path}.mlp.fc1", f"{path}.mlp.fc2"]
    parts = dict(zip(("q", "k", "v", "proj", "fc1", "fc2"), places, strict=True))
    low = {name: found for name, at in parts.items() if (found := low_of(recipe, network, at)) is not None}
    linears = {name: linear_at(network, at) for name, at in parts.items()}
    pairs: dict[str, tuple[Tensor, Tensor]] = {name: (layer.weight, layer.bias) for name, layer in linears.items()}
    heads = network.model.config.backbone_config.num_attention_heads
    origins: dict[str, tuple[str, ...]] = {name: (at,) for name, at in parts.items()}
    gains: list[Tensor | None] = []
    for name, gain in (("proj", layer.layer_scale1.lambda1), ("fc2", layer.layer_scale2.lambda1)):
        if name not in low:
            weight, bias = pairs[name]
            pairs[name] = (weight * gain[:, None], bias * gain)
        gains.append(gain if name in low else None)
    qkv = [pairs[name] for name in ("q", "k", "v")]
    if not low.keys() & {"q", "k", "v"}:
        qkv = [(torch.cat([pair[0] for pair in qkv]), torch.cat([pair[1] for pair in qkv]))]
        origins["qkv"] = tuple(parts[name] for name in ("q", "k", "v"))
    norm1, norm2 = ((norm.weight, norm.bias) for norm in (layer.norm1, layer.norm2))
    return BlockWeights(
        norm1, qkv, pairs["proj"], norm2, pairs["fc1"], pairs["fc2"], heads, layer.norm1.eps,
        score_scale=(qkv[0][0].shape[1] // heads) ** -0.5, gains=(gains[0], gains[1]), low=low, origins=origins,
    )  # fmt: skip
