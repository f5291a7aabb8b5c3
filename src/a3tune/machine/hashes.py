"""Names for values and files, by their content."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from a3tune.machine.remembered import remembered

HASHING_THREADS = min(8, os.cpu_count() or 1)
"""Hashing lets go of the interpreter's lock: several files or tensors are hashed at a time."""


def json_hash(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short_hash(value: object) -> str:
    """The first 16 digits of `json_hash`: short enough for the name of a file."""
    return json_hash(value)[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of all bytes of a file, as 64 hex digits.

    A file that this user's commands have read before is not read again, unless its size, inode, or time of change is
    another (`remembered.py`).

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        known = remembered.get(before)
        if known is None:
            known = hashlib.file_digest(file, "sha256").hexdigest()
            remembered.add(before, os.fstat(file.fileno()), known)
    return known


def fresh_hash(path: Path) -> str:
    """As `file_hash`, of the bytes that lie there now: damage on a disk changes neither size nor times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(paths: Iterable[Path], of: Callable[[Path], str] = file_hash) -> dict[Path, str]:
    """`file_hash` of several files, some at a time. Raises OSError."""
    paths = list(paths)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(paths, pool.map(of, paths), strict=True))


def files_in(path: Path) -> list[Path]:
    """A file itself, or all files in a folder, at any depth."""
    return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]


def tree_hashes(path: Path) -> dict[str, str]:
    """`file_hash` of a file, or of all files in a folder, by their paths in it. Raises OSError."""
    return {file.relative_to(path).as_posix(): content for file, content in file_hashes(files_in(path)).items()}


def difference(then: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first thing in name -> hash that is not as it was, in words; None if all is."""
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            return f"{name} is {'new' if name not in then else 'missing' if name not in now else 'another'}"
    return None
