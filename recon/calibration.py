"""Calibration: ranges of a network's values over real frames, for INT8, FP8 and FP16.

Two things are measured. The inputs of every layer (`torch.nn.Linear`) in the torch module: their largest absolute value
and a histogram, from which `method` reads the range that a Q/DQ pair covers. And the largest absolute value of every
float value of the FP32 ONNX graph, on which the FP16 conversion decides. The result is an .npz without pickled objects.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recon.artifact import content_key
from recon.errors import ReconError
from recon.formats import Ranges

if TYPE_CHECKING:
    from recon.config import Config
    from recon.network import Network
    from recon.sources import Source

METHODS = ("max", "percentile", "entropy")
VERSION = 1


@dataclass
class CalibrationOptions:
    """Which frames are looked at, and how a range is read off them."""

    batches: int = 8
    """Inputs of the network that are looked at."""
    path: str | None = None
    """Folder, glob, .npy or .npz with the frames, in place of the configured source. Float arrays are what the network
    takes, (views,3,H,W) or (N,views,3,H,W); uint8 arrays and images are preprocessed."""
    file: str | None = None
    """Ranges that an earlier calibration wrote, or a folder of them; refused unless model, geometry, data and the
    options here are the same."""
    method: str = "max"
    """max: nothing is cut off. percentile: outliers beyond `percentile` are. entropy: the cut that loses least
    information (KL divergence), as in TensorRT's own former calibrator."""
    percentile: float = 99.99
    """Share of the absolute values that lie within the range, percent; for method=percentile."""
    bins: int = 2048
    """Bins of the histograms."""
    skip_special_tokens: bool = False
    """Leave class, camera and register tokens out of the statistics: they may be far larger than patch tokens, and are
    then cut off."""

    def check(self) -> None:
        """Raises ReconError for an impossible value."""
        rules = {
            "batches": (self.batches >= 1, "must be at least 1"),
            "method": (self.method in METHODS, f"choose from {', '.join(METHODS)}"),
            "percentile": (50 < self.percentile <= 100, "must be above 50, at most 100"),
            "bins": (256 <= self.bins <= 65536 and self.bins % 256 == 0, "must be a multiple of 256, up to 65536"),
            "file": (self.file is None or Path(self.file).exists(), "no such file or folder"),
        }
        for key, (good, rule) in rules.items():
            if not good:
                raise ReconError(
                    f"calibration.{key}={getattr(self, key)}: {rule}", f"the default is {getattr(type(self), key)}"
                )

    def settings(self) -> dict[str, Any]:
        """What the ranges depend on beside data and network; where files lie does not matter."""
        return {key: value for key, value in asdict(self).items() if key not in ("file", "path")}


def data_key(options: CalibrationOptions, source: Source, views: int) -> str:
    """Content hash of the frames that calibration would look at, as pixels, with `views` of them per input.

    Raises:
        ReconError: there are no such frames.
    """
    from recon.frames import data_hash

    return data_hash(options, source, views)


def calibrate(network: Network, base: Path | None, out: Path, config: Config, role: str, key: str) -> dict[str, Any]:
    """Write the ranges of a network to `out` (.npz) and return facts for its manifest.

    base: the network's FP32 ONNX file; None for an engine that takes no graph: layers' inputs alone are looked at then.
    role: `model` or `depth`. key: identity of model, geometry, options and data.

    Raises:
        ReconError: frames that cannot be used (before anything expensive), or `calibration.file` is of another key.
    """
    from recon.frames import sample

    options = config.calibration
    if options.file is not None:
        given = _given(Path(options.file), network, out.name)
        return _taken_over(given, out, network, config, key, graph=base is not None)
    from recon.observe import graph_maxima, layer_inputs

    found = sample(config, network, role, options.batches)
    option = config.model if role == "model" else config.depth
    specials = option.special_tokens() if options.skip_special_tokens else (0, 0)
    observers = layer_inputs(network, found.feeds, options.bins if options.method != "max" else 0, specials)
    inputs = {path: observer.range(options.method, options.percentile) for path, observer in observers.items()}
    largest = {path: observer.largest for path, observer in observers.items()}
    values = graph_maxima(base, found.feeds) if base is not None else {}
    meta = {
        "version": VERSION,
        "key": key,
        "method": options.method,
        "count": len(found.feeds),
        "source": found.origin,
        **_identity(network, config),
    }
    _write(out, inputs, largest, values, meta)
    return _facts(meta, inputs, largest, values) | {"frames": [list(ids) for ids in found.ids]}


def read_ranges(path: Path) -> Ranges:
    """The ranges that `calibrate` wrote.

    Raises:
        ReconError: the file is missing, damaged, or of another version.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Ranges, dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as data:
            meta = json.loads(str(data["meta"]))
            pairs = {
                part: dict(zip(data[f"{part}_names"].tolist(), data[part].tolist(), strict=True))
                for part in ("inputs", "values")
            }
    except FileNotFoundError as error:
        raise ReconError(f"{path}: no such calibration", "run stages=[calibrate]") from error
    except Exception as error:  # zip, zlib, JSON and numpy each raise their own for a damaged file
        raise ReconError(
            f"{path}: is no calibration, or damaged: {error}", "delete it and run stages=[calibrate]"
        ) from error
    if meta.get("version") != VERSION:
        raise ReconError(f"{path}: of version {meta.get('version')}, not {VERSION}", "run stages=[calibrate] again")
    ranges = Ranges(pairs["inputs"], pairs["values"], meta["method"], meta["key"], meta["count"], meta["source"])
    return ranges, meta


def _write(
    out: Path, inputs: dict[str, float], largest: dict[str, float], values: dict[str, float], meta: dict[str, Any]
) -> None:
    arrays = {
        "inputs_names": np.array(list(inputs), str),
        "inputs": np.array(list(inputs.values()), np.float64),
        "inputs_largest": np.array([largest[path] for path in inputs], np.float64),
        "values_names": np.array(list(values), str),
        "values": np.array(list(values.values()), np.float64),
        "meta": np.array(json.dumps(meta, sort_keys=True)),
    }
    np.savez(out, **arrays)  # type: ignore[arg-type]


def _identity(network: Network, config: Config) -> dict[str, Any]:
    """Parts of the key by name, so that a refusal can say what changed."""
    views = next(iter(network.inputs.values())).shape[0]
    return {
        "network": network.name,
        "settings": content_key(network.settings),
        "weights": network.weights_key,
        "geometry": {name: list(spec.shape) for name, spec in network.inputs.items()},
        "data": data_key(config.calibration, config.source, views),
        "options": config.calibration.settings(),
    }


def _facts(
    meta: dict[str, Any], inputs: dict[str, float], largest: dict[str, float], values: dict[str, float]
) -> dict[str, Any]:
    cut = {path: value / largest[path] for path, value in inputs.items() if largest.get(path)}
    return {
        **{name: meta[name] for name in ("key", "method", "count", "source", "data", "options")},
        "layers": len(inputs),
        "values": len(values),
        "largest_input": max(inputs.values(), default=0.0),
        "largest_value": max(values.values(), default=0.0),
        "smallest_share_of_max": min(cut.values(), default=1.0),
    }


def _given(file: Path, network: Network, name: str) -> Path:
    """In a folder, the file of the wanted name, else the one that holds a graph's values as well."""
    found = file
    if file.is_dir():
        found = file / name if (file / name).is_file() else file / f"{network.name}.npz"
    if not found.is_file():
        raise ReconError(f"calibration.file={file}: no {found.name} in it", "run stages=[calibrate] without it first")
    return found


def _taken_over(file: Path, out: Path, network: Network, config: Config, key: str, graph: bool) -> dict[str, Any]:
    """Ranges made earlier, after making sure that they are of this model, geometry and data; graph: and graph."""
    ranges, meta = _read(file)
    now = _identity(network, config)
    changed = [name for name, value in now.items() if meta.get(name) != value]
    if ranges.key != key and (changed or graph):
        changed = changed or ["exported graph"]
        stated = {name: (meta.get(name), now.get(name)) for name in changed if name in ("network", "geometry")}
        detail = "".join(f"; {name} was {was}, is {is_now}" for name, (was, is_now) in stated.items())
        raise ReconError(
            f"calibration.file={file}: made for another {', another '.join(changed)}{detail}",
            "leave calibration.file out to calibrate anew; a folder may hold one file per network",
        )
    if file.resolve() != out.resolve():
        shutil.copyfile(file, out)
    return _facts(meta, dict(ranges.inputs), {}, dict(ranges.values)) | {"taken_from": str(file)}
