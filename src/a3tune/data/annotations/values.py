"""Masks whose pixel values say what is there: PNG files and NIfTI label volumes -> regions. 0 is background."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from a3tune.data.medical import nifti_slice
from a3tune.data.pictures import FORMATS
from a3tune.data.plain_json import parse_json
from a3tune.data.window import check_size
from a3tune.errors import DataError
from a3tune.masks import encode_mask
from a3tune.types import Region


def mask_values(path: Path) -> np.ndarray:
    """Values [H, W], whole numbers, of a mask image: grey values, palette indices, or equal channels.

    Raises:
        DataError: it is no image, too large, or its colours are no label values.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_size(*image.size)
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


def value_regions(path: Path, values: np.ndarray, names: Mapping[int, str], names_file: Path) -> tuple[Region, ...]:
    """One region per label value; a single value without a name is a region without a name.

    Raises:
        DataError: several values, and not all of them have a name.
    """
    present = [int(value) for value in np.unique(values) if value]
    nameless = [value for value in present if value not in names]
    if nameless and (len(present) > 1 or names):
        listed = ", ".join(map(str, nameless[:8])) + (", ..." if len(nameless) > 8 else "")
        raise DataError(
            f'{path}: the values {listed} have no name; write {{"{nameless[0]}": "...", ...}} to {names_file}'
        )
    return tuple(Region(mask=encode_mask(values == value), name=names.get(value, "")) for value in present)
