"""The typed configuration: what can be asked for, and what is refused before any work.

A config group option is a dataclass in the group's package (`recon/<package>/<module>.py`), found by folder scan and
registered as `schema/<group>/<module>`; its YAML in `conf/<group>/` names that schema. Nothing else is to be edited to
add one. The composed configuration becomes objects with `to_config`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from recon.accuracy import AccuracyOptions
from recon.benchmark.contract import BenchmarkOptions
from recon.calibration import CalibrationOptions
from recon.component import Component
from recon.depth import Depth
from recon.engines import Engine
from recon.errors import ReconError, Refused
from recon.export import ExportOptions
from recon.fusion import Fusion
from recon.geometry.scale import ScaleOptions
from recon.live.align import Align
from recon.live.stream import StreamOptions
from recon.models import Model
from recon.options import DepthVideoOptions, HandoverOptions, RerunOptions, SensitivityOptions, check_viewer
from recon.precision import Precision
from recon.quant import QuantMode
from recon.sources import Source
from recon.tracking import Tracking

if TYPE_CHECKING:
    from omegaconf import DictConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "conf").is_dir() else HERE.parent  # inside a wheel the two folders lie in the package
CONF, SWEEPS = ROOT / "conf", ROOT / "sweeps"

GROUPS: dict[str, tuple[str, type[Component]]] = {
    "model": ("recon.models", Model),
    "depth": ("recon.depth", Depth),
    "quant_mode": ("recon.quant", QuantMode),
    "precision": ("recon.precision", Precision),
    "engine": ("recon.engines", Engine),
    "source": ("recon.sources", Source),
    "fusion": ("recon.fusion", Fusion),
    "tracking": ("recon.tracking", Tracking),
}

STAGES = (
    "export", "calibrate", "sensitivity", "build", "benchmark", "depth", "reconstruct", "handover", "evaluate", "report"
)  # fmt: skip
ON_REQUEST = ("sensitivity", "depth", "handover")
"""Stages that run only when they are named."""


@dataclass
class Evaluate:
    """What the result is judged against, beside the recorded depth that the source has."""

    reference: str | None = None
    """NPZ with a reference surface: points_mm [N,3] int16 (or points [N,3] in map units), normals, optional `seen`."""
    threshold: float = 0.05
    """Distance for precision, recall and F-score; map units."""
    max_points: int = 200_000
    """Map points judged at most; more are thinned with a fixed seed."""
    board: str | None = None
    """Folder with the corners of a calibration board in the stream, as caliscope exports them: xy_CHARUCO.csv (pixels),
    timestamps.csv, and xyz_CHARUCO.csv (metres) if known. Fixed cameras with time stamps only."""

    def check(self) -> None:
        if not self.threshold > 0:
            raise ReconError(f"evaluate.threshold={self.threshold}: must be positive", "0.05 is 5 cm in a metric map")
        if self.max_points < 1:
            raise ReconError(f"evaluate.max_points={self.max_points}: must be at least 1", "200000 is the default")
        if self.reference is not None and not Path(self.reference).is_file():
            raise ReconError(
                f"evaluate.reference={self.reference}: no such file", "leave it out or give an existing .npz"
            )
        for name in ("xy_CHARUCO.csv", "timestamps.csv") if self.board is not None else ():
            if not (Path(str(self.board)) / name).is_file():
                raise ReconError(f"evaluate.board={self.board}: has no {name}", "leave it out or give such a folder")


@dataclass
class Config:
    """One run. Group options are objects; the rest are plain values."""

    name: str = "demo"
    """Name of the question asked: run folder suffix and MLflow experiment."""
    stages: list[str] = field(default_factory=lambda: [stage for stage in STAGES if stage not in ON_REQUEST])
    """Stages to run, in this order whatever the order given."""
    model: Model = MISSING
    depth: Depth = MISSING
    quant_mode: QuantMode = MISSING
    precision: Precision = MISSING
    engine: Engine = MISSING
    source: Source = MISSING
    fusion: Fusion = MISSING
    tracking: Tracking = MISSING
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    align: Align = field(default_factory=Align)
    stream: StreamOptions = field(default_factory=StreamOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    sensitivity: SensitivityOptions = field(default_factory=SensitivityOptions)
    accuracy: AccuracyOptions = field(default_factory=AccuracyOptions)
    benchmark: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    evaluate: Evaluate = field(default_factory=Evaluate)
    handover: HandoverOptions = field(default_factory=HandoverOptions)
    depth_video: DepthVideoOptions = field(default_factory=DepthVideoOptions)
    rerun: RerunOptions = field(default_factory=RerunOptions)
    output: str = "outputs"
    """Folder for engines, caches, runs and the tracking database."""
    plan: bool = False
    """Print stages, cache hits and memory estimates; run nothing."""
    force: list[str] = field(default_factory=list)
    """Stages to redo although their artifact is there."""
    fresh_bootstrap: bool = False
    """Ignore a cached bootstrap; the same as force=[reconstruct]."""
    save_per_frame_depth: bool = False
    """Write every aligned depth image to depth_metric/ (depth_relative/ when the scale is arbitrary)."""
    viewer: str = "none"
    """none | rerun: write recon.rrd, knobs under `rerun`."""


def register() -> None:
    """Put every schema, the `+quant=` aliases and the sweeps into Hydra's config store."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    # Hydra copies the whole store for every group that it lists, 150 times for --help; entries are copied on loading
    vars(store)["__deepcopy__"] = lambda _: store
    store.store(name="schema", node=Config)
    for group, (package, base) in GROUPS.items():
        for module, cls in options(package, base):
            store.store(group=f"schema/{group}", name=module, node=cls, package=group)
    for path in sorted((CONF / "quant_mode").glob("*.yaml")):
        store.store(
            group="quant", name=path.stem, package="_global_", node={"defaults": [{"override /quant_mode": path.stem}]}
        )
    for path in sorted(SWEEPS.glob("*.yaml")):
        store.store(group="sweep", name=path.stem, package="_global_", node=_sweep(path))


def options(package: str, base: type[Component]) -> Iterator[tuple[str, type[Component]]]:
    """(module name, dataclass) of every option of a group: one per module, found by scanning the package."""
    root = importlib.import_module(package)
    names = (
        [info.name for info in pkgutil.iter_modules(root.__path__) if not info.ispkg]
        if hasattr(root, "__path__")
        else [""]
    )
    for name in names:
        module = importlib.import_module(f"{package}.{name}") if name else root
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if is_dataclass(cls) and issubclass(cls, base) and cls.__module__ == module.__name__:
                yield name or package.rpartition(".")[2], cls


def option(group: str, name: str) -> Component:
    """The object of one option with the values of its YAML, as `<group>=<name>` would compose it.

    Raises:
        ReconError: there is no such option, or it has a value that only a user can give.
    """
    from omegaconf import OmegaConf

    path = CONF / group / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        raise ReconError(f"{group}={name}: no such option", f"options: {', '.join(known)}")
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    schema = dict(options(*GROUPS[group]))[values.pop("defaults")[0].rpartition("/")[2]]
    composed = OmegaConf.merge(OmegaConf.structured(schema), values)
    if missing := sorted(str(key) for key in OmegaConf.missing_keys(composed)):
        if schema.not_built:
            raise Refused(f"{group}={name}: {schema.not_built}", "python -m recon.doctor lists what works here")
        raise ReconError(f"{group}={name} needs {', '.join(f'{group}.{key}' for key in missing)}", "give a value")
    found = OmegaConf.to_object(composed)
    assert isinstance(found, Component)
    return found


def _sweep(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(path)


def to_config(composed: DictConfig, choices: dict[str, Any]) -> Config:
    """Objects from a composed configuration. `choices`: Hydra's chosen option per group.

    Raises:
        ReconError: a key that no schema knows, or `+quant=` against `quant_mode=`.
        Refused: a combination that cannot run.
    """
    from omegaconf import OmegaConf

    unknown_keys(composed)
    alias, mode = choices.get("quant"), choices.get("quant_mode")
    if alias is not None and alias != mode:
        raise ReconError(
            f"+quant={alias} contradicts quant_mode={mode}", "give one of the two; they are the same switch"
        )
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    check(config)
    return config


def unknown_keys(composed: DictConfig) -> None:
    """Hydra lets `+anything=1` through and drops it later; here it is an error that names the nearest known key."""
    from omegaconf import DictConfig, OmegaConf

    def walk(node: DictConfig, where: str) -> None:
        kind = OmegaConf.get_type(node)
        if kind is None or not is_dataclass(kind):
            return
        known = [f.name for f in fields(kind)]
        for key in map(str, node):
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                remedy = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
                raise ReconError(f"unknown key {where}{key}", remedy)
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
                walk(child, f"{where}{key}.")

    walk(composed, "")


def check(config: Config) -> None:
    """Everything that can be refused without touching data.

    Raises:
        ReconError: an impossible value. Refused: a combination that this version cannot run.
    """
    for stage in [*config.stages, *config.force]:
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, 1)
            raise ReconError(
                f"unknown stage {stage!r}", f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(STAGES)}"
            )
    if not config.stages:
        raise ReconError("stages=[]: nothing to do", f"choose from {', '.join(STAGES)}")
    if not config.output:
        raise ReconError("output= is empty", "give a folder (was a shell variable not set?), or leave it out")
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ReconError(
            f"name={config.name}: becomes the end of a folder's name", "give letters, digits and hyphens: name=kitchen"
        )
    check_viewer(config.viewer, config.stages, config.rerun.spawn)
    if "handover" in config.stages and "reconstruct" not in config.stages and config.handover.run is None:
        raise ReconError(
            "stage handover has no run to hand over", "add reconstruct to stages, or give handover.run=DIR"
        )
    if "sensitivity" in config.stages and not (config.quant_mode.layer_format() or config.precision.layer_format()):
        raise ReconError(
            f"stage sensitivity: {config.quant_mode.name} and {config.precision.name} quantise no layer",
            "choose precision=int8 or fp8, or a quant_mode",
        )
    for component in components(config):
        component.check()
    for options in (
        config.scale,
        config.align,
        config.stream,
        config.export,
        config.calibration,
        config.sensitivity,
        config.accuracy,
        config.benchmark,
        config.evaluate,
        config.handover,
        config.depth_video,
        config.rerun,
    ):
        options.check()  # type: ignore[attr-defined]
    _check_pair(config)
    _check_devices(config)


def _check_pair(config: Config) -> None:
    """Refuse formats that the engine, on its device, cannot carry out, and name the nearest pair that it can."""
    if not {"build", "benchmark", "reconstruct", "depth"} & set(config.stages):
        return
    if not (reason := _refusal(config.engine, config.quant_mode, config.precision)):
        return
    mode, precision = config.quant_mode, config.precision
    names = [path.stem for path in sorted((CONF / "precision").glob("*.yaml"))]
    others = [option("precision", name) for name in ("fp16", "bf16", "fp32", *names)]
    pairs = [(mode, other) for other in others] + [
        (option("quant_mode", "none"), other) for other in (precision, *others)
    ]
    for near_mode, near in pairs:
        if not _refusal(config.engine, near_mode, near):  # type: ignore[arg-type]
            remedy = f"the nearest pair that works: quant_mode={near_mode.name} precision={near.name}"
            break
    else:
        remedy = f"engine={config.engine.name} cannot run here at all; python -m recon.doctor says what can"
    raise Refused(f"quant_mode={mode.name} precision={precision.name} engine={config.engine.name}: {reason}", remedy)


def _check_devices(config: Config) -> None:
    """Refuse a map on a GPU with a depth network elsewhere: every image and depth would be copied to and fro."""
    place = str(getattr(config.fusion, "device", "cpu"))
    if "reconstruct" not in config.stages or place == "cpu" or type(config.depth).network is Depth.network:
        return
    engine = config.engine
    where = getattr(engine, "device", "") or ("cpu" if getattr(engine, "provider", "") == "cpu" else "cuda")
    if where.partition(":")[0] != place.partition(":")[0]:
        raise ReconError(
            f"fusion.device={place}: the map is there, and engine={engine.name} runs the depth network on {where}",
            f"engine.device={place} (inductor, torch), engine.provider=cuda (onnxruntime) or engine=tensorrt, or "
            "fusion.device=cpu",
        )


def _refusal(engine: Engine, mode: QuantMode, precision: Precision) -> str:
    formats = [found for found in (mode.layer_format(), precision.layer_format()) if found is not None]
    return engine.refuses(formats, precision.rest_format)


def components(config: Config) -> tuple[Component, ...]:
    """The chosen options, in group order. A stage list that needs no source or map does not check theirs."""
    needed = set(config.stages)
    geometry = bool(needed & {"depth", "reconstruct", "evaluate"})
    return tuple(getattr(config, group) for group in GROUPS if geometry or group not in ("source", "fusion"))
