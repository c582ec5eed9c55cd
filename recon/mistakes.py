"""Mistakes on the command line that Hydra finds first, said as all others are: the value, the rule and the remedy.

Hydra speaks of its own machinery, and the `+engin=torch` that it advises would be refused one step later.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from recon.config import CONF, GROUPS, Config, options
from recon.errors import ReconError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
ANYWHERE = "python -m recon --help lists the groups, --cfg job every key with its value"


def explain(error: BaseException, arguments: Sequence[str]) -> ReconError:
    """What Hydra, OmegaConf, or the system (about the output folder) found wrong with `arguments`."""
    if isinstance(error, ReconError):
        return error
    if isinstance(error, OverrideParseException):
        return ReconError(f"{error.override}: cannot be read as key=value", _quoted(error.override))
    if isinstance(error, MissingConfigException):
        return _no_such_option(error, arguments)
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError)  # a parent, as the system says it where it makes no folders
        said = f"this folder cannot be made ({error.strerror})" if missing else error.strerror
        return ReconError(f"{error.filename}: {said}", "mend its place or rights; results go elsewhere with output=DIR")
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, MissingMandatoryValue):
        return ReconError(f"{cause.full_key} has no value", f"give {cause.full_key}=...")
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return _no_such_key(cause, arguments)
    if isinstance(cause, OmegaConfBaseException):
        return _wrong_kind(cause, arguments)
    return _other(str(error), arguments)


def _quoted(argument: str) -> str:
    """How an argument has to be written that Hydra's grammar does not take: a path with = or letters beyond ASCII."""
    key, is_value, value = argument.partition("=")
    if not is_value or not value or value[0] in "[{" or key != key.strip():
        return "give key=value without blanks, in lists, too: stages=[export,build]"
    if value.startswith("~"):
        return f"a shell leaves ~ alone here: {key}=$HOME{value[1:]}"
    return f"put the value in quotes that the shell leaves alone: '{key}=\"{value}\"'"


def _no_such_option(error: MissingConfigException, arguments: Sequence[str]) -> ReconError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return ReconError(str(error).partition("\n")[0], ANYWHERE)
    known = sorted(error.options)
    return ReconError(
        f"{_typed(group, arguments, name)}: no such option", f"{_near(name, known)}options: {_list(known)}"
    )


def _no_such_key(cause: OmegaConfBaseException, arguments: Sequence[str]) -> ReconError:
    where, _, key = str(cause.full_key).rpartition(".")
    owner = cause.object_type
    known = [field.name for field in fields(owner)] if is_dataclass(owner) else []
    prefix = f"{where}." if where else ""
    remedy = f"{_near(key, known, prefix)}known: {_list(known)}" if known else ANYWHERE
    if where in GROUPS and (others := _with_key(where, key)):
        remedy = f"it belongs to {_list(f'{where}={name}' for name in others)}; known here: {_list(known)}"
    return ReconError(f"{_typed(f'{prefix}{key}', arguments)}: no such key", remedy)


def _with_key(group: str, key: str) -> list[str]:
    """The options of a group that have a knob of this name."""
    modules = [name for name, cls in options(*GROUPS[group]) if key in [field.name for field in fields(cls)]]
    return [name for name in _names(group) if any(f"/{module}," in _text(group, name) for module in modules)]


def _names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _text(group: str, name: str) -> str:
    return (CONF / group / f"{name}.yaml").read_text()


def _wrong_kind(cause: OmegaConfBaseException, arguments: Sequence[str]) -> ReconError:
    name = str(cause.full_key).partition("[")[0]
    typed = _typed(name, arguments)
    owner = cause.object_type
    kinds = {field.name: str(field.type) for field in fields(owner)} if is_dataclass(owner) else {}
    kind, _, optional = kinds.get(str(cause.key), "").partition(" | ")
    if kind.startswith("list["):
        remedy = f"it is a list: {name}=[{typed.partition('=')[2]}]"
    elif kind in KINDS:
        remedy = f"it is {KINDS[kind]}{' or null' if optional else ''}"
    else:
        remedy = ANYWHERE
    return ReconError(f"{typed}: {str(cause).partition(chr(10))[0]}", remedy)


def _other(text: str, arguments: Sequence[str]) -> ReconError:
    """What Hydra says in words alone."""
    first = text.partition("\n")[0].strip()
    if "Ambiguous value" in text or "requires --multirun" in text:
        typed = text.split("'")[1]
        return ReconError(
            f"{typed}: several values for one run",
            f"python -m recon -m {typed} runs one job for each; {_quoted(typed)} for one value with a comma",
        )
    if "No match in the defaults list" in text:
        group = text.split("'")[1]
        if (choice := _typed(group, arguments)) != group and group in ("quant", "sweep"):
            return ReconError(f"{choice}: {group} is added to the defaults, not in place of one", f"write +{choice}")
        return ReconError(
            f"{choice}: no such group", f"{_near(group, [field.name for field in fields(Config)])}{ANYWHERE}"
        )
    if "An item is already at" in text or "Multiple values for" in text:
        return ReconError(first, "leave the + out: it adds what is not there yet")
    if "Config group override" in text:
        typed = next((word for word in arguments if word.partition("=")[2] == "null"), "")
        known = _names(typed.partition("=")[0])
        return ReconError(f"{typed}: a group takes the name of an option", f"options: {_list(known)}")
    return ReconError(first, ANYWHERE)


def _typed(key: str, arguments: Sequence[str], value: str = "") -> str:
    """The argument that gave `key`, as it was typed; the key, with the value where one is known, if none did."""
    given = [word for word in arguments if word.partition("=")[0].lstrip("+~") == key]
    return given[-1].lstrip("+~") if given else f"{key}={value}" if value else key


def _near(key: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, list(known), 1)
    return f"did you mean {prefix}{near[0]}? " if near else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
