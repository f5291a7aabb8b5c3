"""Writing files whole or not at all. Knows no formats."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from a3tune.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes `path`'s place when the block ends well; else `path` stays as it was.

    A reader sees the old file or the new one. On an error nothing of the new one is left; a killed process leaves at
    most a hidden `.NAME.PID.tmp`. The folder is made if there is none.

    Raises:
        OutputError: the system refuses to write (disk full, no permission); the block itself should only write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; an earlier version of it is untouched"
        ) from error


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file as `replacing` does, and return its path."""
    with replacing(path) as file:
        file.write(data)
    return path
