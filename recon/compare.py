"""The reference harness: run two sessions on the same inputs and say how far apart their outputs are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recon.errors import ReconError

if TYPE_CHECKING:
    import torch

    from recon.engines import Session

Tensors = Mapping[str, "torch.Tensor"]

RELATIVE_FLOOR = 1e-3  # of the reference's RMS: below it an element counts as zero and has no relative error of its own


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference, over all inputs compared. Where it is not finite all errors are inf.

    rel_l2: ||candidate - reference|| / ||reference||. max_abs: in the output's own unit. max_rel: largest
    |candidate - reference| / max(|reference|, 0.001 RMS(reference)). cosine: of the two as vectors.
    """

    rel_l2: float
    max_abs: float
    max_rel: float
    cosine: float
    nan_count: int = 0
    inf_count: int = 0

    def passes(self, tolerance: float) -> bool:
        """Whether rel_l2 is within `tolerance`. NaN and infinity never pass."""
        return self.nan_count == 0 and self.inf_count == 0 and self.rel_l2 <= tolerance


def compare(
    reference: Session, candidate: Session, feeds_list: Iterable[Tensors], *, finite: bool = True
) -> dict[str, OutputError]:
    """Error of every output of `candidate` against `reference` over all `feeds_list`.

    Raises:
        ReconError: names or shapes differ, no inputs were given, the reference is not finite, or (with `finite`)
            the candidate is not.
    """
    pairs = ((reference.infer(dict(feeds)), candidate.infer(dict(feeds))) for feeds in feeds_list)
    return compare_outputs(pairs, finite=finite)


def compare_outputs(pairs: Iterable[tuple[Tensors, Tensors]], *, finite: bool = True) -> dict[str, OutputError]:
    """Error of every output over (reference, candidate) outputs of the same inputs. Raises as `compare`."""
    sums: dict[str, _Sums] = {}
    for expected, got in pairs:
        if expected.keys() != got.keys():
            raise ReconError(f"outputs {sorted(got)} compared with {sorted(expected)}", "compare the same network")
        for name, tensor in expected.items():
            sums.setdefault(name, _Sums()).add(name, tensor, got[name])
    if not sums:
        raise ReconError("nothing to compare: no inputs were given", "give at least one set of inputs")
    errors = {name: total.error() for name, total in sums.items()}
    if finite:
        require_finite(errors)
    return errors


def require_finite(errors: Mapping[str, OutputError]) -> None:
    """Raise ReconError naming the output that holds NaN or infinity."""
    for name, error in errors.items():
        if error.nan_count or error.inf_count:
            raise ReconError(
                f"output {name!r} holds {error.nan_count} NaN and {error.inf_count} infinite values where the reference"
                " is finite",
                "the number format overflows in this network: choose a wider precision",
            )


def require(errors: Mapping[str, OutputError], tolerance: float, what: str) -> None:
    """Raise ReconError unless every output is finite and within the relative L2 `tolerance`."""
    require_finite(errors)
    for name, error in errors.items():
        if not error.passes(tolerance):
            raise ReconError(
                f"{what}: output {name!r} differs from the reference by {error.rel_l2:.2e} relative L2;"
                f" the tolerance is {tolerance:.0e}",
                "the file computes something else than the network; raise the tolerance only if you know why",
            )


class _Sums:
    """Running float64 sums, so that many inputs need no more memory than one."""

    def __init__(self) -> None:
        self.difference = self.reference = self.candidate = self.product = 0.0
        self.max_abs = self.max_rel = 0.0
        self.nan_count = self.inf_count = 0

    def add(self, name: str, expected: torch.Tensor, got: torch.Tensor) -> None:
        if expected.shape != got.shape:
            raise ReconError(
                f"output {name!r} has shape {list(got.shape)}, the reference {list(expected.shape)}",
                "compare engines of the same network and geometry",
            )
        want, have = expected.detach().cpu().double().flatten(), got.detach().cpu().double().flatten()
        if not bool(want.isfinite().all()):
            raise ReconError(f"the reference's own output {name!r} is not finite", "check weights and inputs")
        self.nan_count += int(have.isnan().sum())
        self.inf_count += int(have.isinf().sum())
        if not want.numel() or self.nan_count or self.inf_count:
            return
        gap = (have - want).abs()
        floor = max(float(want.square().mean().sqrt()) * RELATIVE_FLOOR, 1e-300)
        self.difference += float(gap @ gap)
        self.reference += float(want @ want)
        self.candidate += float(have @ have)
        self.product += float(want @ have)
        self.max_abs = max(self.max_abs, float(gap.max()))
        self.max_rel = max(self.max_rel, float((gap / want.abs().clamp_min(floor)).max()))

    def error(self) -> OutputError:
        if self.nan_count or self.inf_count:
            inf = float("inf")
            return OutputError(inf, inf, inf, float("-inf"), self.nan_count, self.inf_count)
        norms = (self.reference * self.candidate) ** 0.5
        both_zero = self.reference == self.candidate == 0.0
        rel_l2 = (self.difference / self.reference) ** 0.5 if self.reference else 0.0 if both_zero else float("inf")
        cosine = self.product / norms if norms else 1.0 if both_zero else 0.0
        return OutputError(rel_l2, self.max_abs, self.max_rel, cosine)
