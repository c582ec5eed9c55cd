"""One training loop for both networks: AdamW, warm-up and cosine over the plan, clipping, averaged weights, pieces.

A piece ends after some minutes or steps and leaves a checkpoint; the next one continues where it stopped, since the
learning rate depends on the step alone and the data on (seed, step).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor]]]
"""(model, step) -> loss and what to log."""


@dataclass(frozen=True)
class Plan:
    """What a checkpoint belongs to. `total`: steps of the whole schedule, over all pieces."""

    seed: int = 0
    images: int = 288
    total: int = 20_000
    rate: float = 1e-3
    final: float = 1e-5
    warmup: int = 500
    decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to `final`."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return self.final + (self.rate - self.final) * 0.5 * (1 + math.cos(math.pi * share))


class Trainer:
    """Model, optimiser, average and step: everything that a checkpoint holds."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan, self.step = model, plan, 0
        # sorted: a checkpoint must not depend on the order in which a module declares its parts
        named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        matrices = [p for _, p in named if p.ndim > 1]
        vectors = [p for _, p in named if p.ndim <= 1]
        cuda = self.parameters[0].is_cuda
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": plan.decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=plan.rate, betas=(0.9, 0.98), fused=cuda,
        )  # fmt: skip
        self.average = [p.detach().clone() for p in self.parameters]

    def advance(self, loss_fn: LossFn) -> tuple[Tensor, dict[str, Tensor]]:
        """One step; a gradient that is not finite counts as 0."""
        rate = self.plan.rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, facts = loss_fn(self.model, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for p in self.parameters:
            if p.grad is not None:
                torch.nan_to_num_(p.grad, 0.0, 0.0, 0.0)
        facts["norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip, foreach=True)
        self.optimiser.step()
        self.step += 1
        keep = min(self.plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - keep)
        return loss.detach(), facts

    def run(self, loss_fn: LossFn, minutes: float, log: Path, every: int = 100, steps: int | None = None) -> None:
        """Steps until the plan, the piece's minutes or its steps are over. Means of every `every` steps go to `log`."""
        begin, stop = time.monotonic(), self.plan.total if steps is None else min(self.step + steps, self.plan.total)
        sums: dict[str, Tensor] = {}
        count, since = 0, time.monotonic()
        while self.step < stop and time.monotonic() - begin < 60 * minutes:
            loss, facts = self.advance(loss_fn)
            for name, value in {"loss": loss, **facts}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
            count += 1
            if count % 10 == 0:
                loss.item()  # waits for the device, so that the clock above is the piece's
            if self.step % every == 0 or self.step >= stop:
                line: dict[str, Any] = {"step": self.step, "rate": self.plan.rate_at(self.step)}
                line |= {name: round(float(value) / count, 5) for name, value in sums.items()}
                line["images_s"] = round(self.plan.images * count / (time.monotonic() - since), 1)
                _say(line, log)
                sums, count, since = {}, 0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Everything needed to continue."""
        return {
            "plan": asdict(self.plan), "step": self.step, "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(), "average": self.average,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`. The plan's seed and batch must be the same; the rest of the plan may be changed."""
        for name in ("seed", "images"):
            if state["plan"][name] != getattr(self.plan, name):
                raise ValueError(f"checkpoint has {name}={state['plan'][name]}, this run {getattr(self.plan, name)}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            torch._foreach_copy_(self.average, state["average"])
        self.step = state["step"]

    def averaged(self) -> dict[str, Tensor]:
        """Averaged parameters by name."""
        return dict(zip(self.names, self.average, strict=True))


def save(trainer: Trainer, path: Path) -> None:
    """Write the checkpoint under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(trainer.state(), part)
    part.rename(path)


def resume(trainer: Trainer, path: Path) -> bool:
    """Load the checkpoint if there is one; says whether."""
    if path.is_file():
        device = trainer.parameters[0].device
        trainer.load(torch.load(path, map_location=device, weights_only=True))
    return path.is_file()


RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def published(name: str) -> str:
    """A parameter's name in checkpoints: without the wrapper, and as published whatever transformers calls it."""
    name = name.removeprefix("net.")
    for new, old in RENAMED.items():
        name = name.replace(new, old)
    return name


def split(tensors: dict[str, Tensor], folder: Path, stem: str, limit: int = 15 << 20) -> None:
    """safetensors in fp16 under published names, in parts of at most `limit` bytes (a limit on files in transfer)."""
    from safetensors.torch import save_file

    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=published):
        value = tensors[name]
        half = value.detach().half().cpu().contiguous()
        if size + 2 * half.numel() > limit:
            parts.append({})
            size = 0
        parts[-1][published(name)] = half
        size += 2 * half.numel()
    for number, part in enumerate(parts):
        save_file(part, folder / f"{stem}.{number}.safetensors")


def _say(line: dict[str, Any], log: Path) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    with log.open("a") as file:
        file.write(text + "\n")
