"""What the rows of a store's three tables are: their columns, their keys, and values that nobody can have written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from a3tune.labels.stored import StoredSettings
from a3tune.labels.table import Rows, Table

_IMAGE = pa.field("image", pa.string())
_SEGMENTS = pa.schema(
    [
        _IMAGE,
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("counts", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
_EMBEDDINGS = pa.schema([_IMAGE, ("width", pa.int32()), ("vectors", pa.binary())])
_SIMILARITIES = pa.schema([_IMAGE, ("query", pa.string()), ("similarity", pa.list_(pa.float32()))])
_LARGEST_COSINE = 1.01
"""Between vectors that were rounded to float16."""


def _check_segments(rows: pa.Table) -> None:
    if not all((rows[side].to_numpy() > 0).all() for side in ("height", "width")):
        raise ValueError("an image has no size")
    counts, scores = (rows[name].combine_chunks() for name in ("counts", "scores"))
    if not counts.value_lengths().equals(scores.value_lengths()) or counts.flatten().null_count:
        raise ValueError("not every segment has a mask and a score")
    if not np.isfinite(_numbers(rows["scores"])).all():
        raise ValueError("a score is no number")


def _check_embeddings(rows: pa.Table) -> None:
    lengths, widths = pc.call_function("binary_length", [rows["vectors"]]).to_numpy(), rows["width"].to_numpy()
    if (widths <= 0).any() or (lengths % (widths * np.float16().nbytes)).any():
        raise ValueError("vectors are not of their width")


def _check_similarities(rows: pa.Table) -> None:
    if not (np.abs(_numbers(rows["similarity"])) <= _LARGEST_COSINE).all():
        raise ValueError("a similarity is no cosine")


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """All values of a column of lists; NaN where there is none."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


TABLES: dict[str, tuple[Rows, str]] = {
    "segments": (Rows(_SEGMENTS, ("image",), _check_segments), "segments"),
    "embeddings": (Rows(_EMBEDDINGS, ("image",), _check_embeddings), "ranking"),
    "similarities": (Rows(_SIMILARITIES, ("image", "query"), _check_similarities), "ranking"),
}
"""Folder of a table -> its rows, and the hash in `StoredSettings` of the settings that they depend on."""


def open_table(folder: Path, name: str, settings: StoredSettings) -> Table:
    """One of a store's tables for some settings.

    Raises:
        LabelError: a shard is damaged.
    """
    kind, covers = TABLES[name]
    return Table(folder / name / getattr(settings, covers), kind)
