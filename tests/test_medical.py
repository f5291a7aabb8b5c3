import contextlib
import gzip
import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from a3tune.data import volume
from a3tune.data.dicom import _check_codestreams, decode_dicom
from a3tune.data.images import content_hash, load_image, split_fragment
from a3tune.data.volume import decode_nifti, nifti_slice
from a3tune.errors import DataError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

ORGANS = Path(os.environ.get("A3TUNE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "organs"
real = pytest.mark.skipif(not ORGANS.is_dir(), reason="needs the CT of shared/data/organs (A3TUNE_DATA)")
NAME = "Mustermann^Erika"


def dicom(pixels: np.ndarray, **header) -> bytes:
    """A DICOM file of grey values [H, W] or [frames, H, W], or of colours [H, W, 3]; header elements by keyword."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["test"])
    dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.PatientName = NAME
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour or pixels.ndim == 2 else pixels.shape[1:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for key, value in header.items():
        setattr(dataset, key, value)
    dataset.add_new(0x7FE00010, "OW" if bits == 16 else "OB", pixels.tobytes())
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def nifti(values: np.ndarray, affine: np.ndarray | None = None, kind=nibabel.Nifti1Image) -> bytes:
    return kind(values, np.eye(4) if affine is None else affine).to_bytes()


def grey(source: Path | bytes) -> np.ndarray:
    pixels = np.asarray(load_image(source))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def stored(tmp_path: Path, data: bytes, name: str) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


RAMP = np.linspace(0, 1, 32 * 40).reshape(32, 40)


def test_rescaling_and_the_window_of_the_header():
    """Stored values 0..2000 are -1000..1000 HU; the window 0/1000 shows -500..500."""
    pixels = grey(
        dicom(
            (RAMP * 2000).astype(np.uint16),
            RescaleSlope=1,
            RescaleIntercept=-1000,
            WindowCenter=[0, 40],
            WindowWidth=[1000, 80],
        )
    )
    assert np.abs(pixels - 255 * np.clip((RAMP * 2000 - 1000) / 1000 + 0.5, 0, 1)).max() <= 1


def test_signed_values_without_a_window_use_percentiles():
    pixels = grey(dicom((RAMP * 3000 - 1500).astype(np.int16)))
    assert np.abs(pixels - 255 * RAMP).max() <= 3


def test_monochrome1_is_inverted():
    values = (RAMP * 4000).astype(np.uint16)
    assert np.array_equal(grey(dicom(values, PhotometricInterpretation="MONOCHROME1")), 255 - grey(dicom(values)))


def test_padding_is_black_and_does_not_shift_the_window():
    values = (RAMP * 1000 + 1000).astype(np.int16)
    values[:8] = -2000
    for photometric, shown in (("MONOCHROME2", RAMP), ("MONOCHROME1", 1 - RAMP)):
        pixels = grey(dicom(values, PixelPaddingValue=-2000, PhotometricInterpretation=photometric))
        assert not pixels[:8].any()
        inside = shown[8:]
        assert np.abs(pixels[8:] - 255 * (inside - inside.min()) / np.ptp(inside)).max() <= 3


def test_a_window_by_name(tmp_path):
    path = stored(tmp_path, dicom((RAMP * 4000).astype(np.uint16), RescaleSlope=1, RescaleIntercept=-1024), "a.dcm")
    pixels = grey(Path(f"{path}#window=bone"))
    assert np.abs(pixels - 255 * np.clip((RAMP * 4000 - 1024 - 400) / 1800 + 0.5, 0, 1)).max() <= 1


def test_a_lookup_table_of_the_header():
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 16]
    item.LUTData = (257 * np.arange(255, -1, -1)).astype(np.uint16).tobytes()
    values = (RAMP * 255).astype(np.uint16)
    pixels = grey(dicom(values, VOILUTSequence=[item], BitsStored=8, HighBit=7))
    assert np.array_equal(pixels, 255 - values)


def test_the_header_of_a_multi_frame_file():
    def groups(intercept: float, centre: float) -> pydicom.Dataset:
        scaling, voi, group = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        scaling.RescaleSlope, scaling.RescaleIntercept = 1, intercept
        voi.WindowCenter, voi.WindowWidth = centre, 100
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [scaling], [voi]
        return group

    frames = np.stack([(RAMP * 100).astype(np.uint16)] * 2)
    data = dicom(frames, PerFrameFunctionalGroupsSequence=[groups(0, 50), groups(1000, 1100)])
    values = load_frames(data, 2)
    assert np.abs(values[0].astype(int) - 255 * RAMP).max() <= 4
    assert np.abs(values[1].astype(int) - 255 * np.clip(RAMP - 0.5, 0, 1)).max() <= 4


def load_frames(data: bytes, count: int) -> list[np.ndarray]:
    return [np.asarray(decode_dicom(data, f"frame={index}"))[..., 0] for index in range(count)]


def test_frames(tmp_path):
    frames = np.stack([np.full((4, 5), value, np.uint8) for value in (0, 90, 200)])
    path = stored(tmp_path, dicom(frames, WindowCenter=128, WindowWidth=256), "cine.dcm")
    shown = [int(grey(Path(f"{path}#frame={index}"))[0, 0]) for index in range(3)]
    assert shown == [0, 90, 200]
    assert grey(path)[0, 0] == 0
    with pytest.raises(DataError, match=r"cine\.dcm#frame=3: expected a frame below 3"):
        load_image(Path(f"{path}#frame=3"))


def test_colour():
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(dicom(colours))), colours)
    ybr = np.asarray(Image.fromarray(colours).convert("YCbCr"))
    shown = np.asarray(load_image(dicom(ybr, PhotometricInterpretation="YBR_FULL")))
    assert np.abs(shown.astype(int) - colours).max() <= 3


def test_palette_colour():
    table = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 16] for name in ("Red", "Green", "Blue")}
    levels = np.array([0, 0x4000, 0x8000, 0xFF00], np.uint16)
    table |= {
        f"{name}PaletteColorLookupTableData": np.roll(levels, shift).tobytes()
        for name, shift in (("Red", 0), ("Green", 1), ("Blue", 2))
    }
    shown = np.asarray(
        load_image(dicom(np.array([[0, 1], [2, 3]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **table))
    )
    assert shown[0, 1].tolist() == [0x40, 0, 0xFF]


def test_a_bomb_is_refused_before_it_is_decoded():
    data = dicom(np.zeros((4, 4), np.uint8))
    for keyword in (b"\x28\x00\x10\x00US\x02\x00\x04\x00", b"\x28\x00\x11\x00US\x02\x00\x04\x00"):
        assert data.count(keyword) == 1
        data = data.replace(keyword, keyword[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match="80,000,000 pixels"):
        load_image(data)


def test_a_bomb_inside_a_codestream_is_refused():
    stream = b"\xff\x4f\xff\x51" + struct.pack(">HH4I", 41, 0, 100_000, 100_000, 0, 0) + bytes(40)
    with pytest.raises(DataError, match="80,000,000 pixels"):
        _check_codestreams(b"\xfe\xff\x00\xe0" + stream)


def test_objects_without_pixels():
    data = dicom(np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="holds no pixels"):
        load_image(data[: data.index(b"\xe0\x7f\x10\x00")])
    deflated = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0")
    with pytest.raises(DataError, match="expected a complete DICOM file"):
        load_image(deflated)


def test_a_compression_without_a_decoder_is_named():
    from pydicom.pixels.decoders.base import get_decoder

    compressions = (pydicom.uid.JPEGLSLossless, pydicom.uid.JPEGLosslessSV1, pydicom.uid.JPEG2000Lossless)
    compression = next((uid for uid in compressions if not get_decoder(uid).is_available), None)
    if compression is None:
        pytest.skip("every decoder of pydicom is installed")
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((4, 4), np.uint8))))
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset.file_meta.TransferSyntaxUID = compression
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    with pytest.raises(DataError, match=f"no decoder of {re.escape(compression.name)} is installed"):
        load_image(buffer.getvalue())


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_dicom_is_a_data_error_that_keeps_the_name_to_itself(data):
    whole = dicom((RAMP * 4000).astype(np.uint16), WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=0)
    damaged = bytearray(whole[: data.draw(st.integers(133, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(132, min(len(damaged), 900) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(damaged)).mode == "RGB"
    except DataError as error:
        assert "Mustermann" not in str(error)
        assert error.__cause__ is None


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_slices_lie_as_radiologists_look_at_them(tmp_path, codes, kind):
    """Whatever way the volume is stored: one bright voxel at the patient's left, anterior, superior end."""
    canonical = np.zeros((6, 7, 8), np.int16)
    canonical[0, -1, -1] = 100
    image = nibabel.Nifti1Image(canonical, np.diag([2, 3, 4, 1.0]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(turn)
    path = stored(tmp_path, nifti(np.asarray(turned.dataobj), turned.affine, kind), "v.nii")
    bright = {}
    for fragment in ("axial=7", "coronal=6", "sagittal=0"):
        pixels = grey(Path(f"{path}#{fragment}"))
        bright[fragment] = (pixels.shape, *(int(index[0]) for index in np.nonzero(pixels)))
    # The patient's left is on the right of the picture, anterior and superior are at the top, anterior at the left.
    assert bright == {"axial=7": ((7, 6), 0, 5), "coronal=6": ((8, 6), 0, 5), "sagittal=0": ((8, 7), 0, 0)}
    assert not grey(Path(f"{path}#axial=0")).any()


def test_a_compressed_volume_with_a_scale(tmp_path):
    image = nibabel.Nifti1Image((np.indices((40, 32, 3)).sum(0)).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(10, -1000)
    path = stored(tmp_path, gzip.compress(image.to_bytes()), "ct.nii.gz")
    values = nifti_slice(path.read_bytes(), "axial=1")
    assert values.shape == (32, 40)
    assert values[-1, -1] == 10 * 1 - 1000
    assert values[0, 0] == 10 * (39 + 31 + 1) - 1000
    assert grey(Path(f"{path}#axial=1&window=lung")).max() > 0


def test_a_series_of_volumes(tmp_path):
    values = np.zeros((4, 5, 2, 3), np.float32)
    values[1, 1, 0, 2] = 9
    path = stored(tmp_path, nifti(values), "fmri.nii")
    assert not grey(Path(f"{path}#axial=0")).any()
    assert grey(Path(f"{path}#axial=0&volume=2")).any()
    with pytest.raises(DataError, match="volume below 3"):
        load_image(Path(f"{path}#axial=0&volume=3"))


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("", "there are sagittal 0-3, coronal 0-4, axial 0-5"),
        ("#axial=6", "sagittal 0-3, coronal 0-4, axial 0-5"),
        ("#axial=-1", "axial: expected a number"),
        ("#axial=x", "axial: expected a number"),
        ("#axial=1&coronal=1", "one slice"),
        ("#axial=1&axial=2", "at most once"),
        ("#axail=1", "sagittal, coronal, axial, volume, window"),
        ("#axial=1&window=x", "brain, mediastinum"),
    ],
)
def test_fragments_that_fit_no_slice(tmp_path, fragment, message):
    path = stored(tmp_path, nifti(np.zeros((4, 5, 6), np.uint8)), "v.nii")
    with pytest.raises(DataError, match=re.escape(f"{path}{fragment}: ") + ".*" + re.escape(message)):
        load_image(Path(f"{path}{fragment}"))


def test_volumes_that_are_refused(tmp_path, monkeypatch):
    whole = nifti(np.zeros((4, 5, 6), np.int16))
    for data, message in (
        (nifti(np.zeros((4, 5, 6), np.complex64)), "grey values"),
        (nifti(np.zeros((4, 5), np.int16)), "three or four dimensions"),
        (whole[:-3], "truncated"),
        (gzip.compress(nifti(np.random.default_rng(0).integers(0, 999, (9, 9, 9), np.int16)))[:-30], "EOFError"),
        (whole[:280] + bytes(48) + whole[328:], "affine is singular|could not decode"),
    ):
        with pytest.raises(DataError, match=message):
            decode_nifti(data, "axial=1")
    monkeypatch.setattr(volume, "MAX_VOLUME_BYTES", 200)
    with pytest.raises(DataError, match="at most 200 bytes, got 240"):
        decode_nifti(gzip.compress(whole), "axial=1")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_nifti_is_a_data_error(data):
    whole = nifti(np.arange(120, dtype=np.int16).reshape(4, 5, 6))
    damaged = bytearray(whole[: data.draw(st.integers(349, len(whole)))])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 343))] = data.draw(st.integers(0, 255))
    packed = data.draw(st.booleans())
    with contextlib.suppress(DataError):
        decode_nifti(gzip.compress(bytes(damaged)) if packed else bytes(damaged), "axial=1")


def test_fragments_are_part_of_what_an_image_is(tmp_path):
    path = stored(tmp_path, nifti(np.arange(120, dtype=np.int16).reshape(4, 5, 6)), "v.nii")
    hashes = {content_hash(path), *(content_hash(Path(f"{path}#axial={index}")) for index in range(6))}
    assert len(hashes) == 7
    other = stored(tmp_path, path.read_bytes(), "w.nii")
    assert content_hash(Path(f"{other}#axial=2")) == content_hash(Path(f"{path}#axial=2"))


def test_a_hash_sign_in_a_file_name(tmp_path):
    path = tmp_path / "scan#1.png"
    Image.new("L", (2, 3)).save(path)
    assert load_image(path).size == (2, 3)
    assert split_fragment(path) == (path, "")
    with pytest.raises(DataError, match="expected a DICOM or NIfTI file before it"):
        load_image(Path(f"{path}#frame=1"))
    with pytest.raises(DataError, match="cannot read it"):
        load_image(tmp_path / "none.dcm#frame=1")


@pytest.mark.parametrize(
    ("package", "data"), [("pydicom", bytes(128) + b"DICM"), ("nibabel", nifti(np.zeros((2, 2, 2), np.uint8)))]
)
def test_a_missing_extra_is_named(monkeypatch, package, data):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(DataError, match=rf"needs {package}.*a3tune\[medical\]"):
        load_image(data)


@real
def test_a_real_ct_series_in_jpeg_2000():
    pytest.importorskip("openjpeg")
    files = sorted((ORGANS / "dicom").iterdir())
    assert len(files) == 20
    for file in files[::7]:
        pixels = grey(file)
        assert pixels.shape == (512, 512)
        assert 0.5 < (pixels == 0).mean() < 0.9  # air around the patient
        assert (grey(Path(f"{file}#window=lung")) >= pixels).mean() > 0.9


@real
def test_a_real_volume_has_the_liver_on_the_left_of_the_picture():
    labels = nifti_slice((ORGANS / "ct_labels.nii.gz").read_bytes(), "axial=12")
    image = load_image(ORGANS / "ct.nii.gz#axial=12")
    assert image.size == labels.shape[::-1]
    spleen, liver = (np.nonzero(labels == value)[1].mean() for value in (1, 5))
    assert liver < labels.shape[1] / 2 < spleen


def as_mgh(values: np.ndarray, affine: np.ndarray) -> bytes:
    return nibabel.freesurfer.mghformat.MGHImage(values, affine).to_bytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_volumes_of_freesurfer(tmp_path, pack):
    values = np.random.default_rng(0).integers(0, 999, (6, 7, 8)).astype(np.int16)
    affine = np.array([[-1.0, 0, 0, 3], [0, 0, 1, 4], [0, -1, 0, 5], [0, 0, 0, 1]])
    path = stored(tmp_path, pack(as_mgh(values, affine)), "brain.mgz")
    same = stored(tmp_path, nifti(values, affine), "brain.nii")
    for plane in ("axial=3", "coronal=2", "sagittal=5"):
        assert np.array_equal(grey(Path(f"{path}#{plane}")), grey(Path(f"{same}#{plane}")))
    with pytest.raises(DataError, match="truncated"):
        decode_nifti(as_mgh(values, affine)[:400], "axial=1")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_volumes_in_two_files(tmp_path, end):
    values = np.random.default_rng(0).integers(0, 999, (4, 5, 6)).astype(np.int16)
    whole = nibabel.Nifti1Image(values, np.diag([-1.0, 1, 2, 1]))
    nibabel.save(nibabel.Nifti1Pair(values, whole.affine), tmp_path / f"ct.img{end}")
    same = stored(tmp_path, whole.to_bytes(), "ct.nii")
    for part in ("img", "hdr"):
        path = tmp_path / f"ct.{part}{end}"
        assert np.array_equal(grey(Path(f"{path}#axial=3")), grey(Path(f"{same}#axial=3")))
    hashes = {content_hash(tmp_path / f"ct.{part}{end}") for part in ("img", "hdr")}
    (tmp_path / f"ct.img{end}").write_bytes((gzip.compress if end else bytes)(values[::-1].tobytes()))
    assert len(hashes) == 1 and content_hash(tmp_path / f"ct.hdr{end}") not in hashes
    (tmp_path / f"ct.img{end}").unlink()
    with pytest.raises(DataError, match=r"ct\.hdr.*No such file"):
        load_image(Path(f"{tmp_path}/ct.hdr{end}#axial=0"))
    stored(tmp_path, bytes(348), f"ct.hdr{end}")
    stored(tmp_path, bytes(348), f"ct.img{end}")
    with pytest.raises(DataError, match="expected the header of a NIfTI volume"):
        load_image(Path(f"{tmp_path}/ct.img{end}#axial=0"))
