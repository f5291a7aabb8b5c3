"""The public row format -> `Sample`, and back. Never opens an image.

One JSON object per line of a JSONL file (or one row of a table, see `tables.py`):

    id           text, unique in the file
    image        path, relative to the file's own folder (or absolute); a fragment names a frame or slice (`medical.py`)
    prompt       text, the question
    answer       text, the reference answer
    answer_type  "open" | "closed" | "choice" | "report"; left out: "choice" with options, "closed" for a yes or no,
                 else "open"
    options      of a "choice": a list of texts, the answer is one of them; left out if they are not known
    regions      a list of {"rle": {"size": [height, width], "counts": "..."}} or {"box": [x0, y0, x1, y1]}, with "name"
                 if it has one; left out or null: nobody said where to look; []: the question asks about no place
    meta         {"modality": "CT", ...}: what results are broken down by; numbers become text
"""

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from a3tune.config import DataConfig
from a3tune.data.paths import is_address
from a3tune.data.plain_json import parse_json
from a3tune.data.tables import is_table, read_table
from a3tune.data.window import check_size
from a3tune.errors import ConfigError, DataError, is_data_uri, shown
from a3tune.machine.files import replacing
from a3tune.masks import box_of
from a3tune.types import AnswerType, Box, Region, Rle, Sample

FIELDS = ("id", "image", "prompt", "answer", "answer_type", "options", "regions", "meta")
ANSWER_TYPES: tuple[AnswerType, ...] = get_args(AnswerType)
_LONGEST = 2**25
"""Letters of a line; one with the masks of a large image has a few million."""
Split = Literal["train", "validation", "test"]
_LONGEST_PATH = 4096
"""Characters; no file system takes more."""


def read_rows(path: Path) -> list[Sample]:
    """Read rows strictly: a JSONL file, a `.parquet` file or a folder saved by `save_to_disk`. Images are not opened.

    Blank lines are skipped. Rows of tables may bring their images as bytes.

    Raises:
        DataError: the file cannot be read, has no row, or a row breaks the format; names file, row, field and what was
            expected.
    """
    if is_table(path):
        return _not_empty(path, _samples(path, read_table(path), "row"))
    with _opened(path) as lines:
        return _not_empty(path, _parse(path, lines))


def read_all(path: Path) -> tuple[list[tuple[str, Sample]], list[str]]:
    """Every row that can be read, with its place, and a line about every one that cannot.

    A table (`tables.py`) is read up to its first row that is no row at all.

    Raises:
        DataError: the file cannot be read, or has no row.
    """
    folder = path if path.is_dir() else path.parent
    found: list[tuple[str, Sample]] = []
    problems: list[str] = []
    place_of: dict[str, str] = {}

    def take(number: int, row: Any) -> None:
        where = f"{path}:{number}"
        try:
            sample = sample_of(where, folder, row)
            if sample.id in place_of:
                raise DataError(f"{where}: id: {shown(sample.id)} is also at {place_of[sample.id]}")
        except DataError as error:
            problems.append(str(error))
        else:
            place_of[sample.id] = where
            found.append((where, sample))

    if is_table(path):
        for number, row in read_table(path):
            take(number, row)
    else:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    for _, row in _objects(path, [line], first=number):
                        take(number, row)
                except DataError as error:
                    problems.append(str(error))
    if not found and not problems:
        raise _no_rows(path)
    return found, problems


def _not_empty(path: Path, samples: list[Sample]) -> list[Sample]:
    if not samples:
        raise _no_rows(path)
    return samples


def _no_rows(path: Path) -> DataError:
    return DataError(f"{path}: expected at least one row, it has none")


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    """The lines of a JSONL file, for as long as they are read."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield _lines(path, file)
    except OSError as error:
        raise DataError(f"{path}: expected a JSONL file, cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got {error}") from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise DataError(
                f"{path}: expected lines of at most {_LONGEST:,} letters, one JSON object each, got a longer one"
            )
        yield line


def check_split(data: DataConfig, split: Split) -> Sample:
    """The first row. Raises what `read_split` raises if there is nothing to read or this row breaks the format."""
    path = _path(data, split)
    if is_table(path):
        return _not_empty(path, _samples(path, islice(read_table(path), 1), "row"))[0]
    with _opened(path) as lines:
        return _not_empty(path, _samples(path, islice(_objects(path, lines), 1), "line"))[0]


def read_split(data: DataConfig, split: Split) -> list[Sample]:
    """`read_rows` of a split that a command needs. Raises ConfigError when the settings name none."""
    return read_rows(_path(data, split))


def _path(data: DataConfig, split: Split) -> Path:
    path = getattr(data, split)
    if path is None:
        raise ConfigError(f"data.{split}: expected a file of rows, got none; add data.{split}=FILE.jsonl")
    return path


def write_rows(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSONL, images as paths relative to the file's folder; all of it or nothing.

    Raises:
        DataError: a sample could not be read back (see `read_rows`), or its image is bytes.
        OutputError: the disk refuses.
    """
    lines = [json.dumps(_row(path, sample), ensure_ascii=False) + "\n" for sample in samples]
    _parse(path, lines)
    with replacing(path) as file:
        file.writelines(line.encode() for line in lines)


def _row(path: Path, sample: Sample) -> dict[str, Any]:
    if isinstance(sample.image, bytes):
        raise DataError(
            f"sample {sample.id:.60}: image: expected a path, got {len(sample.image)} bytes; "
            "`a3tune data import` writes images as files"
        )
    image = Path(os.path.relpath(sample.image, path.parent)).as_posix()
    row: dict[str, Any] = {
        "id": sample.id,
        "image": image,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "answer_type": sample.answer_type,
    }
    if sample.options:
        row["options"] = list(sample.options)
    if sample.regions is not None:
        row["regions"] = [region_row(region) for region in sample.regions]
    return row | ({"meta": dict(sample.meta)} if sample.meta else {})


def region_row(region: Region) -> dict[str, Any]:
    """A region as rows have it."""
    name = {"name": region.name} if region.name else {}
    if region.mask is not None:
        return {"rle": {"size": list(region.mask.size), "counts": region.mask.counts}} | name
    return {"box": region.box} | name


def _parse(path: Path, lines: Iterable[str]) -> list[Sample]:
    return _samples(path, _objects(path, lines), "line")


def _objects(path: Path, lines: Iterable[str], first: int = 1) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except ValueError as error:
            array = "; `a3tune data import` makes rows of a JSON array" if line.lstrip().startswith("[") else ""
            raise DataError(f"{path}:{number}: expected one JSON object per line: {error}{array}") from None


def _samples(path: Path, rows: Iterable[tuple[int, Any]], unit: str) -> list[Sample]:
    folder = path if path.is_dir() else path.parent
    samples: list[Sample] = []
    number_of: dict[str, int] = {}
    for number, row in rows:
        where = f"{path}:{number}"
        sample = sample_of(where, folder, row)
        if sample.id in number_of:
            first = f"{unit} {number_of[sample.id]}"
            raise DataError(f"{where}: id: expected a unique text, {shown(sample.id)} is also on {first}")
        number_of[sample.id] = number
        samples.append(sample)
    return samples


def sample_of(where: str, folder: Path, row: Any) -> Sample:
    """The sample of a row of public fields; a relative image is one of `folder`.

    Raises:
        DataError: the row breaks the format; begins with `where`.
    """
    _check_fields(where, row, FIELDS)
    answer = words(f"{where}: answer", _text(where, row, "answer"))
    options = _options(where, row.get("options"), answer)
    default = "closed" if answer.strip().rstrip(".").lower() in ("yes", "no") else "open"
    answer_type = row.get("answer_type", "choice" if options else default)
    if answer_type not in ANSWER_TYPES:
        raise DataError(f"{where}: answer_type: expected one of {', '.join(ANSWER_TYPES)}, got {shown(answer_type)}")
    if options and answer_type != "choice":
        raise DataError(f"{where}: options: expected them only with the answer_type 'choice', got {shown(answer_type)}")
    return Sample(
        id=_text(where, row, "id"),
        image=row["image"] if isinstance(row.get("image"), bytes) else _image(where, folder, row),
        prompt=words(f"{where}: prompt", _text(where, row, "prompt")),
        answer=answer,
        answer_type=answer_type,
        regions=_regions(where, row.get("regions")),
        meta=_meta(where, row.get("meta", {})),
        options=options,
    )


def _check_fields(where: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with the fields {', '.join(known)}, got {shown(value)}")
    other_forms = "; `a3tune data import` makes rows of other forms" if known is FIELDS else ""
    for field in sorted(value.keys() - set(known)):
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
        raise DataError(f"{where}: unknown field {shown(field)}; {hint}{other_forms}")


def _text(where: str, row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise DataError(f"{where}: {field}: expected a text, the field is missing")
    return _not_empty_text(f"{where}: {field}", row[field])


def words(where: str, value: Any) -> str:
    """A text that a model can be asked, or learn. Raises DataError, which begins with `where`, for anything else."""
    text = _not_empty_text(where, value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: expected a text, got one with half of a letter (a lone surrogate): {shown(text)}")
    return text


def _not_empty_text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected a text that is not empty, got {shown(value)}")
    return value


def _image(where: str, folder: Path, row: dict[str, Any]) -> Path:
    name = _text(where, row, "image")
    try:
        return folder / image_path(name)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def image_path(name: str) -> Path:
    """The path of an image. Raises DataError for a text that is none: an address, a data URI, far too long."""
    if is_data_uri(name) or is_address(name):
        held = "an address" if is_address(name) else "the image itself"
        raise DataError(
            f"image: expected the path of a file, got {held}: {shown(name)}; `a3tune data import` writes data URIs as "
            "files, and nothing is downloaded: save the images of addresses first"
        )
    if not name.strip() or "\0" in name or len(name) > _LONGEST_PATH:
        raise DataError(f"image: expected the path of a file, got {len(name):,} characters: {shown(name)}")
    return Path(name)


def _meta(where: str, value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: meta: expected an object of texts, got {shown(value)}")
    for key, item in value.items():
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise DataError(f"{where}: meta.{key:.60}: expected a text or a number, got {shown(item)}")
    return {key: str(item) for key, item in value.items()}


def _options(where: str, value: Any, answer: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not (
        isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) and item.strip() for item in value)
    ):
        raise DataError(f"{where}: options: expected a list of two texts or more, got {shown(value)}")
    if answer not in value:
        raise DataError(f"{where}: answer: expected one of the options, word for word, got {shown(answer)}")
    return tuple(value)


def _regions(where: str, value: Any) -> tuple[Region, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"{where}: regions: expected a list, null or nothing, got {shown(value)}")
    return tuple(_region(f"{where}: regions[{index}]", item) for index, item in enumerate(value))


def _region(where: str, value: Any) -> Region:
    _check_fields(where, value, ("rle", "box", "name"))
    if ("rle" in value) == ("box" in value):
        raise DataError(f"{where}: expected either 'rle' or 'box', got {'both' if 'rle' in value else 'neither'}")
    name = value.get("name", "")
    if not isinstance(name, str):
        raise DataError(f"{where}: name: expected a text, got {shown(name)}")
    if "box" in value:
        return Region(box=_box(where, value["box"]), name=name)
    return Region(mask=_rle(where, value["rle"]), name=name)


def _box(where: str, value: Any) -> Box:
    if not (isinstance(value, list) and len(value) == 4 and all(_is_number(item) for item in value)):
        raise DataError(f"{where}: box: expected four numbers [x0, y0, x1, y1], got {shown(value)}")
    try:
        return box_of(value)
    except ValueError as error:
        raise DataError(f"{where}: box: {error}; got {shown(value)}") from None


def _rle(where: str, value: Any) -> Rle:
    _check_fields(f"{where}: rle", value, ("size", "counts"))
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise DataError(f"{where}: rle.size: expected [height, width] in pixels, got {shown(size)}")
    if not isinstance(counts, str):
        raise DataError(f"{where}: rle.counts: expected COCO's compressed text, got {shown(counts)}")
    try:
        check_size(size[1], size[0])
    except DataError as error:
        raise DataError(f"{where}: rle.size: {error}") from None
    return Rle(size=(size[0], size[1]), counts=counts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
