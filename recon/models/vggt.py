"""VGGT as bootstrap: cameras and depth of N views from one pass, in metres where known poses give the scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from recon.artifact import content_key
from recon.errors import ReconError
from recon.geometry.cameras import invert
from recon.geometry.pose_encoding import decode_pose
from recon.geometry.preprocess import MODES, Placement, example_images, fit, place
from recon.geometry.registration import register
from recon.geometry.views import Bootstrap, DepthImage, Image, PosedDepth, Scale, View
from recon.models import Model
from recon.models.nets.config import OUTPUTS, PRESETS, Part, VGGTConfig
from recon.network import Network, TensorSpec
from recon.weights import Weights, download, resolve

if TYPE_CHECKING:
    import torch

    from recon.engines import Session

CHECKPOINT = "model.safetensors"


@dataclass
class VGGT(Model):
    """Visual Geometry Grounded Transformer (Wang et al., CVPR 2025), own implementation of the published network."""

    preset: str = "vggt-1b"
    """Sizes of the network: vggt-1b | vggt-mini | vggt-twin."""
    weights: str = "facebook/VGGT-1B"
    """Hugging Face id, .safetensors or .pt file, folder that holds one, or seeded:N (deterministic, untrained)."""
    revision: str = "main"
    """Branch, tag or commit of a Hugging Face id."""
    height: int = 518
    """Height of the network's input, pixels; a multiple of 14. For 4:3 images 392 wastes no row."""
    width: int = 518
    """Width of the network's input, pixels; a multiple of 14."""
    pcd_only: bool = True
    """Cameras and depth only. false adds the point map of the network's third head as outputs."""
    preprocess: str = "crop"
    """crop: fill the width, crop or whiten rows. pad: show the whole image, white around it."""

    def check(self) -> None:
        super().check()
        if self.preset not in PRESETS:
            raise ReconError(f"model.preset={self.preset}: no such network", f"choose one of {', '.join(PRESETS)}")
        patch = self._config.patch
        for side in ("height", "width"):
            value = getattr(self, side)
            if value < patch or value % patch:
                nearest = max(patch, round(value / patch) * patch)
                rule = f"must be a positive multiple of {patch}"
                raise ReconError(f"model.{side}={value}: {rule}", f"model.{side}={nearest} is the nearest")
        if self.views < 0:
            raise ReconError(f"model.views={self.views}: cannot be negative", "0 takes as many as the source gives")
        if self.preprocess not in MODES:
            raise ReconError(f"model.preprocess={self.preprocess}: no such mode", f"choose one of {', '.join(MODES)}")
        resolve(self.weights, self.revision)

    def network(self, views: int) -> Network:
        """The network for `views` images [S,3,H,W], RGB in 0..1; outputs as `recon.models.nets.vggt.VGGT.forward`."""
        self.check()
        weights, config, parts = resolve(self.weights, self.revision), self._config, self._parts
        shape = (views, 3, self.height, self.width)
        stem = "vggt" if self.preset == "vggt-1b" else self.preset
        suffix = "pcd" if self.pcd_only else "full"
        return Network(
            name=f"{stem}-{'x'.join(map(str, shape))}-{suffix}",
            inputs={"images": TensorSpec(shape)},
            outputs=tuple(name for part in parts for name in OUTPUTS[part]),
            weights_key=weights.key(f"{config.name}-{content_key(config)[:8]}"),
            load=partial(_load, config, parts, (self.height, self.width), weights),
            example=partial(_example, shape),
            settings={"config": config.settings(), "parts": list(parts)},
            licence=self.licence,
            memory_mib=_memory_mib(config, len(parts) - 1, shape),
        )

    def feeds(self, views: list[View]) -> dict[str, torch.Tensor]:
        """images [S,3,H,W] FP32 RGB in 0..1, placed as `preprocess` says."""
        return _feeds(self._placed(views)[1])

    def special_tokens(self) -> tuple[int, int]:
        """Camera (class, in the patch encoder) and register tokens lead the patches of every frame."""
        patch = self._config.patch
        return 1 + self._config.registers, (self.height // patch) * (self.width // patch)

    def bootstrap(self, views: list[View], scale: Scale, session: Session | None) -> Bootstrap:
        """Posed depth of all views at the network's resolution; pixels without image content have depth 0.

        Where every view has a pose and the network's cameras agree with them (`recon.geometry.registration`), the given
        poses and intrinsics are used and the depth is scaled to them, in the source's unit. Otherwise the first camera
        is the world, the unit is arbitrary, and the notes say why.

        Raises:
            ReconError: the session is for another number of views, or the network's answer is not usable.
        """
        assert session is not None, "VGGT has a network"
        _require_views(views, session)
        placements, images = self._placed(views)
        found = {name: value.float().cpu().numpy() for name, value in session.infer(_feeds(images)).items()}
        T_cam_world, K = decode_pose(found["pose_enc"], self.height, self.width)
        T_world_cam = T_cam_world[0] @ invert(T_cam_world)  # the first camera comes out close to, not at, the origin
        known, predicted = register(views, placements, T_world_cam, K), T_world_cam
        if known.accepted:
            K, T_world_cam = known.K, known.T_world_cam
        posed = [
            PosedDepth(view.camera, images[i], _content(known.scale * found["depth"][i], placement, view.camera), K[i],
                       T_world_cam[i], _content(found["depth_conf"][i], placement, view.camera))
            for i, (view, placement) in enumerate(zip(views, placements, strict=True))
        ]  # fmt: skip
        metric = known.accepted and scale.unit == "m"
        return Bootstrap(
            views=posed,
            K_source={view.camera: placements[i].to_source(K[i]) for i, view in enumerate(views)},
            T_world_cam={view.camera: T_world_cam[i] for i, view in enumerate(views)},
            scale=Scale("m", "known poses") if metric else Scale(),
            depth_type="metric" if metric else "relative",
            in_source_frame=known.accepted,
            notes=known.notes,
            T_predicted={view.camera: pose for view, pose in zip(views, predicted, strict=True)},
            T_given={view.camera: view.T_world_cam for view in views if view.T_world_cam is not None},
        )

    def placement(self, size: tuple[int, int]) -> Placement:
        """By `preprocess`, in steps of the patch."""
        return place(size, (self.width, self.height), self.preprocess)

    def _placed(self, views: list[View]) -> tuple[list[Placement], list[Image]]:
        placements = [self.placement(view.size) for view in views]
        return placements, [fit(view.image, placement) for view, placement in zip(views, placements, strict=True)]

    @property
    def _config(self) -> VGGTConfig:
        return PRESETS[self.preset]

    @property
    def _parts(self) -> tuple[Part, ...]:
        return ("camera", "depth") if self.pcd_only else ("camera", "depth", "points")


def _load(config: VGGTConfig, parts: tuple[Part, ...], size: tuple[int, int], weights: Weights) -> torch.nn.Module:
    from recon.models.nets.vggt import build

    if weights.hub is not None:
        weights = replace(weights, hub=None, file=download(*weights.hub, CHECKPOINT))
    return build(config, parts, size, seed=weights.seed, file=weights.file)


def _example(shape: tuple[int, int, int, int], seed: int) -> dict[str, torch.Tensor]:
    views, _, height, width = shape
    return _feeds(list(example_images(views, (width, height), seed)))


def _feeds(images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    import torch

    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return {"images": pixels.to(torch.float32).div(255).contiguous()}


def _require_views(views: list[View], session: Session) -> None:
    expected = session.inputs["images"].shape[0]
    if len(views) != expected:
        raise ReconError(
            f"the bootstrap has {len(views)} views and the network was built for {expected}",
            f"model.views=0 follows the source; or choose {expected} cameras with source.views",
        )


def _content(values: np.ndarray, placement: Placement, camera: str) -> DepthImage:
    """The network's map with 0 where its input was no image."""
    if not np.isfinite(values).all():
        raise ReconError(
            f"the network's depth of camera {camera!r} is not finite",
            "compare with engine=torch precision=fp32; if that is finite, the chosen precision overflows",
        )
    kept: DepthImage = np.where(placement.content(), values, 0).astype(np.float32)
    return kept


def _memory_mib(config: VGGTConfig, dense_heads: int, shape: tuple[int, ...]) -> float:
    """Weights of all layers, taps, and the three full-size maps that a dense head holds at once, all FP32."""
    views, _, height, width = shape
    w, d, c = config.width, config.dpt_width, config.dpt_channels
    blocks = 12 * w * w * (config.encoder_depth + 2 * config.trunk_depth)
    camera = 12 * (2 * w) ** 2 * config.camera_depth + 12 * w * w
    head = 2 * w * sum(c) + 9 * d * sum(c) + 14 * 9 * d * d + 16 * c[0] ** 2 + 4 * c[1] ** 2 + 9 * c[3] ** 2
    taps = 4 * views * (height * width // config.patch**2) * 2 * w
    maps = 3 * views * (d // 2) * height * width
    return 4 * (blocks + camera + dense_heads * head + taps + maps) / 2**20
