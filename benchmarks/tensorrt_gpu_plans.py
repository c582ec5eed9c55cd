"""Graphs and plans for tensorrt_gpu.py: exported, quantised, lowered for an older builder, and built."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import largest_inputs

from recon.artifact import content_key, manifest_path, obtain
from recon.depth.nets.depth_anything import build
from recon.depth.nets.images import preprocess
from recon.engines import Build
from recon.engines.tensorrt import TensorRT
from recon.engines.trt import targets
from recon.errors import ReconError
from recon.export import ExportOptions, export
from recon.formats import Ranges
from recon.geometry.preprocess import example_images
from recon.models.vggt import VGGT
from recon.network import Network, TensorSpec
from recon.precision import Precision
from recon.quant.none import NoQuant
from recon.quantise import make_recipe, write

log = logging.getLogger(__name__)

CALIBRATION_SEEDS = range(8)
KEEP = ["camera_head.*"]  # small, iterated, and what poses depend on most
PROFILES = [
    {"images": {"min": [1, 3, 32, 32], "opt": [2, 3, 64, 64], "max": [4, 3, 96, 96]}},
    {"images": {"min": [5, 3, 32, 32], "opt": [8, 3, 64, 64], "max": [8, 3, 128, 128]}},
]


def network_of(name: str) -> Network:
    """da2-<side>, or vggt-twin with two views. Of a side of 384 the patches of 14 see 378."""
    if name == "vggt-twin":
        return VGGT(name=name, preset=name, weights="seeded:0", height=112, width=112).network(2)
    side = int(name.partition("-")[2])
    size = (side, side)

    def example(seed: int) -> dict[str, torch.Tensor]:
        image = torch.from_numpy(example_images(1, size, seed)).permute(0, 3, 1, 2)
        return {"pixel_values": preprocess(image, size).contiguous()}

    load = partial(build, size, seed=0, architecture="small", folder=None)
    return Network(name, {"pixel_values": TensorSpec((1, 3, *size))}, ("disparity",), "seeded:0", load, example)


def prepared(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The FP32 graph of a network, and the one with INT8 Q/DQ, ready for the builder; reused from the work folder."""
    network, start = network_of(name), time.perf_counter()
    base, int8 = (arguments.work / f"{name}_{precision}.onnx" for precision in ("fp32", "int8"))
    if not int8.exists():
        export(network, base, ExportOptions(opset=18 if arguments.builder else 20, simplify=False))
        mode = NoQuant(name="none", keep=KEEP)
        recipe = make_recipe(network, mode, Precision(name="int8", rest="fp32"), ranges_of(network))
        facts = write(network, base, recipe, int8)
        log.info("%s: %d INT8 layers, %s", name, len(recipe.layers), facts["check"])
    log.info("%s is ready after %.0f s", name, time.perf_counter() - start)
    graphs = [{"name": name, "precision": "fp16", "onnx": base}, {"name": name, "precision": "int8", "onnx": int8}]
    for graph in graphs:
        graph |= {"network": network, "base": base, "profiles": []}
        graph["for_builder"] = lowered(graph["onnx"]) if arguments.builder else graph["onnx"]
    return graphs


def ranges_of(network: Network) -> Ranges:
    """Largest absolute input of every Linear over the example images."""
    found = largest_inputs(network.load().eval(), map(network.example, CALIBRATION_SEEDS), "cpu")
    return Ranges(found, {}, "max", "examples", len(CALIBRATION_SEEDS), "network.example")


def lowered(path: Path) -> Path:
    """The same graph in ONNX opset 17, for builders of TensorRT 8: what 18 changed is undone.

    Its parser takes no INT8 constants: a quantised weight becomes its dequantised values and the same Q/DQ pair after
    them, which gives back the same codes.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    constants = {item.name: item for item in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Split" and len(node.input) == 1:
            keep(node, lambda entry: entry.name != "num_outputs")  # equal parts are what 17 gives without sizes
        elif node.op_type == "Resize":
            keep(node, lambda entry: entry.name not in ("antialias", "keep_aspect_ratio_policy") or entry.i != 0)
        elif node.op_type.startswith("Reduce") and len(node.input) == 2 and node.op_type != "ReduceSum":
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            keep(node, lambda entry: entry.name != "noop_with_empty_axes")
            node.attribute.append(helper.make_attribute("axes", axes))
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            nodes.append(quantised_here(node, constants, model.graph))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    next(item for item in model.opset_import if item.domain in ("", "ai.onnx")).version = 17
    model.ir_version = 8
    out = path.with_name(f"{path.stem}_opset17.onnx")
    onnx.save_model(model, str(out), save_as_external_data=True, location=f"{out.name}.data")
    return out


def quantised_here(node: Any, constants: dict[str, Any], graph: Any) -> Any:
    """A QuantizeLinear before a weight's DequantizeLinear, with the weight in FP32 before it."""
    from onnx import helper, numpy_helper

    codes, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
    along = scale.reshape([-1 if at == axis % codes.ndim else 1 for at in range(codes.ndim)]) if scale.ndim else scale
    name = node.input[0]
    zero = numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{name}.zero")
    graph.initializer.extend([numpy_helper.from_array((codes * along).astype(np.float32), f"{name}.values"), zero])
    graph.initializer.remove(constants.pop(name))
    before = helper.make_node("QuantizeLinear", [f"{name}.values", node.input[1], zero.name], [name], axis=axis)
    del node.input[2:]
    node.input.append(zero.name)
    return before


def keep(node: Any, wanted: Callable[[Any], bool]) -> None:
    """Take away a node's attributes that are not wanted."""
    kept = [entry for entry in node.attribute if wanted(entry)]
    del node.attribute[:]
    node.attribute.extend(kept)


class Dynamic(torch.nn.Module):
    """Convolutions over any number of images of any size: for profiles."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 64, 8, 8), torch.nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(images))).mean((2, 3))


def prepared_dynamic(arguments: argparse.Namespace) -> dict[str, Any]:
    """The graph of `Dynamic` with its profiles, as `prepared` gives those of fixed shapes."""
    torch.manual_seed(0)
    module, path = Dynamic().eval(), arguments.work / "dynamic_fp32.onnx"
    sizes = {0: torch.export.Dim("count", min=1, max=8), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        module, (torch.rand(2, 3, 64, 64),), dynamo=True, opset_version=18, dynamic_shapes=(sizes,),
        input_names=["images"], output_names=["pooled"], verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(path))
    network = Network("dynamic", {"images": TensorSpec((2, 3, 64, 64))}, ("pooled",), "", lambda: module, lambda _: {})
    graph = {"name": "dynamic", "precision": "fp32", "network": network, "onnx": path, "base": path}
    return graph | {"profiles": PROFILES, "for_builder": lowered(path) if arguments.builder else path}


def engine_of(arguments: argparse.Namespace, **knobs: Any) -> TensorRT:
    """engine=tensorrt as the arguments have it."""
    return TensorRT(name="tensorrt", flavour=arguments.flavour, allow_host_code=bool(arguments.builder), **knobs)


def built(graph: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """The plan of a graph with the manifest that loading asks for."""
    path = arguments.work / f"{graph['name']}_{graph['precision']}.engine"

    if manifest_path(path).exists():
        return path  # of an earlier run in this folder

    def make(folder: Path) -> dict[str, Any]:
        out = folder / path.name
        if not arguments.builder:
            source = Build(graph["network"], graph["for_builder"], lambda: None)  # type: ignore[arg-type,return-value]
            return engine_of(arguments, profiles=graph["profiles"]).build(source, out)
        command = [*arguments.builder.split(), str(graph["for_builder"]), str(out)]
        command += ["--fp16"] if graph["precision"] != "fp32" else []
        command += ["--int8"] if graph["precision"] == "int8" else []
        command += ["--profiles", json.dumps(graph["profiles"])] if graph["profiles"] else []
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stdout[-1500:] + done.stderr[-500:]
            raise ReconError(f"{path.name}: the builder ended with {done.returncode}: {said}")
        log.info("%s built in %.0f s", path.name, time.perf_counter() - start)
        return {"plan": plan_facts(graph, arguments), "build_seconds": time.perf_counter() - start}

    key = content_key([graph["name"], graph["precision"], arguments.built_by, time.time()])
    return obtain(path, "engine", key, make).path


def plan_facts(graph: dict[str, Any], arguments: argparse.Namespace, **other: Any) -> dict[str, Any]:
    """What the manifest of a plan says that another program has built; `other` replaces facts, to forge one."""
    facts = {
        "flavour": "tensorrt", "version": arguments.built_by, "targets": [targets.here()],
        "gpu": torch.cuda.get_device_name(), "version_compatible": True, "host_code": True,
        "profiles": graph["profiles"],
    }  # fmt: skip
    return facts | other
