"""Rows in parquet shards, found by key; each shard is written whole or not at all. Knows no labels.

A shard is named by the hash of its bytes. Opening a table reads the keys alone, which parquet's own check sums cover;
a row is taken only from a shard that is what its name says, and only if it has the key that was asked for.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from a3tune.errors import LabelError, in_short
from a3tune.machine.files import write_atomic
from a3tune.machine.hashes import short_hash

_CACHED_SHARDS = 64
_NAME_DIGITS = 32
"""Of the hash of a shard's bytes; the 16 digits of an older one's name are the hash of its keys."""
_ROW_BITS = 32
"""Of a row's place: the number of its shard, then its number in the shard."""


def _digest(key: tuple[str, ...]) -> bytes:
    """A key in 16 bytes: tens of millions of questions would not fit into memory."""
    return hashlib.blake2b("\0".join(key).encode(), digest_size=16).digest()


class Rows(NamedTuple):
    """What the rows of a table are."""

    schema: pa.Schema
    key: tuple[str, ...]
    """Fields whose values no two rows share."""
    check: Callable[[pa.Table], None]
    """Raises ValueError for values that nobody can have written."""


class Table:
    """Rows in parquet shards of one folder, found by key; a row is a dict of the schema's fields."""

    def __init__(self, folder: Path, kind: Rows):
        self._folder, self._kind = folder, kind
        self._new: dict[tuple[str, ...], dict] = {}
        self._shards: list[Path] = []
        self._place: dict[bytes, int] = {}
        self._read = lru_cache(_CACHED_SHARDS)(read_shard)
        for shard in sorted(folder.glob("*.parquet")):
            self._enter(shard, read_keys(shard, kind))

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._new or _digest(key) in self._place

    def get(self, *key: str) -> dict | None:
        """The row of a key, or None.

        Raises:
            LabelError: its shard is damaged.
        """
        if key in self._new:
            return self._new[key]
        place = self._place.get(_digest(key))
        if place is None:
            return None
        shard = self._shards[place >> _ROW_BITS]
        rows = self._read(shard, self._kind).slice(place % 2**_ROW_BITS, 1).to_pylist()
        if not rows or tuple(rows[0][field] for field in self._kind.key) != key:
            raise _damaged(shard, "its keys are not those of its rows")
        return rows[0]

    def add(self, row: dict) -> None:
        """Hold a row until the next `write`."""
        self._new[tuple(row[field] for field in self._kind.key)] = row

    def write(self) -> None:
        """Write the held rows as one shard, whole or not at all; the same rows give the same name."""
        if not self._new:
            return
        file = BytesIO()
        rows = pa.Table.from_pylist(list(self._new.values()), schema=self._kind.schema)
        pq.write_table(rows, file, write_page_checksum=True)
        shard = self._folder / f"{_name(file.getvalue())}.parquet"
        write_atomic(shard, file.getvalue())
        self._enter(shard, self._new)
        self._new = {}

    def _enter(self, shard: Path, keys: Iterable[tuple[str, ...]]) -> None:
        first = len(self._shards) << _ROW_BITS
        self._shards.append(shard)
        self._place |= {_digest(key): first + number for number, key in enumerate(keys)}


def read_keys(path: Path, kind: Rows) -> list[tuple[str, ...]]:
    """The keys of a shard's rows, in their order. Little of the file is read, and only that is checked.

    Raises:
        LabelError: the file is damaged or missing.
    """
    return _keys(_parsed(path, path, kind, kind.key), kind)


def read_shard(path: Path, kind: Rows) -> pa.Table:
    """All rows of a shard.

    Raises:
        LabelError: the file is damaged or missing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror) from error
    sealed = len(path.stem) == _NAME_DIGITS
    if sealed and path.stem != _name(content):
        raise _damaged(path, "its content is not what its name says")
    rows = _parsed(path, BytesIO(content), kind)
    if not sealed and path.stem != short_hash(sorted(_keys(rows, kind))):
        raise _damaged(path, "its keys are not what its name says")
    try:
        kind.check(rows)
    except ValueError as error:
        raise _damaged(path, error) from error
    return rows


def _parsed(path: Path, source: Path | BytesIO, kind: Rows, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard's rows, or some of their columns."""
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as shard:
            if not shard.schema_arrow.equals(kind.schema):
                raise ValueError("it has other columns")
            rows = shard.read(columns)
            rows.validate(full=True)  # arrow trusts what it reads
            if any(column.null_count for column in rows.columns):
                raise ValueError("values are missing")
            return rows
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path, error) from error


def _keys(rows: pa.Table, kind: Rows) -> list[tuple[str, ...]]:
    return list(zip(*(rows[field].to_pylist() for field in kind.key), strict=True))


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_NAME_DIGITS]


def _damaged(path: Path, why: object) -> LabelError:
    return LabelError(f"{path}: expected a shard of region labels: {in_short(why)}; delete this file and label again")
