"""Artifacts: reused when right, rebuilt when damaged, never half-written."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from recon.artifact import atomic_file, content_key, find, manifest_path, obtain, read_manifest, writable, write_atomic
from recon.errors import Damaged, ReconError


def make_pair(folder: Path) -> dict[str, object]:
    (folder / "a.bin").write_bytes(b"main" * 100)
    (folder / "a.bin.data").write_bytes(b"side" * 100)
    return {"bytes": 800, "effective": {"precision": "fp32"}}


def test_made_once_then_reused(tmp_path: Path) -> None:
    first = obtain(tmp_path / "a.bin", "test", "k1", make_pair, requested={"precision": "fp16"})
    second = obtain(tmp_path / "a.bin", "test", "k1", lambda _: pytest.fail("made again"))
    assert (first.reused, second.reused) == (False, True)
    assert second.manifest.requested == {"precision": "fp16"}
    assert second.manifest.effective == {"precision": "fp32"}
    assert set(second.manifest.files) == {"a.bin", "a.bin.data"}


def test_another_key_replaces(tmp_path: Path) -> None:
    obtain(tmp_path / "a.bin", "test", "k1", make_pair)
    assert find(tmp_path / "a.bin", "test", "k2") is None
    assert not obtain(tmp_path / "a.bin", "test", "k2", make_pair).reused
    assert find(tmp_path / "a.bin", "test", "k1") is None


@pytest.mark.parametrize("name", ["a.bin", "a.bin.data", "a.bin.json"])
@pytest.mark.parametrize("where", [0.0, 0.37, 0.99])
def test_one_flipped_bit_is_named_and_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, where: float
) -> None:
    obtain(tmp_path / "a.bin", "test", "k1", make_pair)
    data = bytearray((tmp_path / name).read_bytes())
    data[int(where * len(data))] ^= 0x10
    (tmp_path / name).write_bytes(data)
    assert not obtain(tmp_path / "a.bin", "test", "k1", make_pair).reused
    assert name in caplog.text
    assert "damaged" in caplog.text
    assert obtain(tmp_path / "a.bin", "test", "k1", make_pair).reused


def test_missing_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    obtain(tmp_path / "a.bin", "test", "k1", make_pair)
    (tmp_path / "a.bin.data").unlink()
    assert find(tmp_path / "a.bin", "test", "k1") is None
    assert "a.bin.data is missing" in caplog.text


def test_a_failing_maker_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, object]:
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        obtain(tmp_path / "a.bin", "test", "k1", fail)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_left_over_scratch_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    stale = tmp_path / ".a.bin.tmp"
    stale.mkdir()
    (stale / "a.bin").write_bytes(b"half")
    obtain(tmp_path / "a.bin", "test", "k1", make_pair)
    assert not stale.exists()


def test_manifest_without_its_hash_is_damaged(tmp_path: Path) -> None:
    obtain(tmp_path / "a.bin", "test", "k1", make_pair)
    file = manifest_path(tmp_path / "a.bin")
    file.write_text(file.read_text().replace('"k1"', '"k2"'))
    with pytest.raises(Damaged, match=r"a\.bin\.json"):
        read_manifest(tmp_path / "a.bin")


def fail_half_way(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")


def test_atomic_file_keeps_the_old_content_on_error(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x.txt", "old")
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def fill(file: BinaryIO) -> None:
    with writable(Path.cwd()):
        file.write(b"x")


def test_full_disk_is_one_clear_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full: this system has no device that is always full")
    with full.open("wb", buffering=0) as file, pytest.raises(ReconError, match="disk is full") as caught:
        fill(file)
    assert "output=DIR" in caught.value.remedy


def test_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(ReconError, match="in the way"):
        write_atomic(tmp_path / "outputs" / "x", "data")


def test_keys_depend_on_values_not_on_order() -> None:
    assert content_key({"a": 1, "b": [2, 3]}) == content_key({"b": (2, 3), "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 1.5})
    assert content_key(np.eye(3)) != content_key(np.eye(3) * 2)
