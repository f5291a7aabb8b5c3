"""A frame of a DICOM file -> grey or RGB pixels. How the file lies on a disk is the business of `dicom_file`."""

import re
import struct
from typing import Any

import numpy as np
from PIL import Image

from a3tune.data.dicom_file import check_jpeg_streams, decoder_for, read_dicom
from a3tune.data.medical import counted, missing, quietly, read_fragment
from a3tune.data.window import centred_window, check_size, ct_window, is_window, window
from a3tune.errors import DataError

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_COMPONENTS = 4


def decode_dicom(data: bytes, fragment: str) -> Image.Image:
    """One frame of a DICOM file as 8-bit RGB.

    Grey values are rescaled, windowed by the fragment's window, else the header's first window, else its VOI table,
    else by percentiles; MONOCHROME1 is inverted, padding becomes black. Colour is converted to RGB. An optional field
    of the header that makes no sense (a window of width 0, a damaged table) is passed over.

    Raises:
        DataError: pydicom is missing, the file is damaged or holds no image, or the fragment does not fit.
    """
    asked = read_fragment(fragment, ("frame", "window"))
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise missing("DICOM", "pydicom") from error
    dataset = quietly("DICOM file", lambda: read_dicom(data))
    pixels = quietly("DICOM file", lambda: _dicom_pixels(dataset, asked))
    return Image.fromarray(pixels).convert("RGB")


def _dicom_pixels(dataset: Any, asked: dict[str, str]) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    if not any(name in dataset for name in _PIXELS):
        raise DataError("expected a DICOM image, this object holds no pixels")
    check_size(int(dataset.Columns), int(dataset.Rows))
    frames, frame = int(_number_of(dataset, "NumberOfFrames") or 1), counted(asked, "frame")
    if frame >= frames:
        raise DataError(f"expected a frame below {frames}, got frame={frame}")
    plugin = decoder_for(dataset)
    if plugin:
        _check_codestreams(dataset.PixelData)
        check_jpeg_streams(dataset)
    raw = pixel_array(dataset, index=frame, decoding_plugin=plugin)
    check_size(raw.shape[1], raw.shape[0])
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        raw = apply_color_lut(raw, dataset)
        return (raw >> 8).astype(np.uint8) if raw.dtype == np.uint16 else raw.astype(np.uint8)
    if raw.ndim == 3:
        return raw if raw.dtype == np.uint8 else np.round(raw * (255 / (2 ** int(dataset.BitsStored) - 1))).astype("u1")
    padding = _padding(dataset, raw)
    values = np.where(padding, np.nan, _rescaled(dataset, raw, frame))
    grey = _windowed(dataset, values, frame, asked.get("window"))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return grey


def _rescaled(dataset: Any, raw: np.ndarray, frame: int) -> np.ndarray:
    """Values float64 [H, W] in the unit of the modality, such as Hounsfield units."""
    table = _looked_up(dataset, "ModalityLUTSequence", raw)
    if table is not None:
        return table[0]
    scaling = _group(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = (_number_of(scaling, name) for name in ("RescaleSlope", "RescaleIntercept"))
    return raw.astype(np.float64) * (slope or 1.0) + (intercept or 0.0)


def _windowed(dataset: Any, values: np.ndarray, frame: int, name: str | None) -> np.ndarray:
    if name:
        return centred_window(values, *ct_window(name))
    voi = _group(dataset, frame, "FrameVOILUTSequence", "WindowWidth")
    centre, width = (_number_of(voi, name) for name in ("WindowCenter", "WindowWidth"))
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if centre is not None and width is not None and is_window(centre, width, function):
        return centred_window(values, centre, width, function)
    table = _looked_up(dataset, "VOILUTSequence", values)
    if table is not None:
        return np.round(np.clip(table[0] / (2 ** table[1] - 1), 0, 1) * 255).astype(np.uint8)
    return window(values)


def _number_of(dataset: Any, name: str) -> float | None:
    """The first value of an optional field; None if it is missing or no number."""
    try:
        number = float(np.atleast_1d(np.asarray(dataset[name].value, np.float64))[0])
    except Exception:  # whatever stands there
        return None
    return number if np.isfinite(number) else None


def _looked_up(dataset: Any, sequence: str, values: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Values float64 [H, W] out of the first table of an optional sequence, and its bits; None if there is none.

    Written out, as pydicom looks up in a table of 8 bits modulo 256. What has no value (NaN) gets the first entry.
    """
    try:
        item = dataset[sequence][0]
        count, first, bits = (int(number) for number in item.LUTDescriptor)
        entries = item.LUTData
        order = "<" if dataset.original_encoding[1] else ">"
        table = np.frombuffer(entries, f"{order}u2") if isinstance(entries, bytes) else np.asarray(entries, np.uint16)
        if not 1 <= bits <= 16 or len(table) < (count := count or 2**16):
            return None
    except Exception:  # whatever stands there
        return None
    places = np.clip(np.nan_to_num(values) - first, 0, count - 1).astype(np.int64)
    return table[places].astype(np.float64), bits


def _group(dataset: Any, frame: int, sequence: str, field: str) -> Any:
    """Where a multi-frame file keeps this of a frame: its own group, the shared one, else the file's top level."""
    groups = (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0))
    for groups_name, index in groups:
        try:
            group = dataset[groups_name][index][sequence][0]
        except Exception:  # whatever stands there
            continue
        if _number_of(group, field) is not None:
            return group
    return dataset


def _padding(dataset: Any, raw: np.ndarray) -> np.ndarray:
    """Mask bool [H, W] of the pixels that stand for no measurement."""
    kind = "" if raw.dtype.kind != "f" else "Float" if raw.dtype.itemsize == 4 else "DoubleFloat"
    value = _number_of(dataset, f"{kind}PixelPaddingValue")
    if value is None:
        return np.isnan(raw) if kind else np.zeros(raw.shape, dtype=bool)
    limit = _number_of(dataset, f"{kind}PixelPaddingRangeLimit")
    low, high = sorted(_as_pixel(number, raw.dtype) for number in (value, value if limit is None else limit))
    return (raw >= low) & (raw <= high)


def _as_pixel(number: float, kind: np.dtype) -> float:
    """The value as pixels hold it: files give signed ones as unsigned, and the other way round."""
    if kind.kind == "f":
        return number
    low, span = np.iinfo(kind).min, 2 ** (8 * kind.itemsize)
    return (number - low) % span + low if low - span < number < low + 2 * span else number


def _check_codestreams(data: bytes) -> None:
    """A JPEG 2000 stream says its own size, which the decoder would allocate whatever the file's header says."""
    for start in re.finditer(b"\xff\x4f\xff\x51", data):
        x1, y1, x0, y0 = struct.unpack_from(">4I", data, start.start() + 8)
        (components,) = struct.unpack_from(">H", data, start.start() + 40)
        check_size(max(0, x1 - x0), max(0, y1 - y0))
        if components > _COMPONENTS:
            raise DataError(f"expected at most {_COMPONENTS} components of a pixel, got {components}")
