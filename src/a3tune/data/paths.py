"""File names out of annotations -> paths that stay inside their folder."""

import re
from pathlib import Path, PurePosixPath

from a3tune.errors import DataError, shown

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
"""Endings of files that hold others. No image is looked for in them."""
_LONGEST = 255
"""Bytes of one part of a path, nearly everywhere."""


def inside(folder: Path, name: object) -> Path:
    """The path of a file that an annotation names, relative to `folder`; backslashes count as slashes.

    Raises:
        DataError: the name is no text or none of a file, is absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or not _encodable(name):
        raise DataError(f"expected the name of a file, got {shown(name)}")
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"expected the name of a file inside {folder}, {shown(name, 80)} leads out of it")
    return folder / path


def is_address(name: str) -> bool:
    """Whether this is a web address or the like (`http://...`, `s3://...`) and no path."""
    return _ADDRESS.match(name) is not None


def within(folder: Path, path: Path) -> bool:
    """Whether a path leads into a folder once its links are followed: a link, too, may lead out of it."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no name of a file, a loop of links
        return False


def _encodable(name: str) -> bool:
    """Whether file systems have names of this kind: half of a surrogate pair or a longer part is an error there."""
    try:
        return all(len(part.encode()) <= _LONGEST for part in name.split("/")) and len(name) < 16 * _LONGEST
    except UnicodeEncodeError:
        return False
