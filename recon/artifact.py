"""Artifacts: files with a manifest that says what they are, written so that a kill at any moment leaves no lie.

An artifact is one or more files in a folder and a manifest `<name>.json` beside them. The manifest holds the content
key (hash of everything that the files depend on), the SHA-256 of every file and of itself, requested and effective
settings, and measured facts. Files are written in a temporary folder, flushed to disk and renamed; the manifest comes
last. So: manifest present and hashes right means complete; anything else is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from recon.errors import Damaged, ReconError, Unwritable

log = logging.getLogger(__name__)
ELSEWHERE = "choose another folder with output=DIR"


@dataclass
class Manifest:
    """What an artifact's `.json` holds. `files`: name -> {sha256, bytes}."""

    kind: str
    key: str
    requested: dict[str, Any] = field(default_factory=dict)
    effective: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk. `path` is its main file."""

    path: Path
    manifest: Manifest
    reused: bool

    @property
    def key(self) -> str:
        return self.manifest.key


def obtain(
    path: Path,
    kind: str,
    key: str,
    make: Callable[[Path], dict[str, Any]],
    *,
    requested: dict[str, Any] | None = None,
    parents: list[str] | None = None,
    force: bool = False,
) -> Artifact:
    """The artifact whose main file is `path`: reused when its manifest has `key` and every hash is right, else made.

    `make(folder)` writes the files, the main one under `path.name`, into an empty temporary folder and returns facts;
    a facts entry `effective` becomes the manifest's effective settings.

    Raises:
        ReconError: the disk is full or the folder cannot be written; nothing half-written stays behind.
    """
    with writable(path.parent), locked(path):
        if not force and (found := find(path, kind, key)):
            return Artifact(path, found, reused=True)
        folder = _scratch(path)
        try:
            facts = make(folder)
            manifest = Manifest(kind, key, requested or {}, facts.pop("effective", {}), facts, parents or [])
            _install(folder, path, manifest)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Artifact(path, manifest, reused=False)


def seal(folder: Path, kind: str, files: list[Path]) -> Manifest:
    """Write `manifest.json` of a finished run folder over files that are already in place below it."""
    manifest = Manifest(kind, content_key([kind, folder.name]))
    manifest.files = {str(file.relative_to(folder)): _file_entry(file) for file in files if file.is_file()}
    _write_manifest(folder / "manifest.json", manifest)
    return manifest


def find(path: Path, kind: str, key: str) -> Manifest | None:
    """The manifest of a complete artifact with this key; None when absent, of another key, or damaged (logged)."""
    if not manifest_path(path).exists():
        return None
    try:
        manifest = read_manifest(path)
        if manifest.kind != kind or manifest.key != key:
            log.info("%s is from other settings or inputs: it is made anew", path.name)
            return None
        verify(path.parent, manifest)
    except Damaged as damage:
        log.warning("%s; it is rebuilt", damage.problem)
        return None
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact whose main file is `path`, checking its own hash.

    Raises:
        ReconError: there is no manifest.
        Damaged: it is not what was written.
    """
    file = manifest_path(path)
    if not file.exists():
        raise ReconError(f"{path}: has no manifest {file.name} beside it", "give a file that a recon stage wrote")
    try:
        data = json.loads(file.read_text())
        digest = data.pop("sha256")
        intact = digest == hashlib.sha256(canonical(data)).hexdigest()
        manifest = Manifest(**data) if intact else None
    except (ValueError, KeyError, TypeError, AttributeError):
        manifest = None
    if manifest is None:
        raise Damaged(f"{file} is damaged: it does not match its own hash")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Raise Damaged, naming the file, unless every file is there and has the hash that the manifest states."""
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.exists():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size != expected["bytes"] or file_hash(file) != expected["sha256"]:
            raise Damaged(f"{file} is damaged: its content does not match its manifest")


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artifact with this main file lies."""
    return path.with_name(path.name + ".json")


def destination(file: Path) -> Path:
    """Where a file that `make` writes into its temporary folder will lie; any other file stays where it is."""
    made = file.parent
    scratch = made.name.startswith(".") and made.name.endswith(".tmp")
    return made.parent / file.name if scratch else file


def content_key(parts: Any) -> str:
    """Hash of plain data (dataclasses, paths, enums and tuples included): 32 hex digits."""
    return hashlib.sha256(canonical(parts)).hexdigest()[:32]


def canonical(parts: Any) -> bytes:
    """Plain data as one canonical byte string: sorted keys, no spaces. What keys and manifests are hashed from."""
    return json.dumps(parts, sort_keys=True, default=_plain, separators=(",", ":")).encode()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends without an error.

    Raises:
        ReconError: the disk is full or the folder cannot be written.
    """
    with writable(path.parent):
        temporary = path.with_name(f".{os.getpid()}.{path.name}")  # same suffix: some writers choose the format by it
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Create `folder`; turn a full disk, a read-only folder and one that cannot be made into errors that say so."""
    made = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = True
        yield
    except OSError as error:
        if problem := _no_write(folder, error):
            raise Unwritable(*problem) from error
        if not made:
            raise Unwritable(f"{folder}: this folder cannot be made ({error.strerror})", ELSEWHERE) from error
        raise


def _no_write(folder: Path, error: OSError) -> tuple[str, str] | None:
    """Problem and remedy of an error that says that nothing can be written there; None for any other."""
    if isinstance(error, PermissionError):
        return f"{error.filename or folder}: not writable", ELSEWHERE
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0
        return f"{folder}: the disk is full ({free:.0f} MiB free)", f"free some space or {ELSEWHERE}"
    if error.errno == 27:  # EFBIG
        return f"{folder}: a file would be larger than this process may write", "raise `ulimit -f`"
    if error.errno == 30:  # EROFS
        return f"{folder}: on a read-only file system", ELSEWHERE
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{folder}: a file is in the way of this folder", ELSEWHERE
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes an artifact; others wait and reuse it. The kernel frees a killed one's lock."""
    import fcntl

    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _scratch(path: Path) -> Path:
    """An empty folder on the same file system. We hold the lock, so one left there is from a killed run."""
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _install(folder: Path, path: Path, manifest: Manifest) -> None:
    """Move the made files into place, manifest last."""
    made = sorted(file for file in folder.iterdir() if file.is_file())
    assert path.name in {file.name for file in made}, f"{path.name} was not made"
    manifest.files = {file.name: _file_entry(file) for file in made}
    manifest_path(path).unlink(missing_ok=True)  # what it described is about to be replaced
    for file in made:
        _flush(file)
        file.replace(path.parent / file.name)
    _write_manifest(manifest_path(path), manifest)
    _flush(path.parent)


def _write_manifest(file: Path, manifest: Manifest) -> None:
    manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
    data = json.loads(canonical(asdict(manifest)))
    digest = hashlib.sha256(canonical(data)).hexdigest()
    write_atomic(file, json.dumps({**data, "sha256": digest}, indent=1, sort_keys=True) + "\n")


def _file_entry(file: Path) -> dict[str, Any]:
    return {"sha256": file_hash(file), "bytes": file.stat().st_size}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.name
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot enter a manifest or a key")
