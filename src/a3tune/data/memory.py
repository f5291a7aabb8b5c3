"""Images and rows that are in memory already -> what files give. Knows pixels and public fields, no model."""

import io
import math
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from a3tune.data.rows import image_path, read_rows, sample_of
from a3tune.data.tables import plain
from a3tune.data.window import window
from a3tune.errors import DataError, shown
from a3tune.types import ImageSource, Sample

ImageLike = str | PathLike[str] | bytes | Image.Image | np.ndarray
"""A file, the encoded bytes of one, a Pillow image, or an array `[H, W]`, `[H, W, 3]` or, of 8 bits, `[H, W, 4]`."""
RowsLike = str | PathLike[str] | Iterable[Mapping[str, Any] | Sample]
"""A file or folder of rows, or the rows: mappings with the public fields (as a Hugging Face data set has them), a
DataFrame of pandas with these columns, or samples."""
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Of Pillow's images: PNG keeps these as they are."""


def image_source(image: ImageLike) -> ImageSource:
    """An image as rows have it: a file's path, or encoded bytes.

    Values of more than 8 bits are windowed to their own range, as those of files are.

    Raises DataError for what is no image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | PathLike):
        return image_path(fspath(image))
    if isinstance(image, Image.Image):
        try:
            return _png(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow reads it now, and may find it closed or damaged
            raise DataError(f"image: expected a Pillow image that can be read: {error}") from error
    if isinstance(image, np.ndarray):
        return _png(_picture(image))
    raise DataError(
        f"image: expected a path, the bytes of an image file, a Pillow image or an array, got {type(image).__name__}"
    )


def rows_of(rows: RowsLike) -> list[Sample]:
    """Samples of a file or folder (`read_rows`), or of rows in memory: mappings with the public fields, or samples.

    An image may be whatever `image_source` takes. A row without an id gets its place as one. Of a field None and NaN,
    pandas' word for nothing, say that it is missing.

    Raises DataError, which names row and field.
    """
    if isinstance(rows, str | PathLike):
        return read_rows(Path(fspath(rows)))
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
        raise DataError(f"rows: expected a file, or a list of rows, got {type(rows).__name__}")
    samples = [_sample(f"rows[{index}]", index, row) for index, row in enumerate(rows)]
    if not samples:
        raise DataError("rows: expected at least one, got none")
    return samples


def _sample(where: str, index: int, row: Any) -> Sample:
    if isinstance(row, Sample):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a mapping with the fields of a row, got {shown(row)}")
    fields = {name: plain(value) for name, value in row.items() if name != "image" and not _is_missing(value)}
    fields.setdefault("id", f"row-{index}")
    return sample_of(where, Path(), fields | {"image": _image(where, row.get("image"))})


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _image(where: str, value: Any) -> str | bytes:
    if isinstance(value, Mapping):  # as `datasets` has it where images are not decoded
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise DataError(f"{where}: image: expected an image or its path, the field is missing")
    try:
        source = value if isinstance(value, str) else image_source(value)  # the text may be no path: told by rows
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return str(source) if isinstance(source, Path) else source


def _picture(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    channels = (3, 4) if values.dtype == np.uint8 else (3,)  # opacity has no range of its own
    if not values.size or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in channels)):
        raise DataError(
            "image: expected an array [height, width] or [height, width, 3], got one of "
            f"{' x '.join(map(str, values.shape)) or 'no axes'}"
        )
    if values.dtype == bool:
        return Image.fromarray(values)
    if values.dtype.kind not in "iuf":
        raise DataError(f"image: expected an array of numbers, got {values.dtype}")
    return Image.fromarray(np.ascontiguousarray(values if values.dtype == np.uint8 else window(values)))


def _png(image: Image.Image) -> bytes:
    if image.mode == "F" or image.mode == "I":
        image = Image.fromarray(window(np.asarray(image)))
    elif image.mode not in _MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # for a moment, in memory
    return file.getvalue()
