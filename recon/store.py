"""Which artifacts a configuration stands for, under which names and keys, and how they are obtained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from recon.artifact import Artifact, content_key, obtain
from recon.config import Config
from recon.console import busy
from recon.engines import Session
from recon.network import Network

EXPORT_VERSION = "export.1"  # raise when the exporter writes other files for the same settings
BUILD_VERSION = "build.1"
PROBE_SEED = 1  # the example on which every build is compared with torch


class Store:
    """The artifact store of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.output)
        self.redone: set[tuple[Path, str]] = set()  # forced stages are redone once a run, not at every use

    def networks(self) -> dict[str, Network]:
        """The networks of this configuration by role (`model`, `depth`); a role whose option has none is left out."""
        return {role: network for role, network in self._networks.items() if network is not None}

    @cached_property
    def _networks(self) -> dict[str, Network | None]:
        config = self.config
        return {"model": self._bootstrap_network(), "depth": config.depth.network()}

    def _bootstrap_network(self) -> Network | None:
        model = self.config.model
        if not model.has_network:
            return None
        return model.network(model.views or len(self.config.source.cameras()))

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

    def onnx_key(self, network: Network) -> str:
        from recon.export import versions

        parts = [EXPORT_VERSION, self.requested(network), network.weights_key, self.config.export, versions()]
        return content_key(parts)

    def engine_key(self, network: Network) -> str:
        engine = self.config.engine
        if not engine.builds:
            return content_key(
                [BUILD_VERSION, self.requested(network), network.weights_key, engine.settings(), engine.versions()]
            )
        return content_key([BUILD_VERSION, self.onnx_key(network), engine.settings(), engine.versions()])

    def session(self, role: str, stack: ExitStack) -> Session | None:
        """The running engine of a role, closed with `stack`; None where the option has no network."""
        network = self._networks[role]
        if network is None:
            return None
        path = built(self, network).path if self.config.engine.builds else None
        return stack.enter_context(self.config.engine.session(network, path))


def exported(store: Store, network: Network) -> Artifact:
    """The ONNX artifact of a network."""
    from recon.export import export

    path = store.onnx_path(network)

    def make(folder: Path) -> dict[str, Any]:
        with busy(f"Exporting {path.name}"):
            return export(network, folder / path.name, store.config.export)

    return _obtain(store, path, "onnx", "export", store.onnx_key(network), make, network, [])


def built(store: Store, network: Network) -> Artifact:
    """The engine artifact of a network, compared with the FP32 torch module before it is accepted."""
    onnx = exported(store, network)
    path, engine = store.engine_path(network), store.config.engine

    def make(folder: Path) -> dict[str, Any]:
        with busy(f"Building {path.name}"):
            facts = engine.build(onnx.path, folder / path.name)
            with engine.load(folder / path.name) as session:
                facts["error_against_torch_fp32"] = error_against_torch(network, session)
        facts["effective"] = {"engine": engine.settings(), "versions": engine.versions()}
        return facts

    return _obtain(store, path, "engine", "build", store.engine_key(network), make, network, [onnx.key])


def error_against_torch(network: Network, session: Session) -> dict[str, Any]:
    """Error of every output of an engine against the FP32 torch module on one fresh example.

    Raises:
        ReconError: an output is not finite.
    """
    from dataclasses import asdict

    from recon.compare import compare
    from recon.engines.torch import Torch

    with Torch(name="torch").session(network, None) as reference:
        return {
            name: asdict(error) for name, error in compare(reference, session, [network.example(PROBE_SEED)]).items()
        }


def _obtain(
    store: Store,
    path: Path,
    kind: str,
    stage: str,
    key: str,
    make: Callable[[Path], dict[str, Any]],
    network: Network,
    parents: list[str],
) -> Artifact:
    redo = stage in store.config.force and (path, stage) not in store.redone
    store.redone.add((path, stage))
    return obtain(path, kind, key, make, requested=store.requested(network), parents=parents, force=redo)
