"""DICOM as it lies on disks -> a data set whose frames can be decoded. Keeps no header text, shows no picture.

Files with and without the preamble, packed with gzip or deflated as a whole; which package decodes which compression,
and by what size the streams inside are refused.
"""

import io
import re
import struct
import zlib
from typing import Any

from a3tune.data.window import check_size
from a3tune.errors import DataError

GZIP = b"\x1f\x8b"
_PREAMBLE = 132
_META, _IDENTIFYING = b"\x02\x00", b"\x08\x00"
_VALUE_REPRESENTATION = re.compile(rb"[A-Z]{2}")
_LONGEST_FIRST = 2**16
"""Bytes of the first element of a file without a preamble."""
_DEFLATED, _PLAIN = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
_UNPACKED, _RATIO = 2**26, 20
"""A packed file that unpacks to more bytes, and to more than this multiple of its size, is refused: no scans do."""
_JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]")
"""The segment of a JPEG or JPEG-LS stream that says the size."""
_PREFERRED = ("pydicom", "pylibjpeg", "pyjpegls", "pillow", "gdcm")


def is_dicom(data: bytes) -> bool:
    """Whether these bytes start like a DICOM file, packed with gzip or not."""
    if data[:2] == GZIP:
        try:
            data = zlib.decompressobj(wbits=31).decompress(data[:_LONGEST_FIRST], 2 * _PREAMBLE)
        except zlib.error:
            return False
    return data[128:132] == b"DICM" or _lacks_preamble(data)


def read_dicom(data: bytes) -> Any:
    """The `pydicom` data set of a file, pixels not decoded yet.

    Raises:
        DataError: it unpacks to far more than it holds. Whatever pydicom raises for a damaged file.
    """
    import pydicom
    from pydicom.uid import UID

    if data[:2] == GZIP:
        data = _unpack(zlib.decompressobj(wbits=31), data)
    data = _inflated(data)
    if _DEFLATED in data:  # anywhere: its element may stand behind any number of others
        raise DataError("expected a DICOM file that says at its start that it is deflated; decompress it first")
    dataset = pydicom.dcmread(io.BytesIO(data), force=_lacks_preamble(data))
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        kind = "" if implicit else ".1" if little else ".2"
        dataset.file_meta.TransferSyntaxUID = UID(f"1.2.840.10008.1.2{kind}")
    return dataset


def decoder_for(dataset: Any) -> str:
    """Name of the plugin of pydicom that decodes the pixels of a data set, "" if they are not compressed.

    Raises:
        DataError: none is installed; says which package has one.
    """
    from pydicom import uid
    from pydicom.pixels.decoders.base import get_decoder

    compression = dataset.file_meta.TransferSyntaxUID
    if not compression.is_encapsulated:
        return ""
    twelve_bits = compression == uid.JPEGExtended12Bit and dataset.get("BitsStored") != 8
    able = [
        name
        for name in get_decoder(compression).available_plugins
        if not (twelve_bits and name in ("pillow", "gdcm"))  # they know the compression, with 8 bits
    ]
    if able:
        return min(able, key=lambda name: _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED))
    if twelve_bits:
        bring = "`pip install pylibjpeg-libjpeg` (licence GPL) brings one for 12 bits"
    else:
        bring = "pip install 'a3tune[medical]' brings those of JPEG-LS, JPEG lossless (python-gdcm) and JPEG 2000"
    raise DataError(f"no decoder of {compression.name} is installed: {bring}; or decompress the file first")


def check_jpeg_streams(dataset: Any) -> None:
    """A JPEG stream says its own size, which a decoder would allocate whatever the file's header says.

    Raises:
        DataError: a size in it is too large to decode.
    """
    from pydicom import uid

    if dataset.file_meta.TransferSyntaxUID not in uid.JPEGTransferSyntaxes + uid.JPEGLSTransferSyntaxes:
        return
    data = dataset.PixelData
    for start in _JPEG_FRAME.finditer(data):
        segment = data[start.end() : start.end() + 7]
        if len(segment) == 7:
            height, width = struct.unpack_from(">HH", segment, 3)
            if height and width:
                check_size(width, height)


def _lacks_preamble(data: bytes) -> bool:
    """Whether a file begins with an element of the first groups, as it may where the preamble was left out."""
    group, element = data[:2], data[2:4]
    if data[128:132] == b"DICM" or group not in (_META, _IDENTIFYING) or element[1:] != b"\0" or len(data) < 2 * 128:
        return False
    explicit = _VALUE_REPRESENTATION.match(data[4:6]) is not None
    return explicit or int.from_bytes(data[4:8], "little") < _LONGEST_FIRST


def _inflated(data: bytes) -> bytes:
    """The file with what was deflated as a whole, all behind the meta information, unpacked."""
    start = 0 if _lacks_preamble(data) else _PREAMBLE
    if data[start : start + 8] != b"\x02\x00\x00\x00UL\x04\x00":
        return data
    end = start + 12 + int.from_bytes(data[start + 8 : start + 12], "little")
    meta = data[start:end]
    if _DEFLATED not in meta:
        return data
    body = _unpack(zlib.decompressobj(wbits=-15), data[end:])
    return data[:start] + meta.replace(_DEFLATED, _PLAIN) + body


def _unpack(stream: Any, packed: bytes) -> bytes:
    most = max(_UNPACKED, _RATIO * len(packed))
    whole = stream.decompress(packed, most)
    if stream.unconsumed_tail and not stream.eof:
        raise DataError(f"expected a file that unpacks to at most {most:,} bytes, got more")
    return whole
