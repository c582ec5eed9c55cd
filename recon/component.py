"""What every config group option is: a dataclass that holds its knobs and does the work."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from recon.errors import Refused


@dataclass
class Component(ABC):  # noqa: B024 - options of simple groups need no method of their own
    """Base of all options. `name` is the option's own name, repeated in its YAML (a test holds the two equal)."""

    not_built: ClassVar[str] = ""  # why this option cannot run yet; empty when it can

    name: str = ""

    def check(self) -> None:
        """Refuse impossible values before any work. Subclasses extend it.

        Raises:
            Refused: the option exists in the design but not in this version.
            ReconError: a knob has an impossible value.
        """
        if self.not_built:
            raise Refused(f"{self.name}: {self.not_built}", "python -m recon.doctor lists what this version can do")

    def settings(self) -> dict[str, Any]:
        """The knobs as plain data, in declaration order: what keys and manifests are made of."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
