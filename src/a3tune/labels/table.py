"""Rows in parquet shards, found by key; each shard is written whole or not at all. Knows no labels."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from a3tune.errors import LabelError
from a3tune.machine.files import replacing
from a3tune.machine.hashes import short_hash

_CACHED_SHARDS = 64
_ROW_BITS = 32
"""Of a row's place: the number of its shard, then its number in the shard."""


def _digest(key: tuple[str, ...]) -> bytes:
    """A key in 16 bytes: tens of millions of questions would not fit into memory."""
    return hashlib.blake2b("\0".join(key).encode(), digest_size=16).digest()


class Table:
    """Rows in parquet shards of one folder, found by key; a row is a dict of the schema's fields."""

    def __init__(self, folder: Path, schema: pa.Schema, key: tuple[str, ...]):
        self._folder, self._schema, self._key = folder, schema, key
        self._new: dict[tuple[str, ...], dict] = {}
        self._shards: list[Path] = []
        self._place: dict[bytes, int] = {}
        self._read = lru_cache(_CACHED_SHARDS)(read_shard)
        for shard in sorted(folder.glob("*.parquet")):
            self._enter(shard, zip(*(column.to_pylist() for column in read_shard(shard, key).columns), strict=True))

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._new or _digest(key) in self._place

    def get(self, *key: str) -> dict | None:
        """The row of a key, or None."""
        if key in self._new:
            return self._new[key]
        place = self._place.get(_digest(key))
        if place is None:
            return None
        return self._read(self._shards[place >> _ROW_BITS]).slice(place % 2**_ROW_BITS, 1).to_pylist()[0]

    def add(self, row: dict) -> None:
        """Hold a row until the next `write`."""
        self._new[tuple(row[field] for field in self._key)] = row

    def write(self) -> None:
        """Write the held rows as one shard, whole or not at all; the same keys give the same name."""
        if not self._new:
            return
        shard = self._folder / f"{short_hash(sorted(self._new))}.parquet"
        with replacing(shard) as file:
            pq.write_table(pa.Table.from_pylist(list(self._new.values()), schema=self._schema), file)
        self._enter(shard, self._new)
        self._new = {}

    def _enter(self, shard: Path, keys: Iterable[tuple[str, ...]]) -> None:
        first = len(self._shards) << _ROW_BITS
        self._shards.append(shard)
        self._place |= {_digest(key): first + number for number, key in enumerate(keys)}


def read_shard(path: Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    """All rows of a shard, or some of its columns.

    Raises:
        LabelError: the file is damaged or missing.
    """
    try:
        with pq.ParquetFile(path) as shard:
            return shard.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise LabelError(
            f"{path}: expected a shard of region labels: {error}; delete this file and label again"
        ) from error
