"""Masks whose pixel values say what is there: PNG files and NIfTI label volumes -> regions. 0 is background."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from a3tune.data.pictures import FORMATS
from a3tune.data.plain_json import parse_json
from a3tune.data.volume import nifti_slice
from a3tune.data.window import check_size
from a3tune.errors import DataError
from a3tune.masks import encode_mask
from a3tune.types import Region

_WHITE = (255, 65535)
"""What a mask drawn in shades of grey has inside; few label values go that far."""


def mask_values(path: Path) -> np.ndarray:
    """Values [H, W], whole numbers, of a mask image: grey values, palette indices, or equal channels. Upright: its EXIF
    orientation is applied, as it is to images.

    Raises:
        DataError: it is no image, too large, or its colours are no label values.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            check_size(*opened.size)
            image = ImageOps.exif_transpose(opened)
            values = np.asarray(image if image.mode in ("P", "L", "1", "I", "I;16") else image.convert("RGB"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise DataError(f"{path}: expected a mask image, could not decode it: {error}") from None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(f"{path}: expected a mask of label values (grey or palette), got a colour picture")
        values = values[..., 0]
    return values.astype(np.uint8) if values.dtype == bool else values


def slice_values(path: Path, fragment: str) -> np.ndarray:
    """Values int64 [H, W] of the same slice of a label volume.

    Raises:
        DataError: as `nifti_slice`; the volume holds other values than whole numbers.
    """
    try:
        values = nifti_slice(path.read_bytes(), fragment)
    except OSError as error:
        raise DataError(f"{path}: expected a label volume, cannot read it: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not (values % 1 == 0).all():
        raise DataError(f"{path}: expected a volume of labels, its values are not whole numbers")
    return values.astype(np.int64)


def read_names(path: Path) -> dict[int, str]:
    """Label value -> name from a JSON object {"1": "spleen"}; empty if there is no such file.

    Raises:
        DataError: the file is something else.
    """
    if not path.is_file():
        return {}
    try:
        names = parse_json(path.read_text(encoding="utf-8-sig"))
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("a name is no text")
        return {int(value): name for value, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: expected an object {{"1": "spleen", ...}}: {error}') from None


def value_regions(
    path: Path, values: np.ndarray, names: Mapping[int, str], names_file: Path, say: Callable[[str], None]
) -> tuple[Region, ...]:
    """One region per label value; a single value without a name is a region without a name.

    Many values of which at most the largest has a name are the soft edge of one mask, which ends at half of it. Said: a
    soft edge, an empty mask, and values without a name, which are left out.
    """
    present = [int(value) for value in np.unique(values) if value]
    if not present:
        say(f"{path}: an empty mask, all of it is background")
    if _is_soft(values, present) and set(names).intersection(present) <= {present[-1]}:
        say(f"{path}: {len(present)} grey values, taken for one mask with a soft edge that ends at {present[-1] // 2}")
        values, present = np.where(values > present[-1] // 2, present[-1], 0), present[-1:]
    nameless = [value for value in present if value not in names]
    if nameless and (len(present) > 1 or names):
        listed = ", ".join(map(str, nameless[:8])) + (", ..." if len(nameless) > 8 else "")
        say(f'{path}: the values {listed} have no name; write {{"{nameless[0]}": "...", ...}} to {names_file}')
        present = [value for value in present if value in names]
    return tuple(Region(mask=encode_mask(values == value), name=names.get(value, "")) for value in present)


def _is_soft(values: np.ndarray, present: list[int]) -> bool:
    """Whether the values are shades of one mask: two or more, and nearly white for most of what is not background."""
    return bool(
        len(present) > 1
        and present[-1] in _WHITE
        and np.count_nonzero(values > 0.9 * present[-1]) > 0.5 * np.count_nonzero(values)
        and present[0] < 0.9 * present[-1]
    )
