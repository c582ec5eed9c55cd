"""Depth Anything V2 (Yang et al., NeurIPS 2024) from `transformers`, made static. Its image processing: `images`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
from transformers.utils import logging as transformers_logging

from recon.errors import ReconError
from recon.weights import seeded_state

if TYPE_CHECKING:
    from recon.depth.nets.fast import FastDisparity
    from recon.formats import Recipe

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small": {"width": 384, "layers": 12, "heads": 6, "taps": [3, 6, 9, 12], "neck": [48, 96, 192, 384], "fusion": 64},
    "base": {
        "width": 768, "layers": 12, "heads": 12, "taps": [3, 6, 9, 12], "neck": [96, 192, 384, 768], "fusion": 128
    },
    "large": {
        "width": 1024, "layers": 24, "heads": 16, "taps": [5, 12, 18, 24], "neck": [256, 512, 1024, 1024], "fusion": 256
    },
    "mini": {
        "width": 192, "layers": 6, "heads": 3, "taps": [2, 3, 5, 6], "neck": [32, 64, 96, 96], "fusion": 48,
        "image": 224,
    },
    "twin": {
        "width": 32, "layers": 4, "heads": 2, "taps": [1, 2, 3, 4], "neck": [16, 24, 32, 32], "fusion": 16, "image": 112
    },
}  # fmt: skip


class DisparityNet(nn.Module):
    """The network at one image size, in a form that exports cleanly.

    The position table is resized once, here, instead of in every inference. The backbone's blocks are called directly:
    its own `forward` passes an attention mask of ones while it is traced, which ends up in the graph (IsNaN and Where
    at every softmax) and keeps engines from fusing attention.
    """

    def __init__(self, model: DepthAnythingForDepthEstimation, height: int, width: int) -> None:
        super().__init__()
        self.model = model
        self.grid = (height // model.config.patch_size, width // model.config.patch_size)
        embeddings = model.backbone.embeddings
        tokens = torch.empty(1, 1 + self.grid[0] * self.grid[1], embeddings.cls_token.shape[-1])
        with torch.no_grad():
            table = embeddings.interpolate_pos_encoding(tokens, height, width).detach().clone()
        embeddings.register_buffer("static_positions", table, persistent=False)
        embeddings.interpolate_pos_encoding = lambda *_: embeddings.static_positions

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        """pixel_values [N,3,H,W] FP32, normalised -> (disparity [N,H,W] FP32 >= 0, up to scale and shift,)."""
        backbone = self.model.backbone
        x = backbone.embeddings(pixel_values)
        taps = []
        for index, block in enumerate(backbone.encoder.layer, 1):
            x = block(x)
            if index in backbone.out_indices:
                taps.append(backbone.layernorm(x))
        return (self.model.head(self.model.neck(taps, *self.grid), *self.grid),)

    def to_inference(
        self,
        dtype: torch.dtype = torch.float16,
        *,
        recipe: Recipe | None = None,
        fp8: Sequence[Tensor] = (),
        low_scores: bool = False,
        compile: bool = True,
    ) -> FastDisparity:
        """A second network of the same function for inference, on this one's device; see `fast` for what is low.

        dtype: torch.float16 or torch.bfloat16. recipe: its FP8 layers are E4M3 with its codes and ranges, all others as
        without it. fp8, instead of a recipe: example inputs; with some, all products of the backbone are E4M3 with
        ranges seen on them. low_scores: without effect, for queries and keys are not normalised here. compile: the
        dense head through torch.compile.
        """
        from recon.depth.nets.fast import FastDisparity

        network = FastDisparity(self, dtype, compile, recipe)
        for pixel_values in fp8:
            network.calibrate(pixel_values)
        if fp8:
            network.quantise()
        return network


def build(
    size: tuple[int, int], *, seed: int | None, architecture: str, folder: Path | None, metric: bool = False
) -> DisparityNet:
    """The network for images of `size` (height, width): from a folder with config.json and weights, or seeded.

    metric: one of the models that give depth in metres instead of disparity.

    Raises:
        ReconError: the folder holds no such network, weights are missing or left over, or its output is of the other
            kind.
    """
    model = _from_folder(folder, metric) if folder is not None else _seeded(architecture, seed or 0, metric)
    return DisparityNet(model.requires_grad_(False).eval(), *size).eval()


def configuration(architecture: str, metric: bool = False) -> DepthAnythingConfig:
    """The configuration of a published model, of ours (mini), or of the miniature for tests (twin).

    Metric depth ends at 20 m, as in the published indoor models.
    """
    sizes = ARCHITECTURES[architecture]
    backbone = Dinov2Config(
        hidden_size=sizes["width"], num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        image_size=sizes.get("image", 518), patch_size=14, reshape_hidden_states=False,
        out_indices=sizes["taps"], apply_layernorm=True,
    )  # fmt: skip
    return DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=sizes["width"], neck_hidden_sizes=sizes["neck"],
        fusion_hidden_size=sizes["fusion"],
        **({"depth_estimation_type": "metric", "max_depth": 20} if metric else {}),
    )  # fmt: skip


def _seeded(architecture: str, seed: int, metric: bool = False) -> DepthAnythingForDepthEstimation:
    model = DepthAnythingForDepthEstimation(configuration(architecture, metric))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(seeded_state(shapes, seed), strict=True)
    if not metric:
        model.head.conv3.bias.data += 1  # the last ReLU would cut half of an untrained output to 0
    return model


def _from_folder(folder: Path, metric: bool) -> DepthAnythingForDepthEstimation:
    _note_factories()
    try:
        with _quiet():
            model, info = DepthAnythingForDepthEstimation.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # transformers raises many unrelated types for a bad folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReconError(
            f"{folder}: cannot be loaded as Depth Anything: {reason}",
            "give a folder with config.json and model.safetensors as Hugging Face publishes them (names end in -hf)",
        ) from error
    if problems := {kind: sorted(map(str, names))[:4] for kind, names in info.items() if names}:
        raise ReconError(f"{folder}: the weights do not fit the network: {problems}", "fetch the folder again")
    if model.config.depth_estimation_type != (wanted := "metric" if metric else "relative"):
        raise ReconError(
            f"{folder}: predicts {model.config.depth_estimation_type} depth, and this option is for {wanted} depth",
            "metric models have Metric in their name and belong to depth=da2-metric-*, the others to depth=da2-*",
        )
    return model


def _note_factories() -> None:
    """Have torch look up now which functions make tensors.

    It does so once in a process, when the first of them is called under `torch.device`. That may be while transformers
    (5.17 to 5.23 at least) has replaced `torch.linspace` for loading, which then ignores such a device for good.
    """
    with torch.device("meta"):
        torch.empty(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings: what they would warn of is an error here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
