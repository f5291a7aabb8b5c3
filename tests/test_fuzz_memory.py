"""Files that claim or unpack to far more than they hold: refused, by a process that may not have the memory for them.

One child process reads them all under a limit of its address space, so that a reader which allocates what a file claims
fails in it, and tells its peak of resident memory.
"""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from a3tune.data.window import MAX_PIXELS
from test_fuzz_images import DICOMS, NIFTIS, RAMP, dicom, encoded

pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
LIMIT = 300 * 2**20
"""Bytes that reading one of these files may add to the address space."""
SECONDS = 60
"""That it may take, on a machine that does other work, too."""
PEAK = 200
"""Megabytes that it may add to resident memory."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *before: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    return zlib.compress(bytes(megabytes * 2**20), 1)


def packed(start: bytes, megabytes: int) -> bytes:
    """Some bytes and many zeros in the format of gzip, which may be one stream after another."""
    return gzip.compress(start) + megabytes * gzip.compress(bytes(2**20))


def nifti(dims: list[int], offset: float = 352.0) -> bytes:
    head = bytearray(NIFTIS[0][:352])
    head[40:56] = struct.pack("<8h", len(dims), *dims, *[1] * (7 - len(dims)))
    head[108:112] = struct.pack("<f", offset)
    return bytes(head)


def codestream(width: int, height: int, components: int = 1) -> bytes:
    """A JPEG 2000 stream whose header claims another size."""
    data = bytearray(encoded(RAMP, "JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">2I", width, height)
    data[24:32] = struct.pack(">2I", width, height)
    data[40:42] = struct.pack(">H", components)
    return bytes(data)


def with_pixels(data: bytes, **header) -> bytes:
    """A JPEG 2000 DICOM file around a code stream, its header claiming what is asked."""
    dataset = pydicom.dcmread(io.BytesIO(DICOMS[8]))
    dataset.PixelData = pydicom.encaps.encapsulate([data])
    for key, value in header.items():
        setattr(dataset, key, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def deflated(megabytes: int) -> bytes:
    """A DICOM file deflated as a whole, the element that says so behind a long one."""
    dataset = pydicom.dcmread(io.BytesIO(DICOMS[0]))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.file_meta.ImplementationVersionName = "x" * 16
    dataset.file_meta.FileMetaInformationVersion = b"\0" * 9000
    dataset.PixelData = bytes(megabytes * 2**20)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def tiff(width: int, height: int) -> bytes:
    data = bytearray(encoded(RAMP, "TIFF", compression="tiff_lzw"))
    for tag, value in ((256, width), (257, height), (278, height)):
        at = data.index(struct.pack("<H", tag) + b"\x03\0\1\0\0\0") if tag != 278 else -1
        if at >= 0:
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


def planes(width: int, height: int) -> bytes:
    """A TIFF that Pillow does not read (planes of 16 bits), whose header claims a size."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((3, 9, 7), np.uint16), photometric="rgb", planarconfig="separate")
    data = bytearray(buffer.getvalue())
    for tag, old, value in ((256, 7, width), (257, 9, height), (278, 9, height)):
        kinds = ((3, struct.pack("<HHII", tag, 3, 1, old)), (4, struct.pack("<HHII", tag, 4, 1, old)))
        at = next(data.index(entry) for _, entry in kinds if entry in data)
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


def mgh(*size: int) -> bytes:
    return struct.pack(">7i", 1, *size, 1, 1, 0).ljust(284, b"\0")


def table(value: bytes, rows: int) -> bytes:
    """A table whose rows all refer to one value."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    names = pa.array([str(row) for row in range(rows)])
    texts = pa.array(["x"] * rows)
    sink = io.BytesIO()
    rows_of_it = pa.table({"id": names, "image": column, "prompt": texts, "answer": texts})
    pq.write_table(rows_of_it, sink, compression="zstd", write_statistics=False)  # which compare the value with itself
    return sink.getvalue()


def coco(size: tuple[int, int], segmentation: object) -> bytes:
    images = [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}]
    annotations = [{"image_id": 1, "category_id": 1, "segmentation": segmentation}]
    return json.dumps({"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": annotations}).encode()


def counts(letters: int) -> bytes:
    """A row whose region is a run-length code of very many runs, for the largest image that a row may claim."""
    return json.dumps(ROW | {"regions": [{"rle": {"size": [8000, 10_000], "counts": "1" * letters}}]}).encode()


SIDE = int(MAX_PIXELS**0.5) - 1
ZIGZAG = [value for corner in range(8000) for value in ((0, 0) if corner % 2 else (SIDE, SIDE))]
ROW = {"id": "1", "image": "a.png", "prompt": "x", "answer": "y"}
BOMBS: dict[str, Callable[[], bytes]] = {
    "png-50000.png": lambda: png(50_000, 50_000, zeros(20)),
    "png-text.png": lambda: png(10, 10, zeros(1), chunk(b"zTXt", b"a\0\0" + zeros(200))),
    "png-profile.png": lambda: png(10, 10, zeros(1), chunk(b"iCCP", b"a\0\0" + zeros(200))),
    "jpeg2000.jp2": lambda: codestream(60_000, 60_000),
    "components.jp2": lambda: codestream(8000, 8000, 16_384),
    "strip.tiff": lambda: tiff(60_000, 60_000),
    "webp.webp": lambda: encoded(RAMP, "WEBP")[:26] + b"\xff\x3f\xff\x3f" + encoded(RAMP, "WEBP")[30:],
    "large.nii": lambda: nifti([3, 30_000, 30_000, 30_000]),
    "packed.nii.gz#axial=0": lambda: packed(nifti([3, 1200, 1200, 1200]), 600),
    "zeros.nii.gz#axial=0": lambda: packed(nifti([700, 700, 700]), 700),
    "zeros.nii.gz#coronal=0": lambda: packed(nifti([700, 700, 700]), 700),
    "zeros.nii.gz#sagittal=0": lambda: packed(nifti([700, 700, 700]), 700),
    "offset.nii.gz#axial=0": lambda: packed(nifti([3, 4, 5, 6], offset=5e8), 600),
    "large.mgz": lambda: mgh(30_000, 30_000, 30_000),
    "packed.mgz#axial=0": lambda: packed(mgh(1200, 1200, 1200), 600),
    "planes.tiff": lambda: planes(60_000, 60_000),
    "planes-8000.tiff": lambda: planes(8000, 3000),
    "one-stream.dcm.gz": lambda: gzip.compress(dicom(RAMP, "ExplicitVRLittleEndian") + bytes(600 * 2**20), 1),
    "rows.dcm": lambda: dicom(RAMP, "ExplicitVRLittleEndian", Rows=60_000, Columns=60_000),
    "frames.dcm": lambda: dicom(RAMP, "ExplicitVRLittleEndian", NumberOfFrames=2**31 - 1),
    "rle.dcm": lambda: with_pixels(b"\0" * 64, Rows=60_000, Columns=60_000),
    "stream.dcm": lambda: with_pixels(codestream(60_000, 60_000)),
    "decoy.dcm": lambda: with_pixels(codestream(10, 12)[:60] + codestream(60_000, 60_000)),
    "components.dcm": lambda: with_pixels(codestream(8000, 8000, 16_384)),
    "deflated.dcm": lambda: deflated(150),
    "region.jsonl": lambda: json.dumps(
        ROW | {"regions": [{"rle": {"size": [10**6, 10**6], "counts": "0" * 3}}]}
    ).encode(),
    "counts.jsonl": lambda: counts(2**24),
    "noise.jsonl": lambda: counts(2**23 - 10),
    "line.jsonl": lambda: b'{"id": "' + b"a" * 2**26 + b'"}',
    "counts.coco": lambda: coco((8000, 10_000), {"size": [8000, 10_000], "counts": "01" * 2**23}),
    "same.parquet": lambda: table(bytes(300 * 2**20), 1),
    "huge.coco": lambda: coco((10**6, 10**6), {"size": [10**6, 10**6], "counts": [10**12]}),
    "zigzag.coco": lambda: coco((SIDE, SIDE), [ZIGZAG]),
    "ribbon.coco": lambda: coco((1, MAX_PIXELS), [[0, 0, MAX_PIXELS, 0, MAX_PIXELS, 1, 0, 1] * 20]),
    "split.csv.gz": lambda: packed(b"dicom_id,study_id,subject_id,split\n", 600),
}

_CHILD = """
import gc, json, resource, sys, time
from pathlib import Path
import pyarrow.parquet, pydicom, nibabel, pydicom.pixels, openjpeg, PIL.WebPImagePlugin, tifffile
import nibabel.freesurfer
from a3tune.data.images import load_image
from a3tune.data.annotations import attach_regions
from a3tune.data.rows import read_rows
from a3tune.data.sets import check
from a3tune.errors import A3TuneError
from a3tune.masks import region_mask
from a3tune.types import Sample

def read(path):
    if path.suffix in (".jsonl", ".parquet"):
        return [region_mask(region, *region.mask.size) for row in read_rows(path) for region in row.regions or ()]
    if path.suffix == ".coco":
        return attach_regions([Sample("1", path.parent / "a.png", "x", "y", "open")], path)
    if path.name == "split.csv.gz":
        found = check(path.parent / "mimic", "mimic-cxr")
        raise A3TuneError(found.problems[0].what)
    return load_image(path)

def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024

limit = int(sys.argv[1])
for name in sys.argv[2:]:
    path = Path(name)
    resource.setrlimit(resource.RLIMIT_AS, ((memory("VmSize") << 20) + limit, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.monotonic()
    try:
        read(path)
        outcome = "was read"
    except A3TuneError as error:
        outcome = f"{error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps([path.name, outcome, memory("VmHWM") - before, time.monotonic() - start]), flush=True)
    gc.collect()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int, float]]:
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "a.png").write_bytes(encoded(RAMP, "PNG"))
    (folder / "mimic").mkdir()
    for name, make in BOMBS.items():
        file = folder / name.partition("#")[0]
        file.write_bytes(make())
        if name == "split.csv.gz":
            file.rename(folder / "mimic" / "mimic-cxr-2.0.0-split.csv.gz")
    command = [sys.executable, "-c", _CHILD, str(LIMIT), *(str(folder / name) for name in BOMBS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    print(done.stderr[-2000:])
    return {name: tuple(told) for name, *told in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(outcomes, name):
    outcome, peak, seconds = outcomes[name]
    print(name, peak, seconds, outcome)
    assert "Error:" not in outcome and (outcome == "was read") is name.startswith("zeros")
    assert peak < PEAK and seconds < SECONDS
