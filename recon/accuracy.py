"""Accuracy of a built engine against the FP32 torch module on frames that calibration did not see.

The reference is torch in FP32 on the same inputs, so the figures say what quantisation, precision and engine have
changed, not how good the network is. It runs where the engine runs, on CUDA without TF32.

- Depth of a bootstrap network: one scale per input (its depth is defined up to one), the median of reference / engine
  over all views; then AbsRel and delta1 over all pixels with positive depth.
- Disparity of a streaming network: scale and shift per input by least squares; AbsRel and delta1 of the *disparity*
  (to first order those of depth) where the reference is above a hundredth of its largest value.
- Poses: every pair of views; angle between the relative rotations and between the directions of the relative
  translations. Neither world frame nor scale enters.
- Every output: relative L2, cosine, largest errors.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.errors import ReconError
from recon.machine import MIB

if TYPE_CHECKING:
    import torch

    from recon.config import Config
    from recon.engines import Session
    from recon.frames import Sample
    from recon.network import Network

    Tensors = dict[str, torch.Tensor]

log = logging.getLogger(__name__)
ROOM = 1.25  # times the estimate of a network's memory has to be free
KEPT = 2  # samples: those of the two networks of a configuration
_SAMPLES: dict[str, Sample] = {}
FAR = 0.01  # of the largest disparity; below it a relative error says nothing
GATES = {"max_absrel": "absrel", "max_rotation_deg": "rotation_deg_max", "max_rel_l2": "rel_l2_max"}
ALIGNMENT = {
    "depth": "one scale per input: median of reference / engine",
    "disparity": "scale and shift per input: least squares",
}


@dataclass
class AccuracyOptions:
    """What is compared after every build, and the limits beyond which an engine is refused."""

    batches: int = 4
    """Inputs of the network that are compared."""
    examples: bool = False
    """Compare on the network's own synthetic example images instead of frames of the source."""
    max_absrel: float | None = None
    """Refuse an engine whose mean relative depth (or disparity) error against FP32 is above this."""
    max_rotation_deg: float | None = None
    """Refuse an engine that turns any pair of views by more than this against FP32, degrees."""
    max_rel_l2: float | None = None
    """Refuse an engine of which any output is off by more than this in relative L2."""

    def check(self) -> None:
        """Raises ReconError for an impossible value."""
        if self.batches < 1:
            raise ReconError(f"accuracy.batches={self.batches}: must be at least 1", "the default is 4")
        for name in GATES:
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ReconError(f"accuracy.{name}={limit}: must be positive", "leave it out to accept every engine")


def judge(config: Config, network: Network, role: str, file: Path) -> dict[str, Any]:
    """Errors of a built file against the FP32 torch module, as plain data for its manifest.

    Where the engine cannot run here: `not_measured` with the reason.

    Raises:
        ReconError: an output is not finite, or an error is beyond a limit of `accuracy`.
    """
    if reason := config.engine.runs_here():
        return {"not_measured": reason}
    feeds, seen = _inputs(config, network, role)
    size = next(iter(network.inputs.values())).shape[-2:]
    with config.engine.load(file) as session, reference_beside(session, network) as reference:
        found = seen | {"reference": f"torch fp32 on {reference.device}"} | measure(reference, session, feeds, size)
    enforce(config.accuracy, found, file.name)
    return found


@contextmanager
def reference_beside(session: Session, network: Network) -> Iterator[Session]:
    """The FP32 torch module on the session's device; on the CPU where the device has no room for both. What it takes
    of a device is free again afterwards."""
    from recon.engines.torch import TorchSession

    device = _place(network, session.device)
    try:
        with TorchSession(network, network.load(), device) as reference:
            yield reference
    finally:
        _free(device)


def _place(network: Network, device: str) -> str:
    """The device, if one FP32 inference of the network fits there now; else the CPU, and the log says so."""
    if device == "cpu":
        return device
    import torch

    _free(device)
    free = torch.cuda.mem_get_info(device)[0] / MIB
    if ROOM * network.memory_mib <= free:
        return device
    log.warning(
        "the FP32 reference of %s needs about %.0f MiB, and %s has %.0f MiB free: it runs on the CPU",
        network.name, network.memory_mib, device, free,
    )  # fmt: skip
    return "cpu"


def _free(device: str) -> None:
    """Give what nothing refers to any more back to the device."""
    if device != "cpu":
        import torch

        gc.collect()  # modules refer to themselves
        torch.cuda.empty_cache()


def require_frames(config: Config, network: Network, role: str) -> None:
    """Raise ReconError where `judge` would find too few frames: asked before an engine is built, since it is cheap."""
    if not config.engine.runs_here() and not _on_examples(config):
        from recon.frames import require

        require(config, network, role)


def measure(reference: Session, session: Session, feeds: list[Tensors], size: tuple[int, ...]) -> dict[str, Any]:
    """All figures of a session against a reference on the same inputs. size: height and width of the network's input.

    Raises:
        ReconError: an output of the session is not finite.
    """
    from recon.compare import compare_outputs

    scores = _Scores(height=size[0], width=size[1])
    errors = compare_outputs(_watched(reference, session, feeds, scores))
    worst = {"rel_l2_max": max(error.rel_l2 for error in errors.values())}
    return {"inputs": len(feeds), **worst, **scores.summary(), "outputs": {n: asdict(e) for n, e in errors.items()}}


def figures(found: dict[str, Any]) -> dict[str, float]:
    """The numbers alone, flat, for trackers and tables."""
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def enforce(options: AccuracyOptions, found: dict[str, Any], name: str) -> None:
    """Raise ReconError, with all numbers, when an error that was measured is beyond a limit."""
    for option, key in GATES.items():
        limit = getattr(options, option)
        if limit is None or key not in found:
            continue
        if found[key] > limit:
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in figures(found).items())
            raise ReconError(
                f"{name}: {key} {found[key]:.3g} against FP32 torch is beyond accuracy.{option}={limit:g} ({numbers})",
                "choose a wider precision, keep the most sensitive layers (stages=[sensitivity] ranks them,"
                " quant_mode.keep=[FILE] leaves them alone), or raise the limit",
            )


def _inputs(config: Config, network: Network, role: str) -> tuple[list[Tensors], dict[str, Any]]:
    count = config.accuracy.batches
    if _on_examples(config):
        first = 10_000  # seeds that neither export nor benchmarks use
        why = "" if config.accuracy.examples else f": source={config.source.name} is live"
        return [network.example(first + i) for i in range(count)], {"frames": f"examples of the network{why}"}
    found = _sample(config, network, role)
    return found.feeds, {"frames": found.origin, "frames_shared_with_calibration": found.shared}


def _sample(config: Config, network: Network, role: str) -> Sample:
    """Frames for a network. Those of the synthetic source are kept: every job of a sweep would render them again."""
    from recon.artifact import content_key
    from recon.frames import sample

    count, skip = config.accuracy.batches, config.calibration.batches
    if config.source.name != "synthetic" or config.calibration.path is not None:  # files may have changed
        return sample(config, network, role, count, skip=skip)
    option = config.model if role == "model" else config.depth
    known = content_key([config.source.settings(), option.settings(), network.name, role, count, skip])
    if known not in _SAMPLES:
        _SAMPLES[known] = sample(config, network, role, count, skip=skip)
        while len(_SAMPLES) > KEPT:
            del _SAMPLES[next(iter(_SAMPLES))]
    return _SAMPLES[known]


def _on_examples(config: Config) -> bool:
    """Asked for, or the source is live: its frames do not come twice."""
    return config.accuracy.examples or (config.source.live and config.calibration.path is None)


def _watched(
    reference: Session, session: Session, feeds: list[Tensors], scores: _Scores
) -> Iterator[tuple[Tensors, Tensors]]:
    for inputs in feeds:
        expected, got = reference.infer(dict(inputs)), session.infer(dict(inputs))
        scores.add(_arrays(expected), _arrays(got))
        yield expected, got


def _arrays(outputs: Tensors) -> dict[str, np.ndarray]:
    return {name: value.detach().float().cpu().numpy().astype(np.float64) for name, value in outputs.items()}


@dataclass
class _Scores:
    """Depth and pose errors of the inputs seen so far."""

    height: int
    width: int
    depth: list[dict[str, float]] = field(default_factory=list)
    kind: str = ""
    rotations: list[np.ndarray] = field(default_factory=list)
    directions: list[np.ndarray] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def add(self, expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
        """Outputs of one input. What is not finite has no score: the comparison of outputs refuses it."""
        if expected.keys() != got.keys() or not all(np.isfinite(value).all() for value in got.values()):
            return
        for kind in ("depth", "disparity"):
            if kind in expected and expected[kind].shape == got[kind].shape:
                self._add_depth(kind, expected[kind], got[kind])
        if "pose_enc" in expected:
            self._add_poses(expected["pose_enc"], got["pose_enc"])

    def summary(self) -> dict[str, Any]:
        """Means over inputs; largest angles over all pairs of views."""
        found: dict[str, Any] = {}
        if self.depth:
            found |= {key: float(np.mean([row[key] for row in self.depth])) for key in ("absrel", "delta1")}
            found["alignment"] = ALIGNMENT[self.kind]
        for name, angles in (("rotation_deg", self.rotations), ("translation_deg", self.directions)):
            if angles:
                together = np.concatenate(angles)
                found |= {f"{name}_max": float(together.max()), f"{name}_mean": float(together.mean())}
        if self.notes:
            found["notes"] = sorted(self.notes)
        return found

    def _add_depth(self, kind: str, expected: np.ndarray, got: np.ndarray) -> None:
        from recon.geometry.metrics import depth_metrics

        floor = FAR * expected.max() if kind == "disparity" else 0.0
        mask = expected > max(floor, 0.0)
        if kind == "disparity":
            aligned = _least_squares(got, expected, mask)
            aligned = np.maximum(aligned, 1e-9 * max(float(expected.max()), 1e-30))
        else:
            mask &= got > 0
            aligned = got * float(np.median(expected[mask] / got[mask])) if mask.any() else got
        if not mask.any():
            self.notes.add(f"the {kind} of the reference is nowhere positive")
            return
        self.kind = kind
        self.depth.append(depth_metrics(aligned, np.where(mask, expected, 1.0), mask))

    def _add_poses(self, expected: np.ndarray, got: np.ndarray) -> None:
        from recon.geometry.cameras import invert
        from recon.geometry.metrics import pair_errors_deg
        from recon.geometry.pose_encoding import decode_pose

        if len(expected) < 2:
            return
        try:
            truth, found = (invert(decode_pose(enc, self.height, self.width)[0]) for enc in (expected, got))
        except ReconError as error:
            self.notes.add(f"poses not judged: {error.problem}")
            return
        rotation, direction = pair_errors_deg(found, truth)
        self.rotations.append(rotation)
        self.directions.append(direction)


def _least_squares(values: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`s * values + t` nearest to the truth over the mask."""
    x, y = values[mask], truth[mask]
    spread = x - x.mean() if x.size else x
    power = float(spread @ spread)
    scale = float(spread @ (y - y.mean())) / power if power > 0 else 0.0
    shift = float(y.mean() - scale * x.mean()) if x.size else 0.0
    return scale * values + shift
