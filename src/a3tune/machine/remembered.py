"""Hashes of files that were read before, by what the system says of a file: size, inode, times of change.

Nothing here is needed: what cannot be read or written, or is damaged, only costs reading a file again. One text file in
the user's cache folder holds a line for each file. It names none, and only grows, so that processes need not wait for
each other.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from a3tune.machine.portable import flags

WORTH = 2**16
"""Bytes of a file from which a line costs less than reading it again."""
_SETTLED = 2 * 10**9
"""Nanoseconds: the coarsest clock of a file system. A file that changed less long ago may change again unseen."""
_LARGEST = 2**25
"""Bytes of the cache (some 200,000 files), above which it starts anew."""


class Remembered:
    """Signature of a file -> the hash of its content."""

    def __init__(self) -> None:
        self._hashes: dict[str, str] | None = None

    def get(self, stat: os.stat_result) -> str | None:
        """The hash of the file that the system describes so; None if nobody knows."""
        if stat.st_size < WORTH:
            return None
        if self._hashes is None:
            self._hashes = _read()
        return self._hashes.get(_signature(stat))

    def add(self, before: os.stat_result, after: os.stat_result, digest: str) -> None:
        """Remember the hash of a file, described before and after it was read, if it stood still."""
        signature = _signature(before)
        still = signature == _signature(after) and time.time_ns() - after.st_ctime_ns > _SETTLED
        if before.st_size < WORTH or not still:
            return
        if self._hashes is not None:
            self._hashes[signature] = digest
        _append(f"{signature} {digest}")


remembered = Remembered()
"""Of this process, with what earlier ones have left."""


def cache_file() -> Path:
    """Where the hashes are kept. Raises RuntimeError for a user without a home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the XDG specification: to be ignored
        folder = Path.home() / ".cache"
    if not folder.is_absolute():
        raise RuntimeError(f"no home: {folder}")
    return folder / "a3tune" / "hashes"


def _signature(stat: os.stat_result) -> str:
    # The time of the last change (ctime), unlike that of the content (mtime), cannot be set back.
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _read() -> dict[str, str]:
    hashes: dict[str, str] = {}
    with suppress(OSError, RuntimeError):
        if not cache_file().is_file():  # reading a pipe or a device may never end
            return hashes
        if cache_file().stat().st_size > _LARGEST:
            cache_file().unlink()
        for line in cache_file().read_text(encoding="ascii", errors="replace").splitlines():
            entry, _, check = line.rpartition(" ")
            if check == _check(entry):
                signature, _, digest = entry.rpartition(" ")
                hashes[signature] = digest
    return hashes


def _append(entry: str) -> None:
    with suppress(OSError, RuntimeError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache_file(), flags("O_WRONLY", "O_CREAT", "O_APPEND", "O_NOFOLLOW", "O_NONBLOCK"), 0o600)
        try:
            os.write(descriptor, f"{entry} {_check(entry)}\n".encode())
        finally:
            os.close(descriptor)


def _check(entry: str) -> str:
    """Tells a line that was cut or mixed with another from one that is whole."""
    return hashlib.sha256(entry.encode()).hexdigest()[:16]
