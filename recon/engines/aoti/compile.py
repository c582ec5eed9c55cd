"""Torch module and recipe to a package: torch.export, Inductor's ahead-of-time compiler, and what is told beside it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.artifact import locked
from recon.engines import Build, Session
from recon.engines.aoti import form
from recon.engines.aoti.inspection import inspect
from recon.engines.aoti.package import IDENTITY, Identity, read, trust
from recon.engines.aoti.record import Recorder
from recon.errors import ReconError
from recon.formats import Recipe
from recon.kernels.form import FastNetwork
from recon.lowbit import EXAMPLE_SEEDS
from recon.lowbit.apply import Wide, prepare, stored_bytes
from recon.lowbit.support import device_name
from recon.network import Network, TensorSpec

log = logging.getLogger(__name__)

LOGGERS = ("torch._inductor", "torch.export", "torch._export")
STARVED = (
    "out of memory", "can't allocate memory", "not enough memory", "killed signal", "signal killed", "std::bad_alloc",
)  # fmt: skip


def build(
    source: Build, out: Path, device: str, max_autotune: bool, kernels: str, fp8_scores: bool = False
) -> dict[str, Any]:
    """Write the package `out` and its log `<out>.log`; facts for the manifest. kernels, fp8_scores: the engine's knobs.

    Where recon's kernels are tried first and Inductor compiles after them, the log has both attempts.

    Raises:
        ReconError: no C++ compiler, not enough memory, an operation that cannot be exported or compiled, or
            kernels=recon or fp8_scores where recon's kernels cannot carry out the recipe.
    """
    reason, recipe = "", source.recipe
    _log_of(out).unlink(missing_ok=True)  # of an earlier build
    if kernels != "inductor" and not (reason := _unfit(kernels, device, max_autotune)):
        made = recipe()
        with build_log(out, "recon's kernels"), translated(source.network, device):
            found = form.converted(source.network.load(), source, made, device, fp8_scores)
            if not isinstance(found, str):
                facts = form.write(found, source, made, out, device)
                return _facts(out, made, []) | facts | _route(kernels, "recon", "", found if fp8_scores else None)
        reason, recipe = found, lambda: made
    if kernels == "recon" or fp8_scores:
        knob = "engine.kernels=recon" if kernels == "recon" else "engine.fp8_scores=true"
        without = " engine.fp8_scores=false" if fp8_scores else ""  # which Inductor's kernels refuse
        raise ReconError(f"{knob}: {reason}", f"engine.kernels=inductor{without} compiles the plain network")
    return _compile(source, recipe(), out, device, max_autotune) | _route(kernels, "inductor", reason)


def _unfit(kernels: str, device: str, max_autotune: bool) -> str:
    """Why recon's kernels are not tried; empty when they are."""
    if kernels == "auto" and device == "cpu":
        return "recon's kernels are for GPUs of compute capability 9.0"
    if max_autotune:
        return "engine.max_autotune=true asks for Inductor's kernels"
    return form.why_not_on(device)


def _route(requested: str, effective: str, reason: str, scored: FastNetwork | None = None) -> dict[str, Any]:
    """What was asked for and what was done, for the manifest's effective settings. scored: with FP8 scores."""
    said: dict[str, Any] = {"requested": requested, "effective": effective} | ({"reason": reason} if reason else {})
    if scored is not None:
        said["fp8_scores_in_blocks"] = sum(getattr(block, "low_scores", False) for block in scored.modules())
    return {"effective": {"kernels": said}}


def _compile(source: Build, recipe: Recipe, out: Path, device: str, max_autotune: bool) -> dict[str, Any]:
    """The plain network through torch.export and Inductor."""
    require_compiler()
    start, network = time.perf_counter(), source.network
    example = network.example(EXAMPLE_SEEDS[0])
    examples = [{name: network.example(seed)[name] for name in network.inputs} for seed in EXAMPLE_SEEDS]
    module = prepare(network.load(), recipe, examples).requires_grad_(False)
    with build_log(out, "Inductor"), translated(network, device):
        arguments = tuple(example[name].to(device) for name in network.inputs)
        module = module.to(device)
        with torch.no_grad():
            program = torch.export.export(module, arguments, strict=False)
        exported = time.perf_counter()
        identity = Identity(
            torch=str(torch.__version__),
            device=device.partition(":")[0],
            hardware=device_name(device),
            inputs=dict(network.inputs),
            outputs=_outputs(program, network),
            threads=torch.get_num_threads(),
            rest=recipe.rest,
        )
        with _alone():
            files = _compiled(program, arguments, module, identity, max_autotune)
            _packaged(files, out, identity)
    trust(out)
    times = {"export_seconds": exported - start, "build_seconds": time.perf_counter() - start}
    wide = [name for name, layer in module.module.named_modules() if isinstance(layer, Wide)]  # type: ignore[union-attr,operator]
    return _facts(out, recipe, wide) | {"weights_mib": stored_bytes(module) / 2**20} | times


def require_compiler() -> None:
    """Raise ReconError unless there is a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ReconError(
            f"engine=inductor compiles C++, and there is no {compiler} on the PATH",
            "install it (Debian, Ubuntu: apt-get install g++), name another with CXX=..., or engine=onnxruntime",
        )


def _compiled(
    program: torch.export.ExportedProgram,
    arguments: tuple[Tensor, ...],
    module: nn.Module,
    identity: Identity,
    max_autotune: bool,
) -> list[str]:
    """Files that make up the package; the lowered graph's products go into `identity`."""
    import torch._inductor
    from torch._inductor import config

    recorder = Recorder(module)
    patches: dict[str, Any] = {"post_grad_custom_post_pass": recorder}
    if hasattr(config.trace, "provenance_tracking_level"):
        patches["trace.provenance_tracking_level"] = 2  # kernel names by graph node, without stack traces of source
    options = {"aot_inductor.package": True, "max_autotune": max_autotune}
    with config.patch(patches):
        files = torch._inductor.aot_compile(program.module(), arguments, options=options)
    assert isinstance(files, list)
    identity.products = recorder.products
    named = [str(file) for file in files]
    for file in named:
        require_shared_runtime(Path(file))
    return named


def require_shared_runtime(library: Path) -> None:
    """Raise ReconError where the compiler has put its own C++ runtime into a library.

    Two runtimes in one process do not share their locales: PyTorch's loader, which runs a regular expression in the
    library, then ends the process with a segmentation fault.
    """
    if library.suffix == ".so" and not any(name in library.read_bytes() for name in (b"libstdc++.so", b"libc++.so")):
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
        raise ReconError(
            f"engine=inductor: the C++ compiler {compiler} links its runtime statically, and PyTorch would crash when "
            "it loads the package",
            "name one that does not, CXX=/usr/bin/g++ for instance",
        )


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time compiles in Inductor's cache: what it writes there is named by its content, so two that
    compile the same network would delete each other's files. Each uses all cores anyway."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "recon"):
        yield


def _packaged(files: list[Any], out: Path, identity: Identity) -> None:
    from torch.export.pt2_archive._package import package_pt2

    named = out if out.suffix == ".pt2" else out.with_name(f"{out.name}.pt2")
    package_pt2(str(named), aoti_files=files, extra_files={IDENTITY: identity.to_json()})
    if named != out:
        named.replace(out)
    for file in files:  # Inductor leaves them in its cache, weights included
        Path(file).unlink(missing_ok=True)


def _outputs(program: torch.export.ExportedProgram, network: Network) -> dict[str, TensorSpec]:
    values = [node.meta["val"] for node in program.graph.output_node().args[0]]  # type: ignore[union-attr]
    return {
        name: TensorSpec(tuple(int(size) for size in value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in zip(network.outputs, values, strict=True)
    }


def _facts(out: Path, recipe: Recipe, kept_fp32: list[str]) -> dict[str, Any]:
    seen, (identity, kernels) = inspect(out), read(out)
    by_module = {module: layer for layer in seen.layers for module in layer.modules}
    return {
        "layers": {path: asdict(asked) for path, asked in recipe.layers.items()},
        "infos": {path: asdict(info) for path, info in recipe.infos.items()},
        "rest": recipe.rest,
        "graph": {
            "products": dict(Counter(f"{layer.op} {layer.compute}" for layer in seen.layers)),
            "weights": dict(Counter(layer.weight for layer in seen.layers if layer.weight)),
            "modules": {
                path: f"{layer.op} {layer.compute}, weight {layer.weight}" for path, layer in by_module.items()
            },
        },
        "kept_fp32": kept_fp32,
        "kernels": dict(Counter(name.partition(":")[0] for name in kernels or (layer.kernel for layer in seen.layers))),
        "bytes": out.stat().st_size,
        "threads": identity.threads,
    }


@contextmanager
def build_log(out: Path, attempt: str) -> Iterator[None]:
    """Add what torch says while it compiles to `<out>.log`, beside the package, instead of on the terminal."""
    file = logging.FileHandler(_log_of(out))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.emit(logging.LogRecord("recon", logging.INFO, "", 0, f"{out.name}: {attempt}", None, None))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [file], False
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        for text in dict.fromkeys(f"{warning.category.__name__}: {warning.message}" for warning in caught):
            file.emit(logging.LogRecord("warnings", logging.WARNING, "", 0, text, None, None))
        file.close()


def _log_of(out: Path) -> Path:
    return out.with_name(out.name + ".log")


@contextmanager
def translated(network: Network, device: str) -> Iterator[None]:
    """Torch's failures while a network is exported and compiled, as errors that say what to do."""
    try:
        yield
    except ReconError:
        raise
    except Exception as error:  # Inductor's have no common base
        text = str(error).strip() or type(error).__name__
        raise failure(text, network, device) from error


def failure(text: str, network: Network, device: str) -> ReconError:
    """What a message of torch or of the C++ compiler means."""
    last = json.dumps(text.splitlines()[0][:300])
    lower = text.lower()
    if any(sign in lower for sign in STARVED):
        known = network.memory_mib
        need = f"; one FP32 inference of {network.name} needs about {known:.0f} MiB" if known else ""
        return ReconError(
            f"{network.name}: not enough memory on {device} to compile: {last}{need}",
            "fewer views, a smaller input, precision=bf16, or a machine with more memory",
        )
    if "compileerror" in lower.replace(" ", "") or "error: command" in lower or "c++ compile" in lower:
        wrong = next((line for line in text.splitlines() if "error:" in line), text.splitlines()[0])
        return ReconError(
            f"{network.name}: the C++ compiler refused Inductor's code: {wrong.strip()[:300]}",
            "a newer g++ (11 or later), and on CUDA the toolkit's headers (CUDA_HOME)",
        )
    return ReconError(
        f"{network.name}: PyTorch {torch.__version__} cannot compile it for {device}: {last}",
        "engine=torch runs the same formats without compiling; engine=onnxruntime or tensorrt take another way",
    )


def require_finite(session: Session, network: Network, rest: str) -> None:
    """Raise ReconError unless the network's example gives finite outputs."""
    for name, value in session.infer(network.example(EXAMPLE_SEEDS[0])).items():
        if not bool(value.isfinite().all()):
            raise ReconError(
                f"{network.name}: output {name!r} of the compiled package is not finite in {rest}",
                "the number format overflows in this network: choose precision=bf16 or fp32",
            )
