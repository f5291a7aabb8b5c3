import errno
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from a3tune.errors import OutputError, RunError
from a3tune.machine.files import (
    LOCK,
    all_or_none,
    append,
    locked,
    new_folder,
    remove,
    replacing,
    replacing_folder,
    unfinished,
    write_atomic,
)


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


@pytest.fixture
def precious(tmp_path):
    """A file of the user's, which a stranger's folder leads to."""
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "precious"
    file.write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    return file


@pytest.mark.parametrize("lead", ["symlink_to", "hardlink_to", "fifo"])
@pytest.mark.parametrize("write", ["lock", "log", "file"])
def test_a_folder_of_a_stranger_does_not_lead_writes_elsewhere(precious, tmp_path, lead, write):
    folder = tmp_path / "run"
    name = {"lock": folder / LOCK, "log": folder / "metrics.jsonl", "file": unfinished(folder / "results.json")}[write]
    if lead == "fifo":
        os.mkfifo(name)
    else:
        getattr(name, lead)(precious)
    with pytest.raises((OSError, OutputError, RunError)):
        if write == "lock":
            with locked(folder):
                pass
        elif write == "log":
            append(name, b"more")
        else:
            write_atomic(folder / "results.json", b"new")
    assert precious.read_bytes() == b"precious"


def test_a_message_about_a_lock_shows_little_of_it(tmp_path):
    (tmp_path / LOCK).write_bytes(b"\xff" * 10_000)
    import fcntl

    with (tmp_path / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError) as told, locked(tmp_path):
            pass
    assert len(str(told.value)) < 500


def test_of_files_that_belong_together_none_is_left_when_one_fails(tmp_path):
    earlier, folder = tmp_path / "train.jsonl", tmp_path / "images"
    earlier.write_text("rows of before")
    with pytest.raises(OutputError, match=r"validation\.jsonl"), all_or_none() as new:
        write_atomic(new(new(folder) / "scan.png"), b"scan")
        new(earlier)
        raise OutputError("validation.jsonl: cannot be written")
    assert list(tmp_path.iterdir()) == [earlier]
    assert earlier.read_text() == "rows of before"


def test_what_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match="disk full"), all_or_none() as new:
        write_atomic(new(tmp_path / "train.jsonl"), b"rows")
        raise OutputError("disk full")


def test_what_is_deleted_is_the_link(precious, tmp_path):
    link = tmp_path / "run" / "data"
    link.symlink_to(precious.parent)
    remove(link)
    assert not link.is_symlink() and precious.is_file()
    link.symlink_to(precious.parent)
    assert new_folder(link).is_dir() and not link.is_symlink() and not list(link.iterdir())
    assert precious.read_bytes() == b"precious"


def test_an_unfinished_folder_that_is_a_link_is_refused(precious, tmp_path):
    (precious.parent / "new").mkdir()
    (precious.parent / "new" / "mine").write_bytes(b"mine")
    (tmp_path / "run" / ".model.unfinished").symlink_to(precious.parent)
    with pytest.raises(OutputError, match="is a link"), replacing_folder(tmp_path / "run" / "model", lambda: None):
        pass
    assert (precious.parent / "new" / "mine").is_file()
