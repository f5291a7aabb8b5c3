"""Rows of parquet files and of data sets saved by Hugging Face `datasets` -> rows in the public fields (`rows.py`).

A row holds either the public fields, or a conversation as chat trainers have it:

    messages  one question and one answer: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}];
              content is a text, or a list of {"type": "text", "text": ...} and {"type": "image"} parts
    images    a list of one image (or `image`, the image itself)

and may hold `id`, `answer_type`, `options`, `regions` and `meta` besides. An image is a path, the bytes of an encoded
image, or a struct {"bytes", "path"} of which the bytes count if there are any.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from a3tune.data.plain_json import parse_json
from a3tune.errors import DataError, shown

_ROWS, _BYTES = 64, 2**28
"""Most rows, and most bytes if each row is as large as all of its row group, that are in memory twice."""
_UNPACKED, _RATIO = 2**28, 1000
"""A table that unpacks to more bytes, and to more than this multiple of its file, is refused: no images do."""


def is_table(path: Path) -> bool:
    """Whether rows are read from here as a table: a parquet file, or a folder."""
    return path.suffix == ".parquet" or path.is_dir()


def read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and public fields of every row of a parquet file or of a folder saved by `save_to_disk`.

    A missing `id` becomes the file's name and the row's number; columns outside the format are an error later on.

    Raises:
        DataError: the file or folder cannot be read, or a row is no question and answer about one image.
    """
    same: dict[bytes, bytes] = {}  # many questions share an image: its bytes are held once
    for number, row in enumerate(table_rows(path), start=1):
        where = f"{path}:{number}"
        row = _conversation(where, row) if "messages" in row else dict(row)
        row.setdefault("id", f"{path.stem}-{number}")
        image = _image(where, row.get("image"))
        row["image"] = same.setdefault(image, image) if isinstance(image, bytes) else image
        for field in ("options", "regions", "meta"):
            if field in row:
                row[field] = plain(row[field])
        yield number, {key: value for key, value in row.items() if value is not None or key in ("image", "regions")}


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file or a saved data set as they stand there.

    Raises:
        DataError: the file or folder cannot be read.
    """
    try:
        if path.is_dir():
            for file in _arrow_files(path):
                with pa.memory_map(str(file)) as source:
                    for batch in pa.ipc.open_stream(source):
                        batch.validate(full=True)  # arrow trusts what it reads: wrong offsets end in a crash
                        yield from batch.to_pylist()
        else:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(_rows_at_once(path, file.metadata)):
                    yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException, OverflowError) as error:
        raise DataError(f"{path}: expected a complete parquet file or saved data set: {error}") from None


def _rows_at_once(path: Path, metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    if sum(groups) > max(_UNPACKED, _RATIO * path.stat().st_size):
        raise ValueError(f"it unpacks to {sum(groups):,} bytes, more than {_RATIO} times its size")
    return max(1, min(_ROWS, _BYTES // max([1, *groups])))


def saved_splits(folder: Path) -> list[str]:
    """Names of the splits in a folder that `DatasetDict.save_to_disk` wrote; none if it is another folder."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    return sorted(item.name for item in folder.iterdir() if (item / "state.json").is_file())


def class_names(path: Path) -> dict[str, list[str]]:
    """Column -> the names that its numbers stand for, where `datasets` wrote them into the file (`ClassLabel`).

    Raises:
        DataError: the file or folder cannot be read.
    """
    try:
        if path.is_dir():
            files = _arrow_files(path)
            schema = pa.ipc.open_stream(pa.memory_map(str(files[0]))).schema if files else pa.schema([])
        else:
            schema = pq.read_schema(path)
        about = parse_json((schema.metadata or {}).get(b"huggingface", b"{}").decode())
        features = about.get("info", {}).get("features", {})
        return {name: item["names"] for name, item in features.items() if _is_class(item)}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: expected a complete parquet file or saved data set: {error}") from None
    except (ValueError, AttributeError):
        return {}


def _is_class(feature: Any) -> bool:
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _arrow_files(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir()))
        raise DataError(f"{folder}: expected one split of a saved data set, this holds several: name one of {splits}")
    state = folder / "state.json"
    if not (folder / "dataset_info.json").is_file() or not state.is_file():
        raise DataError(f"{folder}: expected a folder saved by `save_to_disk`: dataset_info.json and state.json in it")
    try:
        names = [item["filename"] for item in parse_json(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state}: expected the list of arrow files that `save_to_disk` writes, got {shown(error)}"
        ) from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{state}: expected names of files in this folder, got {shown(names, 80)}")
    return [folder / name for name in names]


def _conversation(where: str, row: dict[str, Any]) -> dict[str, Any]:
    messages, images = row["messages"], row.get("images", [row["image"]] if "image" in row else [])
    roles = [item.get("role") if isinstance(item, dict) else None for item in messages or []]
    if roles != ["user", "assistant"]:
        raise DataError(f"{where}: messages: expected one user and one assistant message, got the roles {shown(roles)}")
    if not isinstance(images, list) or len(images) != 1:
        count = len(images) if isinstance(images, list) else images
        raise DataError(f"{where}: images: expected a list of one image, got {shown(count, 40)}")
    prompt, answer = (_content(where, item.get("content")) for item in messages)
    rest = {key: value for key, value in row.items() if key not in ("messages", "images", "image")}
    return rest | {"image": images[0], "prompt": prompt, "answer": answer}


def _content(where: str, content: Any) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError(f"{where}: messages: expected a text or a list of parts as content, got {shown(content)}")
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: messages: expected a text in each part of type 'text', got {shown(texts)}")
    return "\n".join(text.replace("<image>", "").strip() for text in texts if text).strip()


def _image(where: str, value: Any) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: image: expected a path or the bytes of an image, got {shown(value)}")
    return value


def plain(value: Any) -> Any:
    """Arrow gives every struct all of its keys: those without a value are left out; pairs of a map become a dict."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        value = dict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value
