import errno
import os
import resource
from pathlib import Path

import pytest

from a3tune.errors import OutputError
from a3tune.files import write_atomic


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
