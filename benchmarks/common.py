"""What the benchmarks on a GPU do alike: name the machine, time a call, watch layers, check. Needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.lowbit.support import full_fp32


def host(device: str | torch.device = "cuda") -> dict[str, Any]:
    """How every record begins: device, version of PyTorch, date."""
    return {"device": device_name(device), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def device_name(device: str | torch.device) -> str:
    """The card's name, or cpu."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def call_ms(call: Callable[[], object], device: str | torch.device = "cuda") -> float:
    """Milliseconds of one call, which is waited for: by CUDA events on the current stream, on the CPU by the clock."""
    if torch.device(device).type == "cpu":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    event: Any = torch.cuda.Event  # torch leaves it untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def largest_inputs(module: torch.nn.Module, feeds: Iterable[Mapping[str, Tensor]], device: str) -> dict[str, float]:
    """Largest absolute input of every Linear of an FP32 module on `device`, by path, in order of first use."""
    seen = dict[str, float]()

    def look(path: str, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[path] = max(seen.get(path, 0.0), float(inputs[0].abs().amax()))

    linears = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(partial(look, path)) for path, layer in linears]
    try:
        with torch.inference_mode(), full_fp32(device):
            for feed in feeds:
                module(*(value.to(device) for value in feed.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def check(name: str, run: Callable[[], str]) -> dict[str, Any]:
    """A check passes unless it raises; what it returns is kept as evidence."""
    try:
        return {"name": name, "passed": True, "detail": run()}
    except Exception as error:
        return {"name": name, "passed": False, "detail": f"{type(error).__name__}: {error}"}


def refused(run: Callable[[], object], *words: str) -> str:
    """What the ReconError says that `run` raises; it must raise one, with these words in it."""
    try:
        run()
    except ReconError as error:
        said = str(error)
    else:
        raise AssertionError("nothing was raised")
    assert all(word in said for word in words), f"another message: {said}"
    return said


def say(checks: list[dict[str, Any]]) -> None:
    """Every check in a line: whether it passed, and its evidence."""
    for entry in checks:
        print("ok    " if entry["passed"] else "FAILED", entry["name"], "|", entry["detail"][:300].replace("\n", " "))
