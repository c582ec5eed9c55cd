"""Export: a torch module becomes an ONNX file that has been simplified, loaded and compared with the module.

Opset 20 is the default: `Gelu` is one node since 20, attention is still MatMul-Softmax-MatMul, which ONNX Runtime and
every TensorRT 10 and 11 fuse (opset 23's `Attention` node needs TensorRT 10.14, and has no FP32 kernel there).
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.network import Network

if TYPE_CHECKING:
    import onnx
    import torch

    from recon.compare import OutputError

log = logging.getLogger(__name__)

OPSETS = range(17, 24)
OLDEST_OF_TORCH = 18  # 17 is rewritten from it
SIMPLIFY_LIMIT = 1_900_000_000  # bytes of weights; onnxsim works on one protobuf, which ends at 2 GiB
EXAMPLE_SEED, CHECK_SEED = 0, 1000  # the check must not see the example that the graph was traced with

# One MatMul and one Add per Linear is what later quantisation looks for, and every engine fuses the pair itself;
# as Gemm the same layer needs two Reshapes around it, and q, k and v in one product have one scale and no module path.
SKIPPED_OPTIMISERS = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched", "fuse_qkv"]


@dataclass
class ExportOptions:
    """How networks become ONNX."""

    opset: int = 20
    """ONNX operator set, 17 to 23. 20 for TensorRT 10.0 and later; lower ones decompose GELU. 17 is for
    TensorRT 8."""
    simplify: bool = True
    """Fold constants and merge nodes with onnxsim. The plain graph is kept, and the reason logged, when that fails."""
    tolerance: float = 1e-4
    """Largest relative L2 error of any output of the file in ONNX Runtime against torch FP32."""

    def check(self) -> None:
        if self.opset not in OPSETS:
            rule = f"must lie in {OPSETS.start} to {OPSETS.stop - 1}"
            raise ReconError(f"export.opset={self.opset}: {rule}", "20 suits TensorRT 10.0 and later")
        if not 0 < self.tolerance < 1:
            raise ReconError(f"export.tolerance={self.tolerance}: must lie between 0 and 1", "1e-4 is the default")


def export(network: Network, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write `out` (its weights beside it in `<name>.data`) and return facts for its manifest.

    Weights are referred to by file name alone, so the pair may be moved together.

    Raises:
        ReconError: an operator cannot be exported (named), or the file does not compute what the module does.
    """
    options.check()
    start = time.perf_counter()
    module = network.load().eval()
    with _quiet():
        program = _trace(network, module, options)
    plain = _tidied(program.model, options)
    before = _operators_of(plain)
    reason = _simplified_to(plain, out, options)
    if not reason:
        _lower(out, options)
        errors = _errors(network, module, out)
        if not all(error.passes(options.tolerance) for error in errors.values()):
            worst = max(error.rel_l2 for error in errors.values())
            reason = f"the simplified graph differs from torch by {worst:.1e} relative L2"
    if reason:
        if options.simplify:
            log.warning("%s is not simplified: %s", out.name, reason)
        _save_plain(plain, out)
        _lower(out, options)
        errors = _errors(network, module, out)
    _require(errors, options, out)
    return {**_facts(out, before, reason, errors), "export_seconds": time.perf_counter() - start}


def versions() -> dict[str, str]:
    """Versions of the tools whose output the file is: part of its cache key. Imports none of them."""
    return {package: _version(package) for package in ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")}


def _version(package: str) -> str:
    """`none` for a package that is not there: graphs are then not simplified, which the manifest also says."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that no network here uses, and without its step-by-step accounts."""
    levels = {"torch.onnx._internal.exporter": logging.ERROR, "onnx_ir": logging.WARNING, "onnxscript": logging.WARNING}
    children = "torch.onnx._internal.exporter._registration"  # torch gives each of its modules a level of its own
    noisy = {logging.getLogger(name): level for name, level in [*levels.items(), (children, logging.ERROR)]}
    before = {logger: logger.level for logger in noisy}
    for logger, level in noisy.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _trace(network: Network, module: torch.nn.Module, options: ExportOptions) -> Any:
    """The `torch.onnx.ONNXProgram` of the module at the network's geometry."""
    import torch

    example = network.example(EXAMPLE_SEED)
    try:
        program = torch.onnx.export(
            module,
            tuple(example[name] for name in network.inputs),
            dynamo=True,
            opset_version=max(options.opset, OLDEST_OF_TORCH),
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            verbose=False,
        )
    except Exception as error:  # the exporter raises many unrelated types, some of them private
        raise ReconError(
            f"{network.name}: cannot be exported to ONNX opset {options.opset}: {_blame(error)}",
            "write that operation in terms that ONNX has; engine=torch runs the module as it is",
        ) from error
    assert program is not None, "dynamo=True returns a program"
    return program


def _blame(error: BaseException) -> str:
    """The operator that stopped the export and the innermost reason, in one line."""
    chain, texts = error, [str(error)]
    while chain.__cause__ is not None:
        chain = chain.__cause__
        texts.append(str(chain))
    text = "\n".join(texts)
    reason = next((line.strip() for line in texts[-1].splitlines() if line.strip()), type(chain).__name__)
    found = re.search(
        r"target=([\w.:]+)|No ONNX function found for <OpOverload\(op='([\w.:]+)'|(aten[.:]+[\w.]+)", text
    )
    operator = next((group for group in found.groups() if group), "") if found else ""
    return f"operator {operator.removeprefix('torch.ops.')}: {reason}" if operator else reason


def _tidied(model: Any, options: ExportOptions) -> Any:
    """Without stack traces (paths of this machine, and different bytes on every machine), at a stated IR version."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    model.ir_version = 10 if options.opset <= 22 else 11  # older ONNX Runtimes refuse a higher one than needed
    model.producer_version = version("torch")
    return model


def _simplified_to(model: Any, out: Path, options: ExportOptions) -> str:
    """Simplify and write `out`; returns why not, or an empty string."""
    import onnx_ir

    if not options.simplify:
        return "export.simplify=false"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > SIMPLIFY_LIMIT:
        return f"{size / 1e9:.1f} GB of weights, and onnxsim works on one protobuf, which ends at 2 GiB"
    if find_spec("onnxsim") is None:
        return "the package onnxsim is not installed"
    proto = onnx_ir.to_proto(model)
    try:
        import onnxsim

        simplified, agreed = onnxsim.simplify(proto, skipped_optimizers=SKIPPED_OPTIMISERS)
        if not agreed:
            return "onnxsim's own check failed"
        _restore_module_paths(proto, simplified)
        _save(simplified, out)
    except Exception as error:  # a C++ library: whatever it throws, the plain graph is as good
        return f"onnxsim failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return ""


def _operators_of(model: Any) -> dict[str, int]:
    """Node counts by operator of an `onnx_ir.Model`, sorted by name."""
    names = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph]
    return {name: names.count(name) for name in sorted(set(names))}


def _restore_module_paths(plain: onnx.ModelProto, simplified: onnx.ModelProto) -> None:
    """Give nodes that kept an output back the module path that onnxsim drops: certificates name layers by it."""
    known = {output: node.metadata_props for node in plain.graph.node for output in node.output}
    for node in simplified.graph.node:
        for output in node.output:
            if output in known and not node.metadata_props:
                node.metadata_props.extend(known[output])


def _save_plain(model: Any, out: Path) -> None:
    import onnx_ir

    _clear(out)
    onnx_ir.save(model, out, external_data=f"{out.name}.data", size_threshold_bytes=1024)


def _save(model: onnx.ModelProto, out: Path) -> None:
    import onnx

    _clear(out)  # onnx appends to an existing data file
    onnx.save_model(model, str(out), save_as_external_data=True, location=f"{out.name}.data", size_threshold=1024)


def _lower(out: Path, options: ExportOptions) -> None:
    if options.opset < OLDEST_OF_TORCH:
        from recon.graph.lower import lower_file

        lower_file(out)


def _clear(out: Path) -> None:
    for file in (out, out.with_name(out.name + ".data")):
        file.unlink(missing_ok=True)


def _errors(network: Network, module: torch.nn.Module, path: Path) -> dict[str, OutputError]:
    """Error of the file in ONNX Runtime against torch on a fresh example."""
    from recon.compare import compare
    from recon.engines.onnxruntime import OnnxRuntime
    from recon.engines.torch import TorchSession

    with OnnxRuntime(name="onnxruntime").open(path, "basic") as candidate:
        reference = TorchSession(network, module)
        return compare(reference, candidate, [network.example(CHECK_SEED)], finite=False)


def _require(errors: dict[str, OutputError], options: ExportOptions, out: Path) -> None:
    from recon.compare import require

    require(errors, options.tolerance, f"{out.name} in ONNX Runtime")


def _facts(out: Path, before: dict[str, int], reason: str, errors: dict[str, OutputError]) -> dict[str, Any]:
    import onnx

    from recon.engines.onnxruntime import operators
    from recon.engines.ort.session import data_file

    model = onnx.load(str(out), load_external_data=False)
    after = operators(out)
    return {
        "opset": next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "simplified": not reason,
        "not_simplified_because": reason,
        "ops_before": before,
        "ops": after,
        "nodes_before": sum(before.values()),
        "nodes": sum(after.values()),
        "initializers": len(model.graph.initializer),
        "bytes": sum(file.stat().st_size for file in (out, data_file(out)) if file.exists()),
        "error_against_torch_fp32": {name: asdict(error) for name, error in errors.items()},
        "versions": versions(),
    }
