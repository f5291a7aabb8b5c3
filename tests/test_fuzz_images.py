"""Damaged images, DICOM files and NIfTI volumes: decoded or refused with `DataError`, soon, and without a word of a
header in the message."""

import gzip
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.data.dicom import decode_dicom
from a3tune.data.images import load_image
from a3tune.data.volume import decode_nifti
from a3tune.errors import DataError
from fuzzing import damaged, fuzz, only_our_errors

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
from pydicom.encaps import encapsulate  # noqa: E402

PATIENT = "Mustermann^Erika"
RAMP = np.linspace(0, 255, 12 * 10).reshape(12, 10).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def encoded(pixels: np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


PICTURES = [
    encoded(RAMP, "PNG"),
    encoded(COLOUR, "PNG"),
    encoded(RAMP.astype(np.uint16) * 200, "PNG"),
    encoded(COLOUR, "JPEG"),
    encoded(RAMP.astype(np.float32), "TIFF"),
    encoded(COLOUR, "TIFF", compression="tiff_lzw"),
    encoded(COLOUR, "TIFF", compression="tiff_deflate"),
    encoded(COLOUR, "GIF"),
    encoded(COLOUR, "BMP"),
    encoded(COLOUR, "WEBP"),
    encoded(COLOUR, "JPEG2000"),
    encoded(COLOUR, "PPM"),
]


def dicom(pixels: np.ndarray, syntax: str, **header) -> bytes:
    """A small file with a patient's name in one of the transfer syntaxes of `pydicom.uid`."""
    uid = getattr(pydicom.uid, syntax)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian if syntax == "RLELossless" else uid
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName = dataset.PatientID = PATIENT
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits, bits - 1, 0
    for key, value in header.items():
        setattr(dataset, key, value)
    form = {"JPEG2000Lossless": "JPEG2000", "JPEGBaseline8Bit": "JPEG"}.get(syntax)
    if form:
        dataset.PixelData = encapsulate([encoded(pixels, form, **({"no_jp2": True} if form == "JPEG2000" else {}))])
        dataset["PixelData"].is_undefined_length = True
    else:
        order = ">" if syntax == "ExplicitVRBigEndian" else "<"
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if syntax == "RLELossless":
        dataset.compress(uid, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _lookup() -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 16], np.arange(256, dtype=np.uint16).tobytes()
    return item


_PALETTE = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
_PALETTE |= {
    f"{name}PaletteColorLookupTableData": np.arange(256, dtype=np.uint16).tobytes() for name in ("Red", "Green", "Blue")
}
_WINDOWED = {"RescaleSlope": 2, "RescaleIntercept": -9, "WindowCenter": 100, "WindowWidth": 80, "PixelPaddingValue": 3}
DICOMS = [
    dicom(RAMP, "ExplicitVRLittleEndian"),
    dicom(RAMP.astype(np.uint16), "ImplicitVRLittleEndian", **_WINDOWED),
    dicom(RAMP.astype(np.uint16), "ExplicitVRBigEndian", **_WINDOWED),
    dicom(COLOUR, "ExplicitVRLittleEndian"),
    dicom(np.concatenate([RAMP, RAMP]), "ExplicitVRLittleEndian", NumberOfFrames=2, Rows=12),
    dicom(RAMP, "ExplicitVRLittleEndian", VOILUTSequence=[_lookup()]),
    dicom(RAMP, "ExplicitVRLittleEndian", PhotometricInterpretation="PALETTE COLOR", **_PALETTE),
    dicom(RAMP, "RLELossless"),
    dicom(RAMP, "JPEG2000Lossless"),
    dicom(COLOUR, "JPEG2000Lossless"),
    dicom(RAMP, "JPEGBaseline8Bit"),
]
WHOLE = [*PICTURES, *DICOMS]
NIFTIS = [
    kind(
        np.arange(4 * 5 * 6 * extra, dtype=dtype).reshape(4, 5, 6, *([extra] if extra > 1 else [])), np.eye(4)
    ).to_bytes()
    for kind, dtype, extra in (
        (nibabel.Nifti1Image, np.int16, 1),
        (nibabel.Nifti1Image, np.float32, 2),
        (nibabel.Nifti2Image, np.uint8, 1),
    )
]


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_the_seeds_are_whole(number):
    assert load_image(WHOLE[number]).size == (10, 12)


@fuzz
@given(damaged(PICTURES))
def test_pictures(data):
    with only_our_errors():
        load_image(data)


@fuzz
@given(damaged(DICOMS), st.sampled_from(["", "frame=1", "window=bone"]))
def test_dicom(data, fragment):
    with only_our_errors():
        try:
            decode_dicom(data, fragment)
        except DataError as error:
            assert PATIENT not in str(error)
            raise


_ELEMENTS = {
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "PlanarConfiguration": 0x00280006,
    "NumberOfFrames": 0x00280008,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "PixelPaddingRangeLimit": 0x00280121,
    "WindowCenter": 0x00281050,
    "WindowWidth": 0x00281051,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "VOILUTFunction": 0x00281056,
    "ModalityLUTSequence": 0x00283000,
    "VOILUTSequence": 0x00283010,
    "LUTDescriptor": 0x00283002,
    "RedPaletteColorLookupTableDescriptor": 0x00281101,
    "RedPaletteColorLookupTableData": 0x00281201,
    "SpecificCharacterSet": 0x00080005,
}
_NUMBER_CODES = {"US": "<H", "SS": "<h", "UL": "<I", "SL": "<i", "FL": "<f", "FD": "<d"}
_STRANGE = [0, 1, 2, 3, 7, 8, 9, 16, 32, 64, 255, 4096, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, -1]
_WORDS = ["MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL_422", "YBR_ICT", "SIGMOID", "x", "", "1e400", "-1", "nan"]
_WORDS += ["99999999999", "1\\2\\3", "ISO 2022 IR 87", "\\", "65535", "0", "1"]


@st.composite
def element(draw: st.DrawFn) -> bytes:
    """A header element in explicit VR little endian, of a type and a value that nobody would choose."""
    tag = _ELEMENTS[draw(st.sampled_from(sorted(_ELEMENTS)))]
    kind = draw(st.sampled_from([*_NUMBER_CODES, "IS", "DS", "CS", "LO", "OW", "UN", "SQ"]))
    if kind in _NUMBER_CODES:
        code, numbers = _NUMBER_CODES[kind], draw(st.lists(st.sampled_from(_STRANGE), max_size=3))
        size = struct.calcsize(code)
        value = b"".join(
            struct.pack(code, number) if code[1] in "fd" else (number % 256**size).to_bytes(size, "little")
            for number in numbers
        )
    elif kind in ("OW", "UN", "SQ"):
        value = draw(st.binary(max_size=24))
    else:
        value = draw(st.sampled_from(_WORDS)).encode()
    value += b"\0" * (len(value) % 2)
    long = kind in ("OW", "UN", "SQ")
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind.encode())
    return head + (struct.pack("<HI", 0, len(value)) if long else struct.pack("<H", len(value))) + value


@fuzz
@given(
    st.sampled_from([DICOMS[0], DICOMS[3], DICOMS[4], DICOMS[6], DICOMS[7], DICOMS[8]]), st.lists(element(), max_size=4)
)
def test_dicom_headers(data, elements):
    """Later elements take the place of earlier ones: what the header says of the pixels becomes wrong."""
    pixels = data.rindex(b"\xe0\x7f\x10\x00")
    with only_our_errors():
        load_image(data[:pixels] + b"".join(elements) + data[pixels:])


_NIFTI_FIELDS = {  # offset and code in the headers of versions 1 and 2
    "dim": ((40, "<h"), (16, "<q")),
    "datatype": ((70, "<h"), (12, "<h")),
    "bitpix": ((72, "<h"), (14, "<h")),
    "pixdim": ((76, "<f"), (104, "<d")),
    "vox_offset": ((108, "<f"), (168, "<q")),
    "scl_slope": ((112, "<f"), (176, "<d")),
    "scl_inter": ((116, "<f"), (184, "<d")),
    "qform_code": ((252, "<h"), (344, "<i")),
    "sform_code": ((254, "<h"), (348, "<i")),
    "srow_x": ((280, "<f"), (400, "<d")),
}


@st.composite
def volume(draw: st.DrawFn) -> bytes:
    """A volume with up to four wrong header fields."""
    data = bytearray(draw(st.sampled_from(NIFTIS)))
    second = data[:4] == struct.pack("<i", 540)
    for _ in range(draw(st.integers(1, 4))):
        offset, code = _NIFTI_FIELDS[draw(st.sampled_from(sorted(_NIFTI_FIELDS)))][second]
        size = struct.calcsize(code)
        at = offset + size * draw(st.integers(0, 7))
        if code[1] in "fd":
            number = draw(st.floats(width=32) | st.sampled_from([float("nan"), -1.0, 0.0, 1e38, float("inf")]))
            data[at : at + size] = struct.pack(code, number)
        else:
            data[at : at + size] = (draw(st.sampled_from(_STRANGE)) % 256**size).to_bytes(size, "little")
    return bytes(data)


@fuzz
@given(damaged(NIFTIS) | volume(), st.booleans(), st.sampled_from(["axial=1", "coronal=0&volume=1", "sagittal=3", ""]))
def test_nifti(data, packed, fragment):
    with only_our_errors():
        decode_nifti(gzip.compress(data, 1) if packed else data, fragment)


@fuzz
@given(damaged([gzip.compress(data) for data in NIFTIS]))
def test_packed_nifti(data):
    with only_our_errors():
        decode_nifti(data, "axial=1")


@fuzz
@given(
    st.sampled_from([DICOMS[4], NIFTIS[0]]),
    st.text(st.sampled_from("axialcoronalframevolumewindow=&0123456789٣ -"), max_size=20),
)
def test_fragments(data, fragment):
    with only_our_errors():
        (decode_dicom if data is DICOMS[4] else decode_nifti)(data, fragment)
