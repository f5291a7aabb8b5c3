"""Tables as people have them -> raw rows, one after another, in the columns that they have there. Opens no image."""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3tune.data.importing.excel import read_excel
from a3tune.data.plain_json import parse_json
from a3tune.data.tables import class_names, saved_splits, table_rows
from a3tune.errors import DataError, shown

SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validate": "validation"}
SPLITS |= {"validation": "validation", "dev": "validation", "test": "test", "testing": "test"}
"""What splits are called -> our name."""
TABLES = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".ndjson", ".parquet")
PICTURES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".webp",
    ".jp2",
    ".dcm",
    ".nii",
    ".nii.gz",
    ".mgz",
)
_FIELD = 2**27
"""Most characters of a cell."""
_SHARD = re.compile(r"^(?P<split>[a-z]+)(?=[-_.]|$)")


@dataclass(frozen=True, slots=True)
class Part:
    """One table of a source."""

    path: Path
    """A file, or a folder saved by `save_to_disk`."""
    split: str | None = None
    """What its place says: "train", "validation" or "test"."""

    @property
    def folder(self) -> Path:
        """What names of images are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


def find_parts(source: Path) -> list[Part]:
    """The tables of a file or folder: of a folder a saved data set, `metadata` files beside images, or its tables.

    Raises:
        DataError: it is missing, holds no table, or tables that do not say what splits they are.
    """
    if source.is_file():
        return [Part(source)]  # whatever its name: it is all there is
    if not source.is_dir():
        raise DataError(f"{source}: expected a table ({', '.join(TABLES)}) or a folder, it is missing")
    splits = saved_splits(source)
    if splits:
        return [Part(source / name, SPLITS.get(name)) for name in splits]
    if (source / "state.json").is_file():
        return [Part(source)]
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in TABLES and not _is_hidden(source, file))
    about = [file for file in files if file.stem == "metadata"]
    shards = [file for file in files if _split_in(source, file)]
    parts = about or shards or files
    if not parts:
        raise DataError(f"{source}: expected a table ({', '.join(TABLES)}) in this folder, found none")
    if len(parts) > 1 and not (about or shards):
        listed = ", ".join(file.relative_to(source).as_posix() for file in parts[:5])
        raise DataError(
            f"{source}: expected one table, or tables named by split, found {len(parts)}: {listed}; name one"
        )
    sets = sorted({_set_of(source, file) for file in shards if not about})
    if len(sets) > 1:
        raise DataError(f"{source}: expected one data set, found several: {', '.join(sets[:8])}; name one")
    return [Part(file, _split_in(source, file)) for file in parts]


def read_part(part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1; of lines of a text as an editor counts them) and columns of every row; of a line that is no row
    `{"": WHY}`.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    ending = part.path.suffix.lower()
    if part.path.is_dir() or ending == ".parquet":
        names = class_names(part.path)
        for number, row in enumerate(table_rows(part.path), start=1):
            yield number, row | {key: names[key][row[key]] for key in names if _is_class(row.get(key), names[key])}
    elif ending in (".csv", ".tsv"):
        yield from _read_csv(part.path, "\t" if ending == ".tsv" else None)
    elif ending == ".xlsx":
        yield from read_excel(part.path)
    elif ending in (".jsonl", ".ndjson"):
        yield from _read_lines(part.path)
    elif ending == ".json":
        yield from enumerate(_read_json(part.path), start=1)
    else:
        raise DataError(f"{part.path}: expected a table: {', '.join(TABLES)}")


def _split_of(name: str) -> str | None:
    match = _SHARD.match(name.lower())
    return SPLITS.get(match["split"]) if match else None


def _split_in(source: Path, file: Path) -> str | None:
    """What a file's name says, `train-00000-of-00002.parquet`, or a folder's: `train/0000.parquet`."""
    names = ["" if file.stem == "metadata" else file.stem, *file.relative_to(source).parts[:-1]]
    return next((split for name in names if (split := _split_of(name))), None)


def _set_of(source: Path, file: Path) -> str:
    """The folder whose splits a file is one of: that of the file, or that of the folder which is named by its split."""
    parts = file.relative_to(source).parts[:-1]
    named = [] if _split_of(file.stem) else [at for at, name in enumerate(parts) if _split_of(name)]
    return "/".join(parts[: named[0]] if named else parts) or "."


def _is_hidden(source: Path, file: Path) -> bool:
    names = file.relative_to(source).parts
    return any(name.startswith((".", "_")) for name in names) or file.name in ("dataset_infos.json", "package.json")


def _is_class(value: Any, names: list[str]) -> bool:
    return type(value) is int and 0 <= value < len(names)


def _text(path: Path) -> str:
    """Text as spreadsheets write it: UTF-8, UTF-16 with its mark, else Windows's Western European."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a table, cannot read it: {error.strerror}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Cells may hold images in base 64; csv knows one limit for all."""
    before = csv.field_size_limit(_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, delimiter: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(path)
    if "\0" in text:
        raise DataError(f"{path}: expected a text, got bytes of 0 in it")
    head, _, rest = text.partition("\n")
    said = re.fullmatch(r"sep=(.)\r?", head)  # Excel's own line
    if said:
        delimiter, text = said[1], rest
    delimiter = delimiter or max(",;\t|", key=head.count)
    with _long_cells():
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            names = [name.strip() or f"column {at}" for at, name in enumerate(reader.fieldnames or [], start=1)]
            if len(set(names)) < len(names):
                raise DataError(f"{path}: expected a name for each column, each once, got {shown(names, 150)}")
            reader.fieldnames = names
            for row in reader:
                line = reader.line_num + bool(said)
                if any(row.pop(None, None) or ()):
                    yield line, {"": f"more cells than the {len(names)} columns"}
                elif any(row.values()):
                    yield line, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: expected a table of columns: {error}") from None


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(_text(path)), start=1):
        if line.strip():
            try:
                yield number, _object(parse_json(line, constants=True))
            except ValueError as error:
                yield number, {"": f"expected one JSON object per line: {error}"}


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        data = parse_json(_text(path), constants=True)
    except ValueError as error:
        raise DataError(f"{path}: expected JSON: {error}") from None
    lists = [item for item in data.values() if _is_rows(item)] if isinstance(data, dict) else [data]
    if len(lists) != 1 or not _is_rows(lists[0]):
        raise DataError(f"{path}: expected an array of objects, or an object with one such array, got {shown(data)}")
    return lists[0]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"got {shown(value)}")
    return value
