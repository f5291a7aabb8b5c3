"""Any 2D image file -> RGB, and the hash that names its content. Knows nothing of questions or models."""

import hashlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from a3tune.errors import DataError
from a3tune.types import ImageSource

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes (a decompression bomb)."""
WINDOW_PERCENTILES = (0.5, 99.5)
"""Grey values of more than 8 bits are scaled so that these percentiles become black and white; tails are clipped."""


def load_image(source: ImageSource) -> Image.Image:
    """Decode a 2D image to 8-bit RGB, upright.

    Grey images of more than 8 bits, integer or float, are windowed to their own 0.5-99.5 percentile range (`window`);
    every other image keeps its values. Transparency is laid on black, EXIF orientation is applied, of several frames
    the first is taken.

    Raises:
        DataError: the file is missing, empty, truncated, no image, or has more than `MAX_PIXELS` pixels.
    """
    name, data = describe(source), _read(source)
    for recognises, decode in DECODERS:
        if recognises(data):
            try:
                return decode(data)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            except Exception as error:  # a decoder of damaged bytes may raise anything
                raise DataError(f"{name}: expected a complete image file, could not decode it: {error}") from error
    raise AssertionError("the last decoder recognises everything")


def content_hash(source: ImageSource) -> str:
    """SHA-256 of the encoded bytes, as 64 hex digits: the same file under two names is one image.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    return hashlib.sha256(_read(source)).hexdigest()


def describe(source: ImageSource) -> str:
    """What an error message calls an image: its path, or the number of bytes it came in."""
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def window(values: np.ndarray) -> np.ndarray:
    """Scale grey values to uint8 by the 0.5-99.5 percentile range of the finite ones.

    If that range is a single value (a mask, a nearly empty image) the full range is used; a constant image becomes
    black. Infinities are clipped to the range, NaN becomes black. Any shape, any real dtype.

    Raises:
        DataError: no value is finite.
    """
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError("expected finite pixel values, all are NaN or infinite")
    low, high = np.percentile(finite, WINDOW_PERCENTILES)
    if low == high:
        low, high = finite.min(), finite.max()
    scaled = (np.clip(values, low, high) - low) / ((high - low) or 1.0)
    return np.round(255 * np.nan_to_num(scaled)).astype(np.uint8)


def _read(source: ImageSource) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = source.read_bytes()
        except OSError as error:
            raise DataError(f"{source}: expected an image file, cannot read it: {error.strerror}") from error
    if not data:
        raise DataError(f"{describe(source)}: expected an image, the file is empty")
    return data


def _decode_pillow(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise DataError("expected an image file, its format is not recognised") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got far more; reduce the image first") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; reduce the image first")
    if width * height == 0:
        raise DataError(f"expected at least one pixel, got {width} x {height}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(window(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return image.convert("RGB")


DECODERS: list[tuple[Callable[[bytes], bool], Callable[[bytes], Image.Image]]] = [(lambda data: True, _decode_pillow)]
"""(does it know these bytes, bytes -> RGB); the first that knows them decodes. Pillow takes the rest and stays last."""
