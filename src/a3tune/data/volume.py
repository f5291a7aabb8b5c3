"""A slice of a NIfTI or MGH volume -> grey values, pixels. Of an unpacked volume only that slice is kept.

Slices lie as radiologists look at them: the patient's right is on the left, anterior (axial) or superior (coronal,
sagittal) is at the top, anterior is on the left of a sagittal slice. Pixels are the volume's own: nothing is resampled.
"""

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from a3tune.data.dicom_file import GZIP
from a3tune.data.medical import counted, missing, quietly, read_fragment
from a3tune.data.window import centred_window, check_size, ct_window, window
from a3tune.errors import DataError

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The patient's axis that a slice stands across, in RAS order."""
MAX_VOLUME_BYTES = 2**31
"""Larger volumes are refused before they are unpacked."""
_NIFTI_HEADER, _MGH_HEADER = 544, 284
_LARGEST_OFFSET = 2**26
"""Bytes of header and extensions before the values of a NIfTI volume."""
_PIECE = 2**20


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


def decode_nifti(data: bytes, fragment: str) -> Image.Image:
    """One slice of a NIfTI volume as 8-bit RGB, windowed by the fragment's window, else by percentiles.

    Raises:
        DataError: as `nifti_slice`.
    """
    values = nifti_slice(data, fragment)
    name = read_fragment(fragment, (*PLANES, "volume", "window")).get("window")
    return Image.fromarray(centred_window(values, *ct_window(name)) if name else window(values)).convert("RGB")


def nifti_slice(data: bytes, fragment: str) -> np.ndarray:
    """Values float64 [height, width] of a slice, scaled as the header says, turned as `decode_nifti` shows them.

    Raises:
        DataError: nibabel is missing, the volume is damaged, too large or no grey volume, or the fragment names no
            slice of it; says how many slices there are.
    """
    asked = read_fragment(fragment, (*PLANES, "volume", "window"))
    volume = _volume(data)
    planes = [plane for plane in PLANES if plane in asked]
    counts = quietly("NIfTI volume", lambda: _slices(volume))
    sizes = ", ".join(f"{plane} 0-{count - 1}" for plane, count in counts.items())
    if len(planes) != 1:
        raise DataError(f"expected one slice of the volume behind the path, as in '#axial=12'; there are {sizes}")
    index = counted(asked, planes[0])
    if index >= counts[planes[0]]:
        raise DataError(f"expected a slice of the volume ({sizes}), got {planes[0]}={index}")
    series = volume.shape[3] if len(volume.shape) > 3 else 1
    if counted(asked, "volume") >= series:
        raise DataError(f"expected a volume below {series}, got volume={counted(asked, 'volume')}")
    return quietly("NIfTI volume", lambda: _cut(volume, PLANES[planes[0]], index, counted(asked, "volume")))


def nifti_grid(data: bytes) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (x, y, z) and affine [4, 4] of a volume: two volumes of one grid show the same place in the same slice.

    Raises:
        DataError: as `nifti_slice`.
    """
    volume = _volume(data)
    return volume.shape[:3], volume.affine


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
        raise missing("NIfTI", "nibabel") from error

    def described() -> _Volume:
        header = _header(_head(data))
        _volume_size(header)
        offset = int(header.get_data_offset())
        if not 0 <= offset <= _LARGEST_OFFSET:
            raise DataError(f"expected values within the first {_LARGEST_OFFSET:,} bytes of the volume, got {offset:,}")
        return _Volume(tuple(header.get_data_shape()), np.asarray(header.get_best_affine()), header, data)

    return quietly("NIfTI volume", described)


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
    if data[:2] != GZIP:
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
    packed = volume.data[:2] == GZIP
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
