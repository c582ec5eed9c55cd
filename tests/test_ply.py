"""PLY files, with Open3D as the independent reader and writer."""

import numpy as np
import pytest

from recon import optional
from recon.errors import ReconError
from recon.geometry.ply import read_ply, write_mesh, write_points

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(500, 3)).astype(np.float32)
NORMALS = (POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)).astype(np.float32)
COLORS = RNG.integers(0, 256, (500, 3), np.uint8)
TRIANGLES = RNG.integers(0, 500, (900, 3)).astype(np.int32)


def test_points_come_back_exactly(tmp_path):
    write_points(tmp_path / "p.ply", POINTS, NORMALS, COLORS)
    back = read_ply(tmp_path / "p.ply")
    np.testing.assert_array_equal(back.points, POINTS)
    np.testing.assert_array_equal(back.normals, NORMALS)
    np.testing.assert_array_equal(back.colors, COLORS)
    assert back.triangles is None


def test_open3d_reads_our_points(tmp_path):
    o3d = optional.open3d()
    write_points(tmp_path / "p.ply", POINTS, NORMALS, COLORS)
    cloud = o3d.io.read_point_cloud(str(tmp_path / "p.ply"))
    np.testing.assert_array_equal(np.asarray(cloud.points), POINTS)
    np.testing.assert_array_equal(np.asarray(cloud.normals), NORMALS)
    np.testing.assert_array_equal(np.round(np.asarray(cloud.colors) * 255), COLORS)


def test_open3d_reads_our_mesh_and_we_read_its(tmp_path):
    o3d = optional.open3d()
    write_mesh(tmp_path / "m.ply", POINTS, TRIANGLES, COLORS)
    mesh = o3d.io.read_triangle_mesh(str(tmp_path / "m.ply"))
    np.testing.assert_array_equal(np.asarray(mesh.vertices), POINTS)
    np.testing.assert_array_equal(np.asarray(mesh.triangles), TRIANGLES)
    np.testing.assert_array_equal(np.round(np.asarray(mesh.vertex_colors) * 255), COLORS)
    o3d.io.write_triangle_mesh(str(tmp_path / "theirs.ply"), mesh)
    back = read_ply(tmp_path / "theirs.ply")  # in double precision
    np.testing.assert_array_equal(back.points, POINTS)
    np.testing.assert_array_equal(back.triangles, TRIANGLES)
    np.testing.assert_array_equal(back.colors, COLORS)


def test_only_points_and_nothing_at_all(tmp_path):
    write_points(tmp_path / "p.ply", POINTS)
    assert read_ply(tmp_path / "p.ply").normals is None
    write_mesh(tmp_path / "e.ply", np.empty((0, 3)), np.empty((0, 3), np.int32))
    empty = read_ply(tmp_path / "e.ply")
    assert empty.points.shape == (0, 3)
    assert empty.triangles.shape == (0, 3)


def test_the_file_is_as_large_as_its_data(tmp_path):
    write_points(tmp_path / "p.ply", POINTS, NORMALS, COLORS)
    data = (tmp_path / "p.ply").read_bytes()
    assert len(data) - (data.index(b"end_header\n") + 11) == 500 * (12 + 12 + 3)


def test_the_writer_refuses_what_would_be_misread(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_points(tmp_path / "p.ply", POINTS, NORMALS, COLORS / 255)
    with pytest.raises(ValueError, match=r"\[N,3\]"):
        write_points(tmp_path / "p.ply", POINTS, NORMALS[:-1])
    with pytest.raises(ValueError, match=r"0..500 with 500"):
        write_mesh(tmp_path / "m.ply", POINTS, [[0, 1, 500]])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-7], "truncated"),
        (lambda data: b"solid " + data, "no PLY"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "format ascii"),
        (lambda data: data.replace(b"property float x", b"property quad x"), "quad x"),
        (lambda data: data.replace(b"property float x", b"property float a"), "no vertices with x"),
        (lambda data: data.replace(b"property float x", b"property float y"), "y"),
        (lambda data: data[:-13] + b"\x04" + data[-12:], "no triangles"),
        (lambda data: data[:-4] + b"\xff\xff\xff\x7f", "2147483647 with 500"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, says):
    path = tmp_path / "m.ply"
    write_mesh(path, POINTS, TRIANGLES)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ReconError) as caught:
        read_ply(path)
    assert says in str(caught.value)
    assert "m.ply" in caught.value.problem


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ReconError, match=r"none\.ply"):
        read_ply(tmp_path / "none.ply")
