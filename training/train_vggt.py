"""Train vggt-mini on procedural rooms.

python -m training.train_vggt --minutes 8 --state outputs/vggt.pt --out outputs/vggt
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from training import losses
from training.data import Batch, Stream, make_pool
from training.loop import Plan, Trainer, published, resume, save, split
from training.network import MINI, BatchedVGGT

SIZE = (168, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, Plan())
    options = parser.parse_args()
    plan, device, stream = prepare(options)
    model = BatchedVGGT(MINI, SIZE, plan.seed, not options.plain, bf16=device.type == "cuda").to(device)
    trainer = Trainer(model, plan)
    begin(trainer, options)

    def on_step(net: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(net, stream.batch(step))

    trainer.run(on_step, options.minutes, options.out / "log.jsonl", steps=options.steps)
    finish(trainer, options)
    weights = {name.removeprefix("net."): value for name, value in trainer.averaged().items()}
    split(weights, options.out, "vggt-mini")
    if options.scenes:
        from training.evaluate import evaluate_vggt

        summary = evaluate_vggt(MINI, weights, range(options.scenes), device)[0]
        report(summary, trainer.step, options.out)


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of a batch and its parts; errors of the last camera iteration and of the depth for the log."""
    depth, T, _ = losses.normalised(batch.depth, batch.pose, batch.K)
    truth = losses.encode(T, batch.K, (batch.images.shape[-2], batch.images.shape[-1]))
    poses, found, conf = model(batch.images)
    camera = losses.camera_loss(poses, truth)
    dense = losses.depth_loss(found.flatten(0, 1), conf.flatten(0, 1), depth.flatten(0, 1))
    with torch.no_grad():
        last = nn.functional.normalize(poses[-1][..., 3:7], dim=-1)
        cosine = (last * truth[..., 3:7]).sum(-1).abs().clamp(max=1)
        turn = torch.rad2deg(2 * torch.acos(cosine))
        valid = depth > 0
        relative = ((found - depth).abs() / depth.clamp_min(1e-3) * valid).sum() / valid.sum()
        shift = (poses[-1][..., :3] - truth[..., :3]).norm(dim=-1)
    facts = {"camera": camera, "depth": dense, "turn_deg": turn.mean(), "shift": shift.mean(), "absrel": relative}
    return 5 * camera + dense, facts


def add_arguments(parser: argparse.ArgumentParser, plan: Plan) -> None:
    parser.add_argument("--minutes", type=float, default=8.0, help="length of this piece")
    parser.add_argument("--steps", type=int, help="steps of this piece, if fewer")
    parser.add_argument("--state", type=Path, required=True, help="checkpoint to continue and to leave")
    parser.add_argument("--initial", type=Path, nargs="*", default=[], help="weights to start from (safetensors parts)")
    parser.add_argument("--out", type=Path, required=True, help="folder for log and weights")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes evaluated at the end; 0 = none")
    parser.add_argument("--pool", type=int, default=24_000, help="training rooms")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plain", action="store_true", help="without torch.compile")
    for name in ("seed", "images", "total", "rate", "warmup", "average"):
        value = getattr(plan, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)


def prepare(options: argparse.Namespace) -> tuple[Plan, torch.device, Stream]:
    """The plan, the device and the data."""
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{name: getattr(options, name) for name in ("seed", "images", "total", "rate", "warmup", "average")})
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    begin = time.monotonic()
    pool = make_pool(options.pool, torch.device("cpu"), options.workers)  # workers fork before CUDA starts
    from training.fast import moved

    pool = moved(pool, device)
    print(f"pool: {options.pool} rooms in {time.monotonic() - begin:.1f} s", flush=True)
    return plan, device, Stream(pool, SIZE, plan.images, plan.seed, not options.plain)


def begin(trainer: Trainer, options: argparse.Namespace) -> None:
    """Continue from the checkpoint, else start from given weights with a fresh optimiser, else from scratch."""
    if resume(trainer, options.state):
        print(f"continue at step {trainer.step}", flush=True)
    elif options.initial:
        from safetensors.torch import load_file

        parts = {published(name): value.float() for path in options.initial for name, value in load_file(path).items()}
        with torch.no_grad():
            for name, p, mean in zip(trainer.names, trainer.parameters, trainer.average, strict=True):
                p.copy_(parts[published(name)])
                mean.copy_(p)


def finish(trainer: Trainer, options: argparse.Namespace) -> None:
    save(trainer, options.state)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
    print(f"stopped at step {trainer.step}, peak memory {peak:.1f} GiB", flush=True)


def report(summary: dict[str, float], step: int, out: Path) -> None:
    print(json.dumps({"step": step, **summary}), flush=True)
    (out / "metrics.json").write_text(json.dumps({"step": step, **summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
