"""Train da-mini on procedural rooms.

python -m training.train_da --minutes 8 --state outputs/da.pt --out outputs/da
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from training import losses
from training.data import Batch
from training.disparity import TrainedDisparity
from training.loop import Plan, Trainer, split
from training.train_vggt import add_arguments, begin, finish, prepare, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, Plan(images=256, warmup=300))
    options = parser.parse_args()
    plan, device, stream = prepare(options)
    model = TrainedDisparity(plan.seed, not options.plain, bf16=device.type == "cuda").to(device)
    trainer = Trainer(model, plan)
    begin(trainer, options)

    def on_step(net: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(net, stream.batch(step, views=2))

    trainer.run(on_step, options.minutes, options.out / "log.jsonl", steps=options.steps)
    finish(trainer, options)
    weights = {name.removeprefix("net."): value for name, value in trainer.averaged().items()}
    split(weights, options.out, "da-mini")
    if options.scenes:
        from training.evaluate import evaluate_da

        report(evaluate_da(weights, range(options.scenes), device)[0], trainer.step, options.out)


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Scale-and-shift-invariant loss of a batch."""
    depth = batch.depth.flatten(0, 1)
    truth = torch.where(depth > 0, 1 / depth.clamp_min(0.05), 0.0)
    found = model(batch.images.flatten(0, 1))
    total = losses.disparity_loss(found, truth)
    return total, {"zeros": (found <= 0).float().mean()}


if __name__ == "__main__":
    main()
