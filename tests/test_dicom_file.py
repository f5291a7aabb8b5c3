"""DICOM as people have it: odd headers, no preamble, packed, in every compression. `test_medical.py`: what is shown."""

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a3tune.data.images import load_image
from a3tune.errors import DataError
from test_medical import RAMP, dicom, grey

pydicom = pytest.importorskip("pydicom")
SAMPLES = Path(pydicom.data.DATA_ROOT) / "test_files"
"""Files that pydicom brings along."""
VALUES = (RAMP * 1000).astype(np.uint16)


def table(entries: np.ndarray, first: int, bits: int) -> Any:
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = entries.astype(np.uint16).tobytes()
    return item


INVERTED = table(np.arange(999, -1, -1), 0, 10)


@pytest.mark.parametrize(
    "header",
    [
        {"WindowCenter": 50, "WindowWidth": 0},
        {"WindowCenter": 50, "WindowWidth": 0.5},
        {"WindowCenter": 50, "WindowWidth": -10, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "CURVE"},
        {"WindowCenter": None, "WindowWidth": 100},
        {"VOILUTSequence": []},
        {"VOILUTSequence": [pydicom.Dataset()]},
        {"VOILUTSequence": [table(np.arange(3), 0, 16), table(np.arange(3), 0, 16)], "NumberOfFrames": 0},
        {"ModalityLUTSequence": [table(np.arange(9), 0, 99)]},
        {"RescaleSlope": 0, "RescaleIntercept": None},
        {"PixelPaddingValue": None},
        {"PerFrameFunctionalGroupsSequence": []},
    ],
)
def test_an_optional_field_that_makes_no_sense_is_passed_over(header):
    expected = grey(dicom(VALUES))
    if len(header.get("VOILUTSequence", [])) == 2:  # a table that does make sense: the first one counts
        expected = np.round(np.clip(VALUES, 0, 2) / 65535 * 255)
    assert np.array_equal(grey(dicom(VALUES, **header)), expected)


def test_a_window_of_no_width_leaves_the_table():
    shown = grey(dicom(VALUES, WindowCenter=128, WindowWidth=0, VOILUTSequence=[INVERTED]))
    assert np.abs(shown - 255 * (999.0 - np.minimum(VALUES, 999)) / 1023).max() <= 1


@pytest.mark.parametrize(
    ("function", "width", "shown"),
    [("LINEAR", 1, [0, 255]), ("LINEAR_EXACT", 0.5, [0, 255]), ("SIGMOID", 0.5, [0, 255]), ("LINEAR", 2, [0, 255])],
)
def test_the_narrowest_window_of_each_function(function, width, shown):
    values = np.array([[0, 1000]], np.uint16)
    window = {"WindowCenter": 500, "WindowWidth": width, "VOILUTFunction": function}
    assert grey(dicom(values, **window)).tolist() == [shown]


@pytest.mark.parametrize(("kind", "value"), [("SS", -2000), ("US", 63536)])
def test_padding_of_either_sign(kind, value):
    values = (RAMP * 1000).astype(np.int16)
    values[:8] = -2000
    dataset = pydicom.dcmread(io.BytesIO(dicom(values)))
    dataset.add_new("PixelPaddingValue", kind, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    shown = grey(buffer.getvalue())
    assert not shown[:8].any()
    assert np.array_equal(shown[8:], grey(dicom(values[8:])))


def test_a_table_of_eight_bits_for_many_values():
    entries = np.arange(1000) // 4
    shown = grey(dicom(VALUES, VOILUTSequence=[table(entries, 0, 8)]))
    assert np.array_equal(shown, entries[np.minimum(VALUES, 999)])


@pytest.mark.parametrize(("kind", "name"), [(np.float32, "FloatPixelData"), (np.float64, "DoubleFloatPixelData")])
def test_float_pixels(kind, name):
    dataset = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    values = (RAMP * 0.5).astype(kind)
    values[0] = -1
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.BitsAllocated = 8 * values.itemsize
    setattr(dataset, name, values.tobytes())
    setattr(dataset, name.replace("Data", "PaddingValue"), -1.0)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    shown = grey(buffer.getvalue())
    assert not shown[0].any()
    assert np.abs(shown[1:] - 255 * (RAMP[1:] - RAMP[1].min()) / np.ptp(RAMP[1:])).max() <= 3


def test_a_group_of_a_frame_without_a_window_leaves_the_shared_one():
    def group(centre: float | None) -> Any:
        voi, item = pydicom.Dataset(), pydicom.Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, None if centre is None else 200
        item.FrameVOILUTSequence = [voi]
        return item

    frames = np.stack([VALUES] * 2)
    groups = {"PerFrameFunctionalGroupsSequence": [group(None)], "SharedFunctionalGroupsSequence": [group(300)]}
    shown = grey(dicom(frames, **groups))
    assert np.array_equal(shown, grey(dicom(VALUES, WindowCenter=300, WindowWidth=200)))


def deflated() -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def without_meta(implicit: bool) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(VALUES)))
    del dataset.file_meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=implicit, little_endian=True)
    return buffer.getvalue()


PACKED = {
    "gzip": lambda: gzip.compress(dicom(VALUES)),
    "deflated": deflated,
    "gzip of deflated": lambda: gzip.compress(deflated()),
    "no preamble": lambda: dicom(VALUES)[132:],
    "no preamble, gzip": lambda: gzip.compress(dicom(VALUES)[132:]),
    "no meta information": lambda: without_meta(False),
    "no meta information, implicit": lambda: without_meta(True),
}


@pytest.mark.parametrize("kind", PACKED)
def test_files_as_they_lie_on_disks(kind):
    assert np.array_equal(grey(PACKED[kind]()), grey(dicom(VALUES)))


@pytest.mark.parametrize("kind", ["gzip", "deflated"])
def test_what_unpacks_to_far_more_is_refused(kind, monkeypatch):
    data = PACKED[kind]()
    monkeypatch.setattr("a3tune.data.dicom_file._UNPACKED", 100)
    monkeypatch.setattr("a3tune.data.dicom_file._RATIO", 0)
    with pytest.raises(DataError, match="unpacks to at most 100 bytes"):
        load_image(data)


def compressed(data: bytes, syntax: str, bits: int) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((4, 4), np.uint16), BitsStored=bits, HighBit=bits - 1)))
    dataset.PixelData = pydicom.encaps.encapsulate([data])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("syntax", "bits", "package"),
    [
        (pydicom.uid.JPEGExtended12Bit, 12, "pylibjpeg-libjpeg"),
        (pydicom.uid.JPEGLosslessSV1, 16, r"a3tune\[medical\].*python-gdcm"),
        (pydicom.uid.JPEGLSLossless, 16, r"a3tune\[medical\].*JPEG-LS"),
    ],
)
def test_a_missing_decoder_is_named_with_the_package_that_has_it(monkeypatch, syntax, bits, package):
    from pydicom.pixels.decoders import base

    able = ("pillow", "gdcm") if bits == 12 else ()  # both know JPEG Extended, of 8 bits only
    monkeypatch.setattr(base.Decoder, "available_plugins", able)
    with pytest.raises(DataError, match=f"no decoder of JPEG.* is installed.*{package}"):
        load_image(compressed(b"\xff\xd8\xff\xd9", syntax, bits))


@pytest.mark.parametrize("syntax", [pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit])
def test_a_bomb_inside_a_jpeg_stream_is_refused(syntax):
    stream = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 60000, 60000, 1) + bytes(20)
    with pytest.raises(DataError, match="80,000,000 pixels, got 60000 x 60000"):
        load_image(compressed(stream, syntax, 8))


@pytest.mark.parametrize(
    ("name", "package", "same"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "jpeg_ls", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "pydicom", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "openjpeg", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "pydicom", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "pydicom", "MR_small.dcm"),
        ("liver_expb_1frame.dcm", "pydicom", "liver_1frame.dcm"),
        ("rtdose_rle_1frame.dcm", "pydicom", "rtdose_1frame.dcm"),
        ("SC_rgb_rle.dcm", "pydicom", "SC_rgb_rle_16bit.dcm"),
        ("SC_rgb_jpeg_gdcm.dcm", "gdcm", "SC_rgb_rle.dcm"),
    ],
)
def test_one_picture_in_two_compressions(name, package, same):
    pytest.importorskip(package)
    if not all((SAMPLES / file).is_file() for file in (name, same)):
        pytest.skip("this pydicom brings other files")
    assert np.array_equal(np.asarray(load_image(SAMPLES / name)), np.asarray(load_image(SAMPLES / same)))


@pytest.mark.parametrize("name", ["MR_small.dcm", "CT_small.dcm"])
@pytest.mark.parametrize(
    "syntax", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14", "JPEGLSLossless", "JPEG2000Lossless"]
)
def test_what_another_program_compressed_without_loss(tmp_path, name, syntax):
    """16 bits, signed: encoded by GDCM."""
    gdcm = pytest.importorskip("gdcm")
    if not (SAMPLES / name).is_file():
        pytest.skip("this pydicom brings other files")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(SAMPLES / name))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    writer.SetFileName(str(tmp_path / name))
    writer.SetFile(reader.GetFile())
    assert change.Change()
    writer.SetImage(change.GetOutput())
    assert writer.Write() and pydicom.dcmread(tmp_path / name).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(np.asarray(load_image(tmp_path / name)), np.asarray(load_image(SAMPLES / name)))
