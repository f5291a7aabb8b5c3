import hashlib
import os
import time
from pathlib import Path

import pytest

from a3tune.machine import hashes, remembered
from a3tune.machine.hashes import difference, file_hash, tree_hashes
from a3tune.machine.remembered import WORTH, Remembered


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (WORTH // 256))
    return path


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test, in which a file counts as settled at once; returns its file."""
    place = tmp_path / "home" / "hashes"
    monkeypatch.setattr(remembered, "cache_file", lambda: place)
    monkeypatch.setattr(remembered, "_SETTLED", -1)
    forget(monkeypatch)
    return place


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process."""
    monkeypatch.setattr(hashes, "remembered", Remembered())


def reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    """How often a file is read to name it."""
    done: list[object] = []
    digest = hashlib.file_digest
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *args: done.append(args) or digest(*args))
        assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    return len(done)


def test_a_file_is_read_once_also_by_other_processes(large: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    assert [reads(monkeypatch, large) for _ in range(2)] == [1, 0]
    forget(monkeypatch)
    assert reads(monkeypatch, large) == 0
    assert len(memory.read_text().splitlines()) == 1
    assert large.name not in memory.read_text()


def test_other_bytes_are_seen_whatever_the_time_of_the_file_says(large: Path, memory: Path, monkeypatch):
    reads(monkeypatch, large)
    before = large.stat()
    time.sleep(0.02)  # the clock of the file system is that coarse
    with large.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (large.stat().st_size, large.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert reads(monkeypatch, large) == 1


def test_a_file_that_took_the_place_of_another_is_read(large: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    reads(monkeypatch, large)
    other = large.with_name("other")
    other.write_bytes(large.read_bytes()[::-1])
    other.replace(large)
    assert reads(monkeypatch, large) == 1


def test_a_file_that_changed_just_now_is_not_remembered(large: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "_SETTLED", 10**12)
    assert [reads(monkeypatch, large) for _ in range(2)] == [1, 1]


def test_small_files_are_read_anew(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "small").write_bytes(b"x" * (WORTH - 1))
    assert [reads(monkeypatch, tmp_path / "small") for _ in range(2)] == [1, 1]
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["cut", "mixed", "binary", "folder", "large"])
def test_a_damaged_cache_only_costs_time(large: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    reads(monkeypatch, large)
    text = memory.read_text()
    signature, _, rest = text.rpartition(" ")[0].rpartition(" ")
    if damage == "cut":
        memory.write_text(text[:-30])
    elif damage == "mixed":  # the signature of one file, the hash of another
        memory.write_text(f"{signature} {'0' * len(rest)} {text.rpartition(' ')[2]}")
    elif damage == "binary":
        memory.write_bytes(os.urandom(1000))
    elif damage == "folder":
        memory.unlink()
        memory.mkdir()
    else:
        monkeypatch.setattr(remembered, "_LARGEST", 10)
    forget(monkeypatch)
    assert reads(monkeypatch, large) == 1


def test_a_user_without_a_home_has_no_cache(large: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(remembered, "cache_file", homeless)
    assert [reads(monkeypatch, large) for _ in range(2)] == [1, 0]


def test_differences_are_named():
    assert difference({"a": "1"}, {"a": "1"}) is None
    assert difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}) == "b is another"
    assert difference({"a": "1"}, {}) == "a is missing"
    assert difference({}, {"a": "1"}) == "a is new"


def test_a_folder_is_named_by_its_files(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"x")
    assert tree_hashes(tmp_path) == {"deep/file": hashlib.sha256(b"x").hexdigest()}
