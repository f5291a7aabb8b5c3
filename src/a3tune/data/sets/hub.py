"""Question sets as Hugging Face keeps them: parquet files by split with image, question and answer. Knows no set.

    data/train-*.parquet, train-*.parquet or default/train/*.parquet, and the same for validation and test

Several sets have these columns, and any set may lie in such files: what tells them apart is how many rows they have.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.tables import table_rows
from a3tune.errors import DataError, shown
from a3tune.types import ImageSource, Sample

SPLITS = ("train", "validation", "test")
COLUMNS = ("image", "question", "answer")
_PLACES = ("data/{}-*.parquet", "{}-*.parquet", "default/{}/*.parquet")


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that has any."""
    found = {split: sorted(file for place in _PLACES for file in folder.glob(place.format(split))) for split in SPLITS}
    return {split: files for split, files in found.items() if files}


def counts(folder: Path) -> dict[str, int]:
    """Rows of each split by the files' own footers; empty if a file has other columns, or is damaged."""
    try:
        files = {split: [pq.ParquetFile(file) for file in group] for split, group in parquet_files(folder).items()}
        if any(set(COLUMNS) - set(file.schema_arrow.names) for group in files.values() for file in group):
            return {}
        return {split: sum(file.metadata.num_rows for file in group) for split, group in files.items()}
    except (OSError, pa.ArrowException):
        return {}


def has_counts(folder: Path, *published: Mapping[str, int]) -> bool:
    """Whether the files have the columns, and as many rows as one of the published forms."""
    found = counts(folder)
    return bool(found) and any(found == dict(form) for form in published)


def read_parquet(
    reading: Reading, wanted: tuple[str, ...], make: Callable[[str, dict[str, Any], str, ImageSource], Sample | None]
) -> Splits:
    """The rows of the splits `wanted`; `make(file, row, "train-1", image)` makes their samples, None leaves one out."""
    splits = Splits()
    same: dict[bytes, bytes] = {}  # many questions share an image: its bytes are held once
    files = parquet_files(reading.folder)
    done, total = 0, sum(map(len, files.values()))
    for split in wanted:
        if split not in files:
            reading.problem(f"data/{split}-00000-of-0000N.parquet", "missing")
        number = 0
        for path in files.get(split, []):
            where = path.relative_to(reading.folder).as_posix()
            for row in _rows(reading, path, where):
                number += 1
                data = _image(row.get("image"))
                if data is None:
                    reading.problem(where, f"expected the image's bytes in each row, got {shown(row.get('image'))}")
                sample = make(where, row, f"{split}-{number}", same.setdefault(data, data)) if data else None
                reading.add(splits, split, where, sample, "no image in it" if data is None else "not of this set")
            done += 1
            if reading.progress:
                reading.progress(done, total)
    return splits


def _image(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else None


def _rows(reading: Reading, path: Path, where: str) -> Iterator[dict[str, Any]]:
    try:
        yield from table_rows(path)
    except DataError as error:
        reading.problem(where, str(error).partition(": ")[2])
