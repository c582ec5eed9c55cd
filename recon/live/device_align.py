"""Alignment of all cameras of a batch on a device: the fits are made there, the gates decide here.

One small copy goes in (last frame's pairs and seeds) and one comes out (the figures of all fits).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from recon.geometry import align_torch
from recon.geometry.align_torch import INDEX, Found, Samples
from recon.geometry.views import Array
from recon.live.align import AlignResult, CameraAligner
from recon.live.replay import Replayed


class DeviceAligner:
    """Fits for aligners whose options and depth type are the same; `like` is one of them.

    graphs: replay the fits as one CUDA graph.
    """

    def __init__(self, like: CameraAligner, graphs: bool = False) -> None:
        self.like = like
        self._figures = Replayed(partial(_figures, like), graphs)

    @torch.inference_mode()
    def update_all(
        self,
        aligners: Sequence[CameraAligner],
        prediction: torch.Tensor,
        map_depth: torch.Tensor,
        frames: Sequence[int],
    ) -> list[AlignResult]:
        """`CameraAligner.update` for one frame of each of C cameras.

        prediction: [C,H,W] float32, NaN where there is none; map_depth: [C,h,w] float32, 0 = none.
        """
        start = time.perf_counter()
        rows = np.array([_row(aligner, frame) for aligner, frame in zip(aligners, frames, strict=True)])
        known = uploaded(rows, prediction.device)
        found = self._figures(prediction, map_depth, known).cpu().numpy()
        fits = align_torch.fits(found, self.like.fit_options, (time.perf_counter() - start) * 1e3)
        results = []
        for aligner, row, frame, fit in zip(aligners, found, frames, fits, strict=True):
            far_share = partial(float, row[INDEX["far_share"]])
            results.append(aligner.judge(fit, float(row[INDEX["overlap"]]), far_share, frame))
        return results


def to_depth(aligner: CameraAligner, prediction: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """`CameraAligner.to_depth` of [C,H,W] predictions; pairs: [C,2+] (s, t) on their device."""
    inverse = align_torch.as_disparity(prediction, aligner.affine)
    return align_torch.to_depth(inverse, pairs[:, 0], pairs[:, 1], aligner.options.far)


def uploaded(rows: Array, device: torch.device) -> torch.Tensor:
    """A small array on `device`, without waiting for it."""
    found = torch.from_numpy(rows)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _figures(
    one: CameraAligner, prediction: torch.Tensor, map_depth: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """All figures of the fits; known: [C,3] from `_row`. Waits for nothing."""
    gates = one.options
    seeds = known[:, 2].to(torch.int64)
    found = align_torch.samples(prediction, map_depth, seeds, gates.pixels, positive=not one.affine)
    if not one.affine:
        inverse = torch.where(found.valid, 1 / found.d, 0.0)
        found = Samples(inverse, found.y, found.z, found.valid, found.count, found.overlap)
    fitted = _fitted(one, found, known[:, :2], seeds)
    step = gates.thinning(prediction.shape[1] * prediction.shape[2])
    far = align_torch.far_share(prediction, fitted, gates.far, step, one.affine)
    return align_torch.figures(found, fitted, far)


def _fitted(aligner: CameraAligner, found: Samples, prior: torch.Tensor, seeds: torch.Tensor) -> Found:
    if aligner.fixed:
        return align_torch.identity(found)
    if not aligner.affine:
        return align_torch.fit_scale(found, aligner.fit_options)
    draws = align_torch.draw(seeds, found, aligner.fit_options)
    return align_torch.fit(found, prior, draws, aligner.fit_options)


def _row(aligner: CameraAligner, frame: int) -> tuple[float, float, float]:
    """Last frame's pair, NaN before the first, and a seed that depends on camera and frame alone; below 2^53."""
    words = (aligner.options.seed, zlib.crc32(aligner.camera.encode()), frame)
    seed = float(np.random.SeedSequence(words).generate_state(1)[0])
    if aligner.s is None or aligner.t is None:
        return float("nan"), float("nan"), seed
    return aligner.s, aligner.t, seed
