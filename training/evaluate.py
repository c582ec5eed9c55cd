"""Quality on held-out rooms, from the weights alone, in the form in which they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recon.geometry.metrics import pair_errors_deg
from recon.geometry.pose_encoding import decode_pose
from recon.models.nets.config import VGGTConfig
from recon.models.nets.vggt import build
from recon.scene.generate import generate, rig
from recon.scene.render import render, stack

Network = Callable[[Tensor], Sequence[Tensor]]

VIEWS, FOV_DEG = 4, 66.0
SIZE, SOURCE = (168, 224), (240, 320)
FAR_M = 12.0
"""Aligned disparity is cut off here, metres, as evaluations of affine-invariant depth do at the range of a data set."""


@dataclass(frozen=True)
class Sample:
    """A held-out scene: images [V,3,H,W] uint8 as resized for the network, depth [V,H,W], T_world_cam [V,4,4]."""

    seed: int
    images: Tensor
    depth: Tensor
    pose: np.ndarray[Any, Any]


def samples(seeds: Iterable[int], device: torch.device, chunk: int = 8) -> Iterator[Sample]:
    """The demo's rig in each scene, rendered at its 320 x 240 and resized to the network's 224 x 168 (bicubic, as the
    options do); truth is rendered at the network's own pixels."""
    listed = list(seeds)
    for at in range(0, len(listed), chunk):
        part = listed[at : at + chunk]
        scenes = [generate(seed) for seed in part]
        pairs = zip(scenes, part, strict=True)
        rigs = [rig(scene, seed, VIEWS, SOURCE[1], SOURCE[0], FOV_DEG) for scene, seed in pairs]
        K = np.stack([r.K for r in rigs])
        pose = np.stack([r.T_world_cam for r in rigs])
        tensors = stack(scenes, device)
        T = torch.as_tensor(pose, dtype=torch.float32, device=device)
        seen = render(tensors, torch.as_tensor(K, dtype=torch.float32, device=device), T, SOURCE[1], SOURCE[0])
        small = torch.as_tensor(resized(K), dtype=torch.float32, device=device)
        truth = render(tensors, small, T, SIZE[1], SIZE[0], color=False).depth
        rgb = seen.rgb.flatten(0, 1).permute(0, 3, 1, 2).float()
        rgb = F.interpolate(rgb, SIZE, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
        images = rgb.to(torch.uint8).view(len(part), VIEWS, 3, *SIZE)
        for number, seed in enumerate(part):
            yield Sample(seed, images[number], truth[number], pose[number])


def resized(K: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Intrinsics at the network's size; pixel centres are integers."""
    out = K.copy()
    for axis, factor in ((0, SIZE[1] / SOURCE[1]), (1, SIZE[0] / SOURCE[0])):
        out[..., axis, axis] *= factor
        out[..., axis, 2] = (K[..., axis, 2] + 0.5) * factor - 0.5
    return out


def evaluate_vggt(
    config: VGGTConfig, weights: dict[str, Tensor] | Path, seeds: Iterable[int], device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Summary and one row per scene."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        file = weights if isinstance(weights, Path) else Path(folder) / "weights.safetensors"
        if isinstance(weights, dict):
            save_file({name: value.detach().half().cpu().contiguous() for name, value in weights.items()}, file)
        network = build(config, ("camera", "depth"), SIZE, file=file).to(device)
        return judge_vggt(network, seeds, device)


def judge_vggt(
    network: Network, seeds: Iterable[int], device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """As `evaluate_vggt`, for anything that maps images [V,3,H,W] in 0..1 to (pose_enc, depth, depth_conf)."""
    rows = [_vggt_row(network, sample) for sample in samples(seeds, device)]
    turn = np.concatenate([row["rotation_deg"] for row in rows])
    worst = np.maximum(turn, np.concatenate([row["translation_deg"] for row in rows]))
    summary = {
        "absrel": _mean(rows, "absrel"),
        "delta1": _mean(rows, "delta1"),
        "absrel_median_scene": float(np.median([row["absrel"] for row in rows])),
        "rotation_median_deg": float(np.median(turn)),
        "translation_median_deg": float(np.median(np.concatenate([row["translation_deg"] for row in rows]))),
        "auc30": float(np.mean([np.mean(worst < threshold) for threshold in range(1, 31)])),
        "fov_median_deg": float(np.median([row["fov_error_deg"] for row in rows])),
        "scenes": float(len(rows)),
    }
    return summary, rows


@torch.no_grad()
def _vggt_row(network: Network, sample: Sample) -> dict[str, Any]:
    pose, depth, _ = network(sample.images.float() / 255)
    truth = sample.depth
    valid = truth > 0
    scale = (truth[valid] / depth[valid]).median()
    facts = depth_errors(depth * scale, truth, valid)
    T_cam_world, K = decode_pose(pose.float().cpu().numpy(), *SIZE)
    T_world_cam = np.linalg.inv(T_cam_world)
    rotation, translation = pair_errors_deg(T_world_cam, sample.pose)
    fov = np.degrees(2 * np.arctan(SIZE[1] / 2 / K[:, 0, 0]))
    return {
        "seed": sample.seed, **facts, "scale": float(scale), "rotation_deg": rotation.tolist(),
        "translation_deg": translation.tolist(), "fov_error_deg": float(np.abs(fov - FOV_DEG).mean()),
    }  # fmt: skip


def evaluate_da(
    weights: dict[str, Tensor] | Path, seeds: Iterable[int], device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Summary and one row per image; `weights` is a folder as Hugging Face publishes it, or parameters."""
    from recon.depth.nets.depth_anything import DisparityNet
    from recon.depth.nets.depth_anything import build as build_disparity

    if isinstance(weights, Path):
        network: torch.nn.Module = build_disparity(SIZE, seed=None, architecture="small", folder=weights)
    else:
        from transformers import DepthAnythingForDepthEstimation

        from recon.depth.nets.depth_anything import configuration

        model = DepthAnythingForDepthEstimation(configuration("mini"))
        missing, left = model.load_state_dict({n: v.half().float().cpu() for n, v in weights.items()}, strict=False)
        assert not left, left
        assert all(name.endswith("mask_token") for name in missing), missing
        network = DisparityNet(model.requires_grad_(False).eval(), *SIZE).eval()
    return judge_da(network.to(device), seeds, device)


def judge_da(
    network: Network, seeds: Iterable[int], device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """As `evaluate_da`, for anything that maps preprocessed images [V,3,H,W] to (disparity [V,H,W],)."""
    from recon.depth.nets.images import preprocess

    rows = []
    for sample in samples(seeds, device):
        with torch.no_grad():
            (found,) = network(preprocess(sample.images.cpu(), SIZE).to(device))
        for view in range(VIEWS):
            rows.append({"seed": sample.seed, "view": view, **_affine_errors(found[view].float(), sample.depth[view])})
    summary = {
        "absrel": _mean(rows, "absrel"),
        "delta1": _mean(rows, "delta1"),
        "absrel_median_image": float(np.median([row["absrel"] for row in rows])),
        "images": float(len(rows)),
    }
    return summary, rows


def _affine_errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors of depth after the least-squares scale and shift of disparity."""
    valid = truth > 0
    d, target = found[valid].double(), 1 / truth[valid].double()
    centred = d - d.mean()
    gain = (centred * target).sum() / (centred * centred).sum().clamp_min(1e-12)
    disparity = gain * (found.double() - d.mean()) + target.mean()
    return depth_errors(1 / disparity.clamp_min(1 / FAR_M), truth, valid)


def depth_errors(depth: Tensor, truth: Tensor, valid: Tensor) -> dict[str, float]:
    """AbsRel and delta1 over valid pixels."""
    p, z = depth[valid].double(), truth[valid].double()
    return {
        "absrel": float(((p - z).abs() / z).mean()),
        "delta1": float((torch.maximum(p / z, z / p) < 1.25).double().mean()),
    }


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
