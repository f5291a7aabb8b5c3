"""Digests that travel with what they cover: of the files of a folder, and of a JSON object. Knows no formats.

A bit that flips on a disk, or on the way to another one, mostly leaves a file that reads as well as before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a3tune.errors import A3TuneError, in_short
from a3tune.machine.files import write_atomic
from a3tune.machine.hashes import file_hashes, fresh_hash, short_hash

DIGESTS = "digests.json"
"""File of a folder: name -> SHA-256 of each of the files that were in it when it was whole."""
_SEAL = "digest"
"""Field of a sealed JSON object."""


def write_digests(folder: Path) -> None:
    """Write `DIGESTS` for all files in and below a folder but texts for people: from now on it is whole.

    Raises:
        OutputError: the system refuses to write.
        OSError: a file cannot be read again.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    files = [path for path in files if path != folder / DIGESTS]
    digests = {path.relative_to(folder).as_posix(): digest for path, digest in file_hashes(files, fresh_hash).items()}
    write_atomic(folder / DIGESTS, (json.dumps(digests, indent=1) + "\n").encode())


def check_present(
    folder: Path, error: type[A3TuneError], hint: str, names: Sequence[str] = ()
) -> Mapping[str, str] | None:
    """The digests of a folder, None if it has none; its files, or some `names` of them, are there. Reads none of them.

    Raises:
        error: a file is missing; it names the file and ends with `hint`.
    """
    path = folder / DIGESTS
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as broken:
        raise error(f"{path}: damaged ({in_short(broken)}); {hint}") from None
    if not isinstance(told, dict) or not all(_inside(name) for name in told) or not told.keys() >= set(names):
        raise error(f"{path}: damaged: expected the digests of this folder's files by name; {hint}")
    for file in (folder / name for name in names or told):
        if not file.is_file():
            raise error(f"{file}: missing, and {DIGESTS} says that it was there; {hint}")
    return told


def check_digests(folder: Path, error: type[A3TuneError], hint: str, names: Sequence[str] = ()) -> bool:
    """Compare a folder's files, or some `names` of them, with its `DIGESTS`; False if it has none to compare with.

    Raises:
        error: a file is missing or not as it was written; it names the file and ends with `hint`.
    """
    told = check_present(folder, error, hint, names)
    if told is None:
        return False
    files = [folder / name for name in names or told]
    try:
        found = file_hashes(files, fresh_hash)
    except OSError as broken:
        raise error(f"{folder}: cannot be read ({broken.strerror}); {hint}") from None
    for file, digest in found.items():
        if told[file.relative_to(folder).as_posix()] != digest:
            raise error(f"{file}: damaged: its content is not what {DIGESTS} says; {hint}")
    return True


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a digest of itself; `unsealed` checks it."""
    return {**row, _SEAL: short_hash(dict(row))}


def unsealed(row: Any) -> dict[str, Any]:
    """A JSON object without the digest of itself. One that was never sealed is taken as it stands.

    Raises:
        ValueError: it is no object, or not the one that was sealed.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    rest = {name: value for name, value in row.items() if name != _SEAL}
    if _SEAL in row and row[_SEAL] != short_hash(rest):
        raise ValueError("its content does not fit its digest")
    return rest


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
