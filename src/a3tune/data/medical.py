"""DICOM files and slices of NIfTI volumes -> grey or RGB pixels. Keeps no header text, nor puts any in a message.

A fragment after the path says what is shown:

    scan.dcm                     the first frame
    scan.dcm#frame=3             a frame, counted from 0
    ct.nii.gz#axial=12           a slice (axial, coronal or sagittal), counted from 0 from the feet, back or left
    ct.nii.gz#axial=12&volume=5  of a series of volumes, counted from 0; the first if left out
    ct.nii.gz#axial=12&window=lung, scan.dcm#window=bone    a customary window of CT, for values in Hounsfield units

Slices lie as radiologists look at them: the patient's right is on the left, anterior (axial) or superior (coronal,
sagittal) is at the top, anterior is on the left of a sagittal slice. Pixels are the volume's own: nothing is resampled.
"""

import gzip
import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from a3tune.data.dicom_file import GZIP, check_jpeg_streams, decoder_for, read_dicom
from a3tune.data.window import centred_window, check_size, ct_window, is_window, window
from a3tune.errors import DataError, shown
from a3tune.machine.quiet import ignoring

Result = TypeVar("Result")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The patient's axis that a slice stands across, in RAS order."""
MAX_VOLUME_BYTES = 2**31
"""Larger volumes are refused before they are unpacked."""
_NIFTI_HEADER, _MGH_HEADER = 544, 284
_LARGEST_OFFSET = 2**26
"""Bytes of header and extensions before the values of a NIfTI volume."""
_PIECE = 2**20
_COMPONENTS = 4


def is_nifti(data: bytes) -> bool:
    """Whether these bytes are a volume (NIfTI, or FreeSurfer's MGH), compressed with gzip or not."""
    head = _head(data)
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0" or _is_mgh(head)


def one_file(header: bytes, values: bytes) -> bytes:
    """The single file of a NIfTI volume that lies in two, `.hdr` and `.img`, which may be packed with gzip each.

    Raises:
        DataError: the first is no such header, or a file unpacks to more than the header says.
    """
    head = bytearray(_head(header)[:348])
    if head[344:348] != b"ni1\0":
        raise DataError("expected the header of a NIfTI volume (ni1), got another, such as Analyze's")
    order = "<" if head[:4] == struct.pack("<i", 348) else ">"
    (start,) = struct.unpack_from(f"{order}f", head, 108)
    if not 0 <= start <= _LARGEST_OFFSET:
        raise DataError(f"expected values within the first {_LARGEST_OFFSET:,} bytes of the volume, got {start:,}")
    head[344:348] = b"n+1\0"
    struct.pack_into(f"{order}f", head, 108, 352 + start)
    whole = bytes(head) + bytes(4)
    size = int(start) + _volume_size(_header(whole))
    with gzip.GzipFile(fileobj=io.BytesIO(values)) if values[:2] == GZIP else io.BytesIO(values) as file:
        return whole + file.read(size)


def _is_mgh(head: bytes) -> bool:
    """Version 1, four sizes, a type of value that exists."""
    version, *sizes, kind = struct.unpack_from(">6i", head.ljust(24, b"\0"))
    return version == 1 and min(sizes) > 0 and kind in (0, 1, 3, 4, 10)


def decode_dicom(data: bytes, fragment: str) -> Image.Image:
    """One frame of a DICOM file as 8-bit RGB.

    Grey values are rescaled, windowed by the fragment's window, else the header's first window, else its VOI table,
    else by percentiles; MONOCHROME1 is inverted, padding becomes black. Colour is converted to RGB. An optional field
    of the header that makes no sense (a window of width 0, a damaged table) is passed over.

    Raises:
        DataError: pydicom is missing, the file is damaged or holds no image, or the fragment does not fit.
    """
    asked = _parse(fragment, ("frame", "window"))
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise _missing("DICOM", "pydicom") from error
    dataset = _quietly("DICOM file", lambda: read_dicom(data))
    pixels = _quietly("DICOM file", lambda: _dicom_pixels(dataset, asked))
    return Image.fromarray(pixels).convert("RGB")


def decode_nifti(data: bytes, fragment: str) -> Image.Image:
    """One slice of a NIfTI volume as 8-bit RGB, windowed by the fragment's window, else by percentiles.

    Raises:
        DataError: as `nifti_slice`.
    """
    values = nifti_slice(data, fragment)
    name = _parse(fragment, (*PLANES, "volume", "window")).get("window")
    return Image.fromarray(centred_window(values, *ct_window(name)) if name else window(values)).convert("RGB")


def nifti_slice(data: bytes, fragment: str) -> np.ndarray:
    """Values float64 [height, width] of a slice, scaled as the header says, turned as `decode_nifti` shows them.

    Raises:
        DataError: nibabel is missing, the volume is damaged, too large or no grey volume, or the fragment names no
            slice of it; says how many slices there are.
    """
    asked = _parse(fragment, (*PLANES, "volume", "window"))
    volume = _volume(data)
    planes = [plane for plane in PLANES if plane in asked]
    counts = _quietly("NIfTI volume", lambda: _slices(volume))
    sizes = ", ".join(f"{plane} 0-{count - 1}" for plane, count in counts.items())
    if len(planes) != 1:
        raise DataError(f"expected one slice of the volume behind the path, as in '#axial=12'; there are {sizes}")
    index = _number(asked, planes[0])
    if index >= counts[planes[0]]:
        raise DataError(f"expected a slice of the volume ({sizes}), got {planes[0]}={index}")
    series = volume.shape[3] if len(volume.shape) > 3 else 1
    if _number(asked, "volume") >= series:
        raise DataError(f"expected a volume below {series}, got volume={_number(asked, 'volume')}")
    return _quietly("NIfTI volume", lambda: _cut(volume, PLANES[planes[0]], index, _number(asked, "volume")))


def nifti_grid(data: bytes) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (x, y, z) and affine [4, 4] of a volume: two volumes of one grid show the same place in the same slice.

    Raises:
        DataError: as `nifti_slice`.
    """
    volume = _volume(data)
    return volume.shape[:3], volume.affine


def _dicom_pixels(dataset: Any, asked: dict[str, str]) -> np.ndarray:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    if not any(name in dataset for name in _PIXELS):
        raise DataError("expected a DICOM image, this object holds no pixels")
    check_size(int(dataset.Columns), int(dataset.Rows))
    frames, frame = int(_number_of(dataset, "NumberOfFrames") or 1), _number(asked, "frame")
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


_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


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


@dataclass(frozen=True, slots=True)
class _Volume:
    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any
    data: bytes
    """The file, as it lies on the disk: of an unpacked volume only the wanted slice is kept."""


def _volume(data: bytes) -> _Volume:
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise _missing("NIfTI", "nibabel") from error

    def described() -> _Volume:
        header = _header(_head(data))
        _volume_size(header)
        offset = int(header.get_data_offset())
        if not 0 <= offset <= _LARGEST_OFFSET:
            raise DataError(f"expected values within the first {_LARGEST_OFFSET:,} bytes of the volume, got {offset:,}")
        return _Volume(tuple(header.get_data_shape()), np.asarray(header.get_best_affine()), header, data)

    return _quietly("NIfTI volume", described)


def _header(head: bytes) -> Any:
    import nibabel
    from nibabel.freesurfer.mghformat import MGHHeader

    if _is_mgh(head):
        return MGHHeader(head[:_MGH_HEADER], check=False)
    kind = nibabel.Nifti2Header if head[4:8] == b"n+2\0" else nibabel.Nifti1Header
    return kind(head[: kind.sizeof_hdr], check=False)


def _volume_size(header: Any) -> int:
    """Bytes of the values, refused where nobody reads them."""
    shape, values = header.get_data_shape(), header.get_data_dtype()
    if not 3 <= len(shape) <= 4 or min(shape) < 1 or values.kind not in "iuf":
        size = " x ".join(map(str, shape))
        raise DataError(f"expected grey values in three or four dimensions, got {size} of kind {values.kind}")
    size = int(np.prod(shape, dtype=object)) * values.itemsize
    if size > MAX_VOLUME_BYTES:
        raise DataError(f"expected a volume of at most {MAX_VOLUME_BYTES:,} bytes, got {size:,}; crop it first")
    check_size(*sorted(shape[:3])[1:])
    return size


def _head(data: bytes) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data[:_NIFTI_HEADER]
    try:
        return zlib.decompressobj(wbits=31).decompress(data[:65536], _NIFTI_HEADER)
    except zlib.error:
        return b""


def _plane(volume: _Volume, axis: int, index: int, number: int) -> np.ndarray:
    """Values float64 of a plane across an axis, the other two axes in their order, scaled as the header says.

    Voxels lie with the first axis fastest. What is unpacked goes by in pieces: a volume of zeros has a thousandth of
    its size on the disk, and need not fit into memory.
    """
    from nibabel.arrayproxy import ArrayProxy

    kind = volume.header.get_data_dtype()
    width, height, depth = volume.shape[:3]
    row, slab = width * kind.itemsize, width * height * kind.itemsize
    start = int(volume.header.get_data_offset())
    end = start + slab * depth * (volume.shape[3] if len(volume.shape) > 3 else 1)
    packed = volume.data[:2] == b"\x1f\x8b"
    kept: list[bytes] = []
    with gzip.GzipFile(fileobj=io.BytesIO(volume.data)) if packed else io.BytesIO(volume.data) as file:
        file.seek(start + number * depth * slab)
        for layer in range(depth):
            if axis == 2:
                kept += [file.read(slab)] if layer == index else []
                file.seek(0 if layer == index else slab, io.SEEK_CUR)
            elif axis == 1:
                file.seek(index * row, io.SEEK_CUR)
                kept.append(file.read(row))
                file.seek(slab - (index + 1) * row, io.SEEK_CUR)
            else:
                kept += _column(file, kind, (height, width), index)
        got = file.seek(end) if packed else len(volume.data)
    if got < end:
        raise DataError(f"expected {end:,} bytes of volume, got {got:,}: the file is truncated")
    shape = tuple(volume.shape[item] for item in range(3) if item != axis)
    slope, inter = volume.header.get_slope_inter()  # none at all of FreeSurfer's
    scaling = (1.0 if slope is None else slope, 0.0 if inter is None else inter)
    return np.asarray(ArrayProxy(io.BytesIO(b"".join(kept)), (shape, kind, 0, *scaling)), dtype=np.float64)


def _column(file: Any, kind: np.dtype, shape: tuple[int, int], index: int) -> list[bytes]:
    """One voxel of every row of the next layer [height, width], some rows at a time."""
    height, width = shape
    count = max(1, _PIECE // (width * kind.itemsize))
    kept = []
    for first in range(0, height, count):
        rows = min(count, height - first)
        data = file.read(rows * width * kind.itemsize)
        kept.append(np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)[index::width].tobytes())
    return kept


def _orientation(volume: _Volume) -> np.ndarray:
    import nibabel

    return nibabel.orientations.io_orientation(volume.affine)


def _slices(volume: _Volume) -> dict[str, int]:
    orientation = _orientation(volume)
    if np.isnan(orientation).any():
        raise DataError("expected a volume whose header says how it lies in space, its affine is singular")
    return {plane: volume.shape[int(np.flatnonzero(orientation[:, 0] == axis)[0])] for plane, axis in PLANES.items()}


def _cut(volume: _Volume, across: int, index: int, number: int) -> np.ndarray:
    orientation = _orientation(volume)
    axis = int(np.flatnonzero(orientation[:, 0] == across)[0])
    plane = _plane(volume, axis, index if orientation[axis, 1] > 0 else volume.shape[axis] - 1 - index, number)
    left = [item for item in range(3) if item != axis]
    plane = plane[tuple(slice(None, None, int(orientation[item, 1])) for item in left)]
    if orientation[left[0], 0] > orientation[left[1], 0]:
        plane = plane.T
    # What is left grows to the right or to anterior, and to anterior or to the head; pictures grow to the other sides.
    return plane[::-1, ::-1].T


def _parse(fragment: str, known: tuple[str, ...]) -> dict[str, str]:
    asked: dict[str, str] = {}
    for part in filter(None, fragment.split("&")):
        key, _, value = part.partition("=")
        if key not in known or key in asked:
            raise DataError(
                f"'#{fragment:.60}': expected each at most once of {', '.join(known)}, got {shown(part, 40)}"
            )
        asked[key] = value
    return asked


def _number(asked: dict[str, str], key: str) -> int:
    value = asked.get(key, "0")
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise DataError(f"{key}: expected a number counted from 0, got {shown(value, 40)}")
    return int(value)


def _quietly(what: str, decode: Callable[[], Result]) -> Result:
    """Run a decoder whose errors and warnings may quote the header, and let none of their words out."""
    try:
        with ignoring():
            return decode()
    except DataError:
        raise
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise DataError(f"expected a complete {what}, could not decode it ({type(error).__name__})") from None


def _missing(kind: str, package: str) -> DataError:
    return DataError(f"{kind} needs {package}, which is not installed: pip install 'a3tune[medical]'")
