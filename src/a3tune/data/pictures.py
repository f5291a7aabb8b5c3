"""What Pillow and tifffile decode -> 8-bit RGB: deep grey and colour, white as the least value, transparency."""

import io
import sys

import numpy as np
from PIL import Image, ImageFile, ImageOps

from a3tune.data.window import MAX_PIXELS, check_size, window
from a3tune.errors import DataError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
"""What Pillow may decode. Of its other formats one starts a program (EPS), and all widen what a file can attack."""
_TIFF = (b"II*\0", b"MM\0*")
_BITS = 258
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0
_PLANES, _SEPARATE = 284, 2
_ORIENTATION = 274
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""Byte order -> the order by which Pillow, which keeps the upper byte of a deep colour only, finds the lower one."""


def decode_picture(data: bytes, fragment: str) -> Image.Image:
    """The first frame of an encoded picture as 8-bit RGB, upright.

    Grey and colour of more than 8 bits are windowed to their own range (`window`; the channels of a colour together),
    every other picture keeps its values. Transparency is laid on black, EXIF orientation is applied.

    Raises:
        DataError: there is a fragment, the format is unknown, or there are more than `MAX_PIXELS` pixels.
    """
    if fragment:
        raise DataError(f"'#{fragment:.60}': expected a DICOM or NIfTI file before it, this is another image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data[:4] in _TIFF:
            return _decode_tiff(data)
        raise DataError(f"expected an image file ({', '.join(FORMATS)}), its format is not recognised") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"expected at most {MAX_PIXELS:,} pixels, got far more; reduce the image first") from None
    check_size(*image.size)
    tags = image.getexif() if image.format == "TIFF" else {}
    raw = _raw_mode(image)
    if tags.get(_PLANES) == _SEPARATE and np.max(tags.get(_BITS, 8)) > 8:
        return _decode_tiff(data)  # Pillow reads planes of 16 bits as if they had 8
    if ";16" in raw and image.mode in ("RGB", "RGBA"):
        return _shown(_deep_colour(data, image, raw), premultiplied="RGBa" in raw)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _shown(np.asarray(image)[..., None], white_is_least=tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return image.convert("RGB")


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the values lie in the file, "RGB;16B"; "" where Pillow needs no such name."""
    arguments = image.tile[0].args if image.tile else None
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _deep_colour(data: bytes, image: Image.Image, raw: str) -> np.ndarray:
    """Values uint16 [H, W, C] of a picture whose upper bytes Pillow gives."""
    if 3 * image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"expected at most {MAX_PIXELS // 3:,} pixels of 16-bit colour, got {image.width} x {image.height}"
        )
    if raw == "LA;16B":
        raw_bytes = _as_stored(data, "RGBA")
        return 256 * raw_bytes[..., ::2].astype(np.uint16) + raw_bytes[..., 1::2]
    raw = raw.replace("RGBa", "RGBA")
    upper, lower = _as_stored(data, raw), _as_stored(data, raw[:-1] + _SWAPPED[raw[-1]])
    return 256 * upper.astype(np.uint16) + lower


def _as_stored(data: bytes, raw: str) -> np.ndarray:
    """uint8 [H, W, C]: the file's values read as if they lay there as `raw` says."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]
    return np.asarray(ImageOps.exif_transpose(image))


def _shown(values: np.ndarray, *, white_is_least: bool = False, premultiplied: bool = False) -> Image.Image:
    """Deep values [H, W, C] as RGB; the last of 2 or 4 channels is opacity, whole at 65,535."""
    channels = values.shape[2]
    if channels in (2, 4):
        opacity = values[..., -1:].astype(np.float64) / 65535
        values = values[..., :-1] * (1.0 if premultiplied else opacity)
    if white_is_least:
        values = -values.astype(np.float64)
    grey = window(values)
    return Image.fromarray(grey if grey.shape[2] == 3 else grey[..., 0]).convert("RGB")


def _decode_tiff(data: bytes) -> Image.Image:
    """A TIFF file of a kind that Pillow does not know, if it is not compressed."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        check_size(page.imagewidth * max(1, page.samplesperpixel), page.imagelength)
        fits = page.dtype is not None and page.dtype.kind in "iuf" and page.samplesperpixel <= 4
        if page.compression != tifffile.COMPRESSION.NONE or not fits or page.nbytes > len(data):
            raise DataError("this kind of TIFF is read with grey or RGB values, not compressed: save it so")
        values = page.asarray(maxworkers=1)
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
        values = values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
        if values.dtype != np.uint16 or not page.extrasamples or not page.extrasamples[0]:  # no opacity, or no unit
            values = values[..., : 3 if values.shape[2] >= 3 else 1]
        premultiplied = tifffile.EXTRASAMPLE.ASSOCALPHA in page.extrasamples
        white_is_least = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        image = _shown(values, white_is_least=white_is_least, premultiplied=premultiplied)
        image.getexif()[_ORIENTATION] = page.tags.valueof(_ORIENTATION, default=1)
        return ImageOps.exif_transpose(image)
