"""Writing files and folders whole or not at all, also when the power fails; one process at a time. Knows no formats."""

import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from a3tune.errors import A3TuneError, OutputError, RunError
from a3tune.machine.portable import OPEN_FILES_CAN_BE_REPLACED, flags, lock, unlock

LOCK = ".lock"
"""File of a folder that one process at a time may write to."""
_HOLDER = 200
"""Bytes of it that a message shows."""


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
                if not OPEN_FILES_CAN_BE_REPLACED:
                    file.close()
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; an earlier version of it is untouched"
        ) from error


@contextmanager
def all_or_none() -> Iterator[Callable[[Path], Path]]:
    """Gives a function that takes, and returns, each path that the block is about to make.

    If the block fails, those that were not there before are removed again; folders if they are empty. What the system
    refuses to remove stays: what made the block fail is what is told.
    """
    made: list[Path] = []

    def new(path: Path) -> Path:
        if not path.exists():
            made.append(path)
        return path

    try:
        yield new
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
        raise


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
    work = _work(path)
    if work.is_symlink():
        raise OutputError(
            f"{work}: is a link, and what it leads to would be changed; remove it, or choose another name"
        )
    new, old = work / "new", work / "old"
    with locked(work):
        try:
            _restore(old, path)
            check()
            with _told(work):
                remove(old)
                new_folder(new)
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


def restore_folder(path: Path) -> None:
    """Put back what a process that was killed within `replacing_folder` has moved away, if nothing took its place."""
    _restore(_work(path) / "old", path)


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


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
        file = FileIO(_open_own(folder / LOCK, os.O_RDWR), "r+")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}; choose another output folder") from None
    with file:
        try:
            lock(file.fileno(), wait=False)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(_HOLDER).decode(errors="replace").strip()
            raise RunError(
                f"{folder}: in use by another run ({holder or 'just started'}); "
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
            unlock(file.fileno())


_held: set[FileIO] = set()


def _let_go() -> None:
    """A forked process, as one that loads data, would go on holding the lock when its parent was killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_let_go)


def append(path: Path, data: bytes) -> None:
    """Bring some bytes to the end of a file, and to the disk; it is made if there is none.

    Raises OSError when the system refuses, or the file is no file of its own: see `_open_own`.
    """
    with os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; of a link the link alone. Nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_place(path: Path, wanted: str = "an output folder", kind: type[A3TuneError] = RunError) -> None:
    """Raises `kind` when a file stands where a folder, or one that is to hold it, has to be. Touches nothing."""
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        which = "this" if there == path else there
        raise kind(f"{path}: expected {wanted}, {which} is a file; choose another")


def new_folder(path: Path) -> Path:
    """An empty folder in place of whatever an earlier process left there, a link included."""
    remove(path)
    path.mkdir()
    return path


def _open_own(path: Path, how: int) -> int:
    """Descriptor of a file to write to, made if there is none; a stranger's folder cannot make another file of it.

    Raises OSError for a link, a pipe, a device, and a file that has a second name: what is written, or emptied, would
    be something else than what is named here.
    """
    # Without waiting: a pipe would wait for its reader.
    descriptor = os.open(path, how | flags("O_CREAT", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"), 0o666)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EEXIST, f"{path.name} there is no plain file of its own, but a link, pipe or device")
    return descriptor


def _open_alone(path: Path) -> BinaryIO:
    """An empty file that no other process has open through this function; see `_open_own`.

    A file system without locks gives it all the same.
    """
    while True:
        file = os.fdopen(_open_own(path, os.O_RDWR), "wb")
        try:
            with suppress(OSError):
                lock(file.fileno(), wait=True)
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
