"""PLY files: oriented, coloured points and triangle meshes, binary little-endian.

The format is G. Turk's (Stanford, 1994). Writing is not atomic: give a temporary path and rename it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recon.errors import ReconError

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "<i2", "int16": "<i2", "ushort": "<u2",
    "uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4", "float": "<f4", "float32": "<f4",
    "double": "<f8", "float64": "<f8",
}  # fmt: skip
XYZ, NORMAL, RGB = ("x", "y", "z"), ("nx", "ny", "nz"), ("red", "green", "blue")
HEADER_LIMIT = 1 << 16
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Ply:
    """points [N,3] float32; normals [N,3] float32, colors [N,3] uint8 and triangles [F,3] int32, None where absent."""

    points: NDArray[np.float32]
    normals: NDArray[np.float32] | None = None
    colors: NDArray[np.uint8] | None = None
    triangles: NDArray[np.int32] | None = None


def write_points(
    path: Path, points: ArrayLike, normals: ArrayLike | None = None, colors: ArrayLike | None = None
) -> None:
    """Write points [N,3], unit normals [N,3] and uint8 RGB colours [N,3]; the latter two may be None."""
    vertices = _vertices(points, normals, colors)
    with path.open("wb") as file:
        file.write(_header(vertices, None))
        file.write(vertices.tobytes())  # unlike tofile, keeps the error number of a full disk


def write_mesh(path: Path, vertices: ArrayLike, triangles: ArrayLike, colors: ArrayLike | None = None) -> None:
    """Write vertices [V,3], triangles [F,3] of vertex indices, and uint8 RGB vertex colours [V,3] or None."""
    table = _vertices(vertices, None, colors)
    corners = np.asarray(triangles, np.int32).reshape(-1, 3)
    if len(corners) and not (corners.min() >= 0 and corners.max() < len(table)):
        raise ValueError(f"triangle indices {corners.min()}..{corners.max()} with {len(table)} vertices")
    faces = np.empty(len(corners), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, corners
    with path.open("wb") as file:
        file.write(_header(table, len(faces)))
        file.write(table.tobytes())
        file.write(faces.tobytes())


def read_ply(path: Path) -> Ply:
    """Read a binary little-endian PLY with vertices and, optionally, triangles.

    Raises:
        ReconError: no such file, no PLY, another encoding, not triangles, or fewer bytes than the header promises.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReconError(f"{path}: cannot be read: {error.strerror}", "give an existing PLY file") from error
    elements, start = _parse_header(path, data)
    found: dict[str, NDArray[np.void]] = {}
    for name, count, kind in elements:
        if start + count * kind.itemsize > len(data):
            raise ReconError(
                f"{path}: {len(data)} bytes, but {count} {name} rows need {start + count * kind.itemsize}",
                "the file is truncated; write it again",
            )
        found[name] = np.frombuffer(data, kind, count, start)
        start += count * kind.itemsize
    if "vertex" not in found or not set(XYZ) <= set(found["vertex"].dtype.names or ()):
        raise ReconError(f"{path}: has no vertices with x, y and z", "give a PLY of points or a mesh")
    table = found["vertex"]
    points = _columns(table, XYZ, np.float32)
    assert points is not None
    triangles = _triangles(path, found["face"], len(points)) if "face" in found else None
    return Ply(points, _columns(table, NORMAL, np.float32), _columns(table, RGB, np.uint8), triangles)


def _vertices(points: ArrayLike, normals: ArrayLike | None, colors: ArrayLike | None) -> NDArray[np.void]:
    groups = [(XYZ, np.asarray(points), "<f4"), (NORMAL, normals, "<f4"), (RGB, colors, "u1")]
    present = [(names, np.asarray(values), kind) for names, values, kind in groups if values is not None]
    rows = len(present[0][1])
    if any(values.shape != (rows, 3) for _, values, _ in present):
        raise ValueError(f"points, normals and colours must be [N,3]: {[values.shape for _, values, _ in present]}")
    if colors is not None and np.asarray(colors).dtype != np.uint8:
        raise ValueError(f"colours are {np.asarray(colors).dtype}, needed is uint8")
    table = np.empty(rows, [(name, kind) for names, _, kind in present for name in names])
    for names, values, _ in present:
        for axis, name in enumerate(names):
            table[name] = values[:, axis]
    return table


def _header(vertices: NDArray[np.void], faces: int | None) -> bytes:
    assert vertices.dtype.names is not None
    kinds = {"<f4": "float", "|u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property {kinds[vertices.dtype[name].str]} {name}" for name in vertices.dtype.names]
    if faces is not None:
        lines += [f"element face {faces}", "property list uchar int vertex_indices"]
    return ("\n".join([*lines, "end_header"]) + "\n").encode("ascii")


def _parse_header(path: Path, data: bytes) -> tuple[list[tuple[str, int, np.dtype[np.void]]], int]:
    """(element name, rows, row type) in file order, and where the rows begin."""
    end = data.find(b"end_header", 0, HEADER_LIMIT)
    newline = data.find(b"\n", end)
    if not data.startswith(b"ply") or end < 0 or newline < 0:
        raise ReconError(f"{path}: is no PLY file", "give a PLY of points or a mesh")
    elements: list[tuple[str, int, list[tuple[str, str] | tuple[str, str, int]]]] = []
    for line in data[:end].decode("ascii", "replace").splitlines()[1:]:
        match line.split():
            case [] | ["comment" | "obj_info", *_] | ["format", "binary_little_endian", _]:
                continue
            case ["format", other, *_]:
                raise ReconError(f"{path}: PLY format {other} is not read", "save it as binary little-endian")
            case ["element", name, count] if count.isdigit():
                elements.append((name, int(count), []))
            case ["property", "list", count, kind, _] if elements and TYPES.get(count) == "u1" and kind in TYPES:
                elements[-1][2].extend([("count", "u1"), ("corners", TYPES[kind], 3)])
            case ["property", kind, name] if elements and kind in TYPES:
                elements[-1][2].append((name, TYPES[kind]))
            case _:
                raise ReconError(f"{path}: header line {line!r} is not understood", "save vertices and triangles only")
    try:
        return [(name, count, np.dtype(columns)) for name, count, columns in elements], newline + 1
    except ValueError as error:
        raise ReconError(f"{path}: {error}", "save vertices and triangles with one property of each name") from error


def _columns(table: NDArray[np.void], names: tuple[str, ...], kind: type[T]) -> NDArray[T] | None:
    if not set(names) <= set(table.dtype.names or ()):
        return None
    return np.stack([table[name] for name in names], axis=1).astype(kind)


def _triangles(path: Path, faces: NDArray[np.void], vertices: int) -> NDArray[np.int32]:
    if not len(faces):
        return np.empty((0, 3), np.int32)
    if "count" not in (faces.dtype.names or ()) or (faces["count"] != 3).any():
        raise ReconError(f"{path}: has faces that are no triangles", "triangulate the mesh")
    corners = faces["corners"].astype(np.int64)
    if corners.min() < 0 or corners.max() >= vertices:
        raise ReconError(
            f"{path}: triangle indices {corners.min()}..{corners.max()} with {vertices} vertices",
            "the file is damaged; write it again",
        )
    return corners.astype(np.int32)
