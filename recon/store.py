"""Which artifacts a configuration stands for, under which names and keys, and how they are obtained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recon.accuracy import enforce, require_frames
from recon.artifact import Artifact, Manifest, content_key, obtain, read_manifest, verify
from recon.config import Config, option
from recon.console import busy
from recon.engines import Build, Engine, Session
from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, Recipe
from recon.network import Network

if TYPE_CHECKING:
    from recon.certificate import Asked

EXPORT_VERSION = "export.2"  # raise when the exporter writes other files for the same settings
CALIBRATION_VERSION = "calibration.1"
WRITER_VERSION = "writer.1"
BUILD_VERSION = "build.3"
_RENDERED: dict[str, str] = {}  # content of frames that depend on settings alone: once a process, for sweeps
_INFOS: dict[tuple[str, str], dict[str, LayerInfo]] = {}
PLAIN = {"quant_mode": "none", "precision": "fp32"}
ROLES = ("model", "depth")
WITHOUT_NETWORK = {"handover", "evaluate", "report"}


class Store:
    """The artifact store of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.output)
        self.from_source: dict[str, Any] = {}  # what the configuration left to the source's images, for metrics.json
        self._data_keys: dict[str, str] = {}
        self.redone: set[tuple[Path, str]] = set()  # forced stages are redone once a run, not at every use

    def networks(self) -> dict[str, Network]:
        """The networks that the stages take, by role; a role whose option has none is left out.

        Raises:
            ReconError: the weights of one of them are not here. Those of others are not looked for.
        """
        return {role: network for role, network in self._networks.items() if network is not None}

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that the stages have a use for: `model` and `depth`, `depth` alone, or none."""
        stages = set(self.config.stages) - WITHOUT_NETWORK
        if self.config.benchmark.of_files:
            stages.discard("benchmark")
        return ROLES if stages - {"depth"} else ("depth",) if stages else ()

    @cached_property
    def _networks(self) -> dict[str, Network | None]:
        if "depth" in self.roles:
            self._fit_depth()
        makers: dict[str, Callable[[], Network | None]]
        makers = {"model": self._bootstrap_network, "depth": self.config.depth.network}
        found = {role: makers[role]() for role in self.roles}
        if self._judges_keep:
            from recon.quantise import require_own_keep_lists

            require_own_keep_lists(self.config.quant_mode.keep, [one for one in found.values() if one is not None])
        return found

    @property
    def _judges_keep(self) -> bool:
        """Whether an entry of `quant_mode.keep` must concern a network of this run: not where the stages leave one out,
        which it may be for."""
        return bool(self.config.quant_mode.keep) and self.roles == ROLES

    def _fit_depth(self) -> None:
        """Give the streaming network's input the shape of the source's images, where the configuration leaves it open.

        Done here, before there is a network, so that names, keys and preprocessing all follow from it.
        """
        asked = self.config.depth
        if not asked.wants_image_sizes:
            return
        sizes = self.config.source.image_sizes()
        self.config.depth = asked.for_images(sizes)
        before, after = asked.settings(), self.config.depth.settings()
        changed = {
            key: {"requested": before[key], "effective": after[key]} for key in after if after[key] != before[key]
        }
        self.from_source = {"image_sizes": {camera: list(size) for camera, size in sizes.items()}, "depth": changed}

    def _bootstrap_network(self) -> Network | None:
        model = self.config.model
        if not model.has_network:
            return None
        return model.network(model.views or len(self.config.source.cameras()))

    @property
    def plain(self) -> bool:
        """Whether networks stay as exported: FP32, nothing quantised."""
        return not self.formats() and self.config.precision.rest_format == "fp32"

    def formats(self) -> list[LayerFormat]:
        """Formats that the quant mode and the precision put on layers."""
        asked = (self.config.quant_mode.layer_format(), self.config.precision.layer_format())
        return [found for found in asked if found is not None]

    @property
    def needs_calibration(self) -> bool:
        """Whether ranges decide something: Q/DQ scales of inputs, or which values FP16 cannot hold."""
        return self.config.precision.rest_format == "fp16" or any(found.calibrated for found in self.formats())

    @property
    def exports(self) -> bool:
        """Whether stage `export` writes graphs: for an engine that is built from them, or where nothing is built."""
        return self.config.engine.needs_onnx or "build" not in self.config.stages

    def base_path(self, network: Network) -> Path:
        """The FP32 graph as exported, shared by all modes and precisions."""
        return self.root / "engines" / PLAIN["quant_mode"] / f"{network.name}_{PLAIN['precision']}.onnx"

    def ranges_path(self, network: Network) -> Path:
        """Of a graph's values and layers' inputs, or of the inputs alone where the engine takes no graph."""
        part = "" if self.config.engine.needs_onnx else "_layers"
        return self.root / "engines" / "calibration" / f"{network.name}{part}.npz"

    def folder(self) -> Path:
        return self.root / "engines" / self.config.quant_mode.name

    def onnx_path(self, network: Network) -> Path:
        return self.folder() / f"{network.name}_{self.config.precision.name}.onnx"

    def engine_path(self, network: Network) -> Path:
        return self.folder() / f"{network.name}_{self.config.precision.name}{self.config.engine.suffix}"

    def requested(self, network: Network) -> dict[str, Any]:
        """What was asked for, as it goes into manifests."""
        config = self.config
        return {
            "network": network.name,
            "network_settings": network.settings,
            "quant_mode": config.quant_mode.settings(),
            "precision": config.precision.settings(),
            "licence": network.licence,
        }

    def base_key(self, network: Network) -> str:
        from recon.export import versions

        return content_key(
            [EXPORT_VERSION, network.name, network.settings, network.weights_key, self.config.export, versions()]
        )

    def ranges_key(self, network: Network, role: str) -> str:
        from recon.calibration import data_key

        settings = self.config.calibration.settings()
        if role not in self._data_keys:  # frames are decoded for it: once a run
            views = next(iter(network.inputs.values())).shape[0]
            source, path = self.config.source, self.config.calibration.path
            known = content_key([source.settings(), settings, views])
            if source.name != "synthetic" or path is not None or known not in _RENDERED:
                _RENDERED[known] = data_key(self.config.calibration, source, views)
            self._data_keys[role] = _RENDERED[known]
        module = [network.name, network.settings, network.weights_key]
        looked_at = self.base_key(network) if self.config.engine.needs_onnx else module
        return content_key([CALIBRATION_VERSION, looked_at, settings, self._data_keys[role]])

    def onnx_key(self, network: Network) -> str:
        """Key of the graph with this configuration's formats written into it."""
        if self.plain:
            return self.base_key(network)
        from recon.quantise import keep_list, versions

        ranges = self.ranges_key(network, self.role(network)) if self.needs_calibration else ""
        keep = keep_list(self.config.quant_mode.keep, network.weights_key)
        parts = [WRITER_VERSION, self.base_key(network), ranges, self.requested(network), keep, versions(self.config)]
        return content_key(parts)

    def engine_key(self, network: Network) -> str:
        engine = self.config.engine
        return content_key([BUILD_VERSION, self.onnx_key(network), engine.settings(), engine.versions()])

    def role(self, network: Network) -> str:
        """`model` or `depth`."""
        return next(role for role, known in self._networks.items() if known is not None and known.name == network.name)

    def recipe(self, network: Network) -> Recipe:
        """All decisions for a network, with quantised weights: loads the network, and calibrates where needed."""
        if self.plain:
            return Recipe()
        from recon.calibration import read_ranges
        from recon.quantise import make_recipe, require_matches

        if self._judges_keep:
            layers = {one.name: list(_infos(one)) for one in self.networks().values()}
            require_matches(self.config.quant_mode.keep, layers)
        ranges = read_ranges(calibrated(self, network).path) if self.needs_calibration else None
        return make_recipe(network, self.config.quant_mode, self.config.precision, ranges)

    def session(self, role: str, stack: ExitStack) -> Session | None:
        """The running engine of a role, closed with `stack`; None where the option has no network."""
        found = self.open(role)
        return stack.enter_context(found) if found is not None else None

    def open(self, role: str) -> Session | None:
        """The running engine of a role, for the caller to close; None where the option has no network."""
        network = self._networks[role]
        if network is None:
            return None
        path = built(self, network).path if self.config.engine.builds else None
        return self.config.engine.session(network, path, partial(self.recipe, network))


def open_engine(path: Path, manifest: Manifest | None = None) -> Session:
    """A session of a built engine file, by the option that built it, with the settings that it was built with.

    Raises:
        ReconError: the file has no manifest or is no engine. Damaged: its hash is not the manifest's.
    """
    settings = dict((manifest or engine_manifest(path)).effective["engine"])
    engine = option("engine", settings.pop("name"))
    assert isinstance(engine, Engine)
    return replace(engine, **settings).load(path)


def engine_manifest(path: Path) -> Manifest:
    """The manifest of an engine file, after its hashes have been checked. Raises as `open_engine`."""
    manifest = read_manifest(path)
    if manifest.kind != "engine":
        raise ReconError(
            f"{path}: is of kind {manifest.kind!r}, not an engine", "give a file that stages=[build] wrote"
        )
    verify(path.parent, manifest)
    return manifest


def exported(store: Store, network: Network) -> Artifact:
    """The ONNX artifact of a network in FP32, as torch has it."""
    from recon.export import export

    path = store.base_path(network)

    def make(folder: Path) -> dict[str, Any]:
        with busy(f"Exporting {path.name}"):
            return export(network, folder / path.name, store.config.export)

    return _obtain(store, path, "onnx", "export", store.base_key(network), make, network, [], plain=True)


def calibrated(store: Store, network: Network) -> Artifact:
    """Ranges of a network's values over the calibration frames."""
    from recon.calibration import calibrate

    base = exported(store, network) if store.config.engine.needs_onnx else None
    path, role = store.ranges_path(network), store.role(network)
    key = store.ranges_key(network, role)

    def make(folder: Path) -> dict[str, Any]:
        return calibrate(network, base.path if base else None, folder / path.name, store.config, role, key)

    parents = [base.key] if base else []
    return _obtain(store, path, "calibration", "calibrate", key, make, network, parents, plain=True)


def written(store: Store, network: Network) -> Artifact:
    """The ONNX artifact with this configuration's precision and Q/DQ in it; the exported one where nothing changes."""
    base = exported(store, network)
    if store.plain:
        return base
    from recon.quantise import write

    path = store.onnx_path(network)

    def make(folder: Path) -> dict[str, Any]:
        recipe = store.recipe(network)
        with busy(f"Writing {path.name}"):
            return write(network, base.path, recipe, folder / path.name)

    return _obtain(store, path, "onnx", "build", store.onnx_key(network), make, network, [base.key])


def built(store: Store, network: Network) -> Artifact:
    """The engine artifact of a network, certified and compared with the FP32 torch module before it is accepted."""
    path, engine = store.engine_path(network), store.config.engine
    onnx = written(store, network) if engine.needs_onnx else None

    def make(folder: Path) -> dict[str, Any]:
        require_frames(store.config, network, store.role(network))
        with busy(f"Building {path.name}"):
            source = Build(network, onnx.path if onnx else None, partial(store.recipe, network))
            facts = engine.build(source, folder / path.name)
        return facts | _proof(store, network, onnx, facts, folder / path.name)

    parents = [onnx.key] if onnx else []
    found = _obtain(store, path, "engine", "build", store.engine_key(network), make, network, parents)
    if found.reused:  # built under other limits, perhaps
        enforce(store.config.accuracy, found.manifest.facts["accuracy"], path.name)
    return found


def certified(store: Store, network: Network) -> dict[str, Any]:
    """The certificate of an engine that builds no file. Raises ReconError where a requested format is absent."""
    from recon.certificate import certify_module

    recipe, asked = store.recipe(network), _asked(store, network)
    with busy(f"Looking into {network.name}"):
        return certify_module(store.config.engine, network, recipe, store.requested(network), asked)


def _proof(store: Store, network: Network, onnx: Artifact | None, facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """Certificate and accuracy of a built file, for its manifest. `facts`: of the build, for engines without a graph.

    Raises:
        ReconError: a requested format is absent from the engine, or its error is beyond the gate.
    """
    from recon.accuracy import judge
    from recon.certificate import certify

    engine, source = store.config.engine, onnx.manifest.facts if onnx else facts
    asked = _asked(store, network)
    certificate = certify(engine, file, source, store.requested(network), asked, onnx.path if onnx else None)
    accuracy = judge(store.config, network, store.role(network), file)
    effective = {"engine": engine.settings(), "versions": engine.versions(), "verdict": certificate["verdict"]}
    effective |= facts.get("effective", {})  # what the engine has decided for itself
    return {"certificate": certificate, "accuracy": accuracy, "effective": effective}


def _asked(store: Store, network: Network) -> Asked:
    """What this configuration asks of a network, decided apart from the writer: certificates compare the two."""
    from recon.certificate import Asked, calibration_facts

    mode, precision = store.config.quant_mode, store.config.precision
    if store.plain:
        return Asked()
    from recon.calibration import read_ranges
    from recon.quantise import assign

    ranges = read_ranges(calibrated(store, network).path) if store.needs_calibration else None
    infos = _infos(network)
    formats = {"quant_mode": mode.layer_format(), "precision": precision.layer_format()}
    groups = {name: found for name, found in formats.items() if found is not None}
    layers = assign(infos, mode, precision, network.weights_key)
    return Asked(layers, groups, infos, precision.rest_format, calibration_facts(ranges))


def _infos(network: Network) -> dict[str, LayerInfo]:
    from recon.quantise import layer_infos

    known = (network.name, network.weights_key)
    if known not in _INFOS:  # a sweep asks for the same networks again and again
        _INFOS[known] = layer_infos(network.load(), network.example(0))
    return _INFOS[known]


def _obtain(
    store: Store,
    path: Path,
    kind: str,
    stage: str,
    key: str,
    make: Callable[[Path], dict[str, Any]],
    network: Network,
    parents: list[str],
    plain: bool = False,
) -> Artifact:
    redo = stage in store.config.force and (path, stage) not in store.redone
    store.redone.add((path, stage))
    requested = store.requested(network)
    if plain:  # shared by all modes and precisions
        requested |= {axis: {"name": name} for axis, name in PLAIN.items()}
    return obtain(path, kind, key, make, requested=requested, parents=parents, force=redo)
