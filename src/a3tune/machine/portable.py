"""What POSIX systems and Windows have in two ways: locks, flags of `os.open`, memory taken. Knows no folder.

On Windows nothing of this was ever run: it does what Python's documentation says of it.
"""

import os
import sys
from functools import reduce
from operator import or_

OPEN_FILES_CAN_BE_REPLACED = sys.platform != "win32"
"""Whether a file may take the place of another, or get a new name, while it is open."""


def flags(*names: str) -> int:
    """Of `os.open`: those of these names that the system has. No file is text, of which Windows changes line ends."""
    return reduce(or_, (getattr(os, name, 0) for name in (*names, "O_BINARY")), 0)


if sys.platform == "win32":
    import msvcrt
    import time

    _PLACE = 2**30
    """A lock is of bytes, which nobody else may read then: one behind whatever a file holds."""

    def lock(descriptor: int, *, wait: bool) -> None:
        """Hold an open file for this process. Raises BlockingIOError when another holds it and we do not wait."""
        while True:
            try:
                _locking(descriptor, msvcrt.LK_NBLCK)
                return
            except PermissionError as error:
                if not wait:
                    raise BlockingIOError(error.errno, error.strerror) from None
                time.sleep(0.05)

    def unlock(descriptor: int) -> None:
        """Let go of it."""
        _locking(descriptor, msvcrt.LK_UNLCK)

    def _locking(descriptor: int, how: int) -> None:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _PLACE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, how, 1)
        finally:
            os.lseek(descriptor, place, os.SEEK_SET)

    def peak_bytes() -> int | None:
        """Nothing of Python's own tells it here."""
        return None

else:
    import fcntl
    import resource

    def lock(descriptor: int, *, wait: bool) -> None:
        """Hold an open file for this process. Raises BlockingIOError when another holds it and we do not wait; OSError
        where the file system has no locks."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def unlock(descriptor: int) -> None:
        """Let go of it."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def peak_bytes() -> int | None:
        """The most main memory that this process has had so far; None where the system does not say."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
