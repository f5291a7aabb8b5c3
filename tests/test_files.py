import errno
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from a3tune.errors import OutputError, RunError
from a3tune.machine.files import locked, replacing, unfinished, write_atomic


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", [(os, "fsync"), (Path, "replace")])
def test_disk_full_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where):
    path = write_atomic(tmp_path / "results.json", b"old")
    monkeypatch.setattr(*where, no_space)
    with pytest.raises(OutputError, match=r"results.json: cannot be written: No space left"):
        write_atomic(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"results.json": b"old"}


def test_write_that_stops_in_the_middle_leaves_the_old_file(tmp_path):
    path = write_atomic(tmp_path / "results.json", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write_atomic(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"results.json": b"old"}


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "x", b"old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    unfinished(tmp_path / "x").write_bytes(b"half of something long")
    write_atomic(tmp_path / "x", b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"x": b"new"}


def test_two_that_write_the_same_file_do_not_mix(tmp_path):
    path = tmp_path / "x"

    def write(letter):
        with replacing(path) as file:
            for _ in range(200):
                file.write(letter * 100)
                file.flush()
            return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, [b"a", b"b", b"c", b"d"] * 5))
    assert set(path.read_bytes().decode()) in ({"a"}, {"b"}, {"c"}, {"d"})
    assert path.stat().st_size == 20_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_by_a_killed_one_does_not_go_on_holding_its_folder(tmp_path):
    read, write = os.pipe()
    holder = os.fork()
    if not holder:
        with locked(tmp_path):
            os.fork()
            os.write(write, b"%10d" % os.getpid())
            signal.pause()
    orphan = sum(int(os.read(read, 10)) for _ in range(2)) - holder
    with pytest.raises(RunError, match="in use"), locked(tmp_path):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
