"""Writing files and folders whole or not at all, also when the power fails; one process at a time. Knows no formats.

Needs a POSIX system (`fcntl`).
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from a3tune.errors import OutputError, RunError

LOCK = ".lock"
"""File of a folder that one process at a time may write to."""


def unfinished(path: Path) -> Path:
    """Where `path` is until it is whole. A killed process leaves it there; the next write of `path` takes it over."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes `path`'s place when the block ends well; else `path` stays as it was.

    A reader sees the old file or the new one, also after a power failure. On an error nothing of the new one is left.
    Of two processes that write the same file the second waits. The folder is made if there is none.

    Raises:
        OutputError: the system refuses to write (disk full, no permission); the block itself should only write.
    """
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_alone(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; an earlier version of it is untouched"
        ) from error


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file as `replacing` does, and return its path."""
    with replacing(path) as file:
        file.write(data)
    return path


@contextmanager
def replacing_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new, empty folder that takes `path`'s place when the block ends well, and else is removed.

    It is made in a hidden folder beside `path`, which a killed process leaves behind, and the next one takes over.
    `check` is called before, while no other process writes `path`: it raises when what is there may not be replaced.

    Raises:
        OutputError: the system refuses to write.
        RunError: another process writes `path`.
    """
    work = path.with_name(f".{path.name}.unfinished")
    new, old = work / "new", work / "old"
    with locked(work):
        try:
            _restore(old, path)
            check()
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            with _told(work):
                new.mkdir()
            yield new
            with _told(path):
                sync_tree(new)
                if path.exists():
                    path.rename(old)
                new.rename(path)
                sync_folder(path.parent)
        finally:
            _restore(old, path)
            shutil.rmtree(work, ignore_errors=True)


def _restore(old: Path, path: Path) -> None:
    """What was stopped between the two renames of `replacing_folder` leaves the old one where nobody looks for it."""
    if old.exists() and not path.exists():
        old.rename(path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}. Make room or choose another folder.") from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, as far as the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that it may be renamed, or take another's place.

    Raises OSError when the disk refuses.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; it is made if there is none. Raises RunError when another process holds it.

    The operating system releases the lock however the process ends, `kill -9` included, so it never goes stale.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}; choose another output folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{folder}: in use by another run ({file.read().decode().strip() or 'just started'}); "
                "wait for it or choose another output folder"
            ) from None
        except OSError as error:
            raise RunError(f"{folder}: this file system has no locks ({error.strerror}); choose another") from None
        _held.add(file)
        try:
            # The holder's name only helps people: a full disk does not stop work that needs no room.
            with suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            _held.discard(file)
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


_held: set[FileIO] = set()


def _let_go() -> None:
    """A forked process, as one that loads data, would go on holding the lock when its parent was killed."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _open_alone(path: Path) -> BinaryIO:
    """An empty file that no other process has open through this function; never the target of a link.

    A file system without locks gives it all the same.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb")
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has this name; who held it before may have renamed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
