"""Damaged masks, annotations and published data sets: read or refused with an error of ours, soon."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.data.annotations import attach_regions
from a3tune.data.annotations.label_studio import decode_brush
from a3tune.data.sets import check, prepare
from a3tune.errors import DataError
from a3tune.masks import area, bounding_box, decode_mask, encode_mask, mask_iou, region_mask
from a3tune.types import Rle, Sample
from fuzzing import altered, damaged, fuzz, lines, only_our_errors

RLE = encode_mask(np.eye(6, 8, dtype=bool))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 6), 9).save(folder / name)
    return folder


@fuzz
@given(
    st.tuples(st.integers(1, 99), st.integers(1, 99)),
    st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=12)
    | st.text(max_size=5)
    | st.just(RLE.counts),
)
def test_run_lengths(size, counts):
    code = Rle(size, counts)
    with only_our_errors():
        mask = decode_mask(code)
        assert mask.shape == size and mask.sum() == area(code)
        assert decode_mask(encode_mask(mask)).tolist() == mask.tolist()
        bounding_box(code)
        mask_iou([code], [code])


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}],
    "categories": [{"id": 1, "name": "liver"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "segmentation": {"size": [6, 8], "counts": RLE.counts}},
        {"image_id": 1, "category_id": 1, "segmentation": {"size": [6, 8], "counts": [3, 4, 41]}},
        {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 3.5]]},
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 2]},
    ],
}
# 4 x 6 x 8 values in 5 runs of 8-bit words.
BRUSH_BITS = f"{4 * 48:032b}{7:05b}{3:04b}{3:04b}{3:04b}{7:04b}" + f"1{3:02b}{191:08b}{255:08b}"
BRUSH = [int(BRUSH_BITS[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(BRUSH_BITS), 8)]
_SIDES = {"original_width": 8, "original_height": 6}
LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/local-files/?d=x/a.png"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    {"type": "brushlabels", "value": {"rle": BRUSH, "brushlabels": ["liver"]}} | _SIDES,
                    {
                        "type": "rectanglelabels",
                        "value": {
                            "x": 5,
                            "y": 5,
                            "width": 50,
                            "height": 60,
                            "rotation": 30,
                            "rectanglelabels": ["liver"],
                        },
                    }
                    | _SIDES,
                    {
                        "type": "polygonlabels",
                        "value": {"points": [[0, 0], [90, 0], [50, 99]], "polygonlabels": ["liver"]},
                    }
                    | _SIDES,
                    {"type": "choices", "value": {"choices": ["x"]}},
                ],
            }
        ],
    },
    {"data": {"image": "http://host/a.png"}, "file_upload": "0123abcd-a.png", "annotations": []},
]


def test_the_annotations_are_whole(folder):
    sample = Sample("1", folder / "a.png", "Where is the liver?", "left", "open")
    deeper = Sample("1", folder / "x" / "a.png", "Where is the liver?", "left", "open")
    (folder / "x").mkdir(exist_ok=True)
    Image.new("L", (8, 6), 9).save(folder / "x" / "a.png")
    for data, one, count in ((COCO, sample, 4), (LABEL_STUDIO, deeper, 3)):
        (folder / "masks.json").write_text(json.dumps(data))
        assert len(attach_regions([one], folder / "masks.json")[0].regions or ()) == count


@fuzz
@given(altered([COCO, LABEL_STUDIO]))
def test_annotations(folder, data):
    (folder / "masks.json").write_text(json.dumps(data))
    samples = [Sample(name, folder / name / "a.png", "Where is the liver?", "left", "open") for name in (".", "x")]
    with only_our_errors():
        for sample in attach_regions(samples[:1], folder / "masks.json"):
            for region in sample.regions or ():
                region_mask(region, 6, 8)


@fuzz
@given(damaged([bytes(BRUSH)]))
def test_brush(data):
    with only_our_errors():
        decode_brush(list(data), 6, 8)


PNG_MASK = io.BytesIO()
Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(PNG_MASK, "PNG")
NAMES = {"1": "liver"}


@fuzz
@given(damaged([PNG_MASK.getvalue()]) | st.just(PNG_MASK.getvalue()), altered([NAMES]) | st.just(NAMES))
def test_picture_masks(folder, data, names):
    masks = folder / "masks"
    masks.mkdir(exist_ok=True)
    (masks / "a.png").write_bytes(data)
    (masks / "labels.json").write_text(json.dumps(names))
    with only_our_errors():
        attach_regions([Sample("1", folder / "a.png", "Where is the liver?", "left", "open")], masks)


# Published data sets

_SLAKE = {
    "img_name": "xmlab1/source.jpg",
    "question": "Where is the liver?",
    "answer": "Left",
    "q_lang": "en",
    "location": "Abdomen",
    "modality": "CT",
    "answer_type": "OPEN",
    "qid": 5,
    "content_type": "Position",
}
_RAD = {
    "qid": 3,
    "image_name": "a.jpg",
    "image_organ": "CHEST",
    "question": "Is it big?",
    "answer": "no",
    "answer_type": "CLOSED",
    "question_type": "SIZE, PRSE",
    "phrase_type": "freeform",
}
_CARES = {"question_id": 1, "image": "images/a.jpg", "text": "<image> What?", "answer": "No (since)."}
_XRAY = {"id": "CXR1_IM-1", "report": "Normal heart.", "image_path": ["CXR1/0.png", "CXR1/1.png"]}
SETS: dict[str, dict[str, object]] = {
    "slake": {
        "train.json": [_SLAKE],
        "validate.json": [_SLAKE | {"qid": 6}],
        "test.json": [_SLAKE | {"qid": 7}],
        "imgs/xmlab1/detection.json": [{"Liver": [1, 1, 3, 2]}, {"Spleen": [0, 0, 9, 9]}],
    },
    "vqa-rad": {"trainset.json": [_RAD, _RAD | {"qid": 4}], "testset.json": [_RAD | {"qid": 9}]},
    "path-vqa": {
        f"qas/{split}/{split}_qa.json": [{"image": "a", "question": "What?", "answer": "yes"}]
        for split in ("train", "val", "test")
    },
    "iu-xray-vqa": {"iuxray_factuality.jsonl": [_CARES, _CARES]},
    "omnimedvqa": {"omnimedvqa_factuality.jsonl": [_CARES | {"dataset": "x"}]},
    "iu-xray": {"annotation.json": {"train": [_XRAY], "val": [], "test": [_XRAY | {"id": "CXR2"}]}},
}
_PICTURES = {
    "slake": ["imgs/xmlab1/source.jpg", "imgs/xmlab1/mask.png"],
    "path-vqa": [f"images/{split}/a.jpg" for split in ("train", "val", "test")],
    "iu-xray": ["images/CXR1/0.png"],
}
MASK_NAMES = b"1: Liver\n2 - Left Lung\n"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name in SETS:
        for picture in _PICTURES.get(name, ["images/a.jpg"]):
            (root / name / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(root / name / picture)
    return root


def lay_out(root: Path, name: str, changed: str = "", content: object = None) -> Path:
    for file, data in SETS[name].items():
        data = content if file == changed else data
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif path.suffix == ".jsonl" and isinstance(data, list):
            path.write_bytes(lines(data))
        else:
            path.write_text(json.dumps(data))
    return root / name


@pytest.mark.parametrize("name", SETS)
def test_the_data_sets_are_whole(sets, name):
    (sets / "slake" / "mask.txt").write_bytes(MASK_NAMES)
    found = check(lay_out(sets, name), name)
    assert found.ok and sum(found.usable.values()) >= 1, found.problems


@pytest.mark.parametrize("image", ["x" * 5000, "x" * 252, "\ud800", "a\0", "../a", ".", {"a": "x" * 5000}, None, 7])
@pytest.mark.parametrize("name", SETS)
def test_names_that_no_file_has(sets, name, image):
    """Asked of such a name, the system raises errors of its own."""
    file, rows = next((file, rows) for file, rows in SETS[name].items())
    key = {"slake": "img_name", "vqa-rad": "image_name", "iu-xray": "image_path"}.get(name, "image")
    row = rows["train"][0] if isinstance(rows, dict) else rows[0]  # type: ignore[index]
    changed = [row | {key: [image] if name == "iu-xray" else image}]
    lay_out(sets, name, file, {"train": changed, "val": [], "test": []} if name == "iu-xray" else changed)
    with pytest.raises(DataError, match="expected a complete"):
        prepare(sets / name, sets / "out", name)


@fuzz
@given(st.data())
def test_data_sets(sets, data):
    name = data.draw(st.sampled_from(sorted(SETS)))
    file = data.draw(st.sampled_from(sorted(SETS[name])))
    content = SETS[name][file]
    changed = data.draw(altered([content]) | damaged([json.dumps(content).encode()]))
    (sets / "slake" / "mask.txt").write_bytes(data.draw(st.just(MASK_NAMES) | damaged([MASK_NAMES])))
    place = lay_out(sets, name, file, changed)
    with only_our_errors():
        prepare(place, sets / "out", name)


MIMIC = b"dicom_id,study_id,subject_id,split\n1a-2b,50000001,10000001,train\n"


@fuzz
@given(damaged([MIMIC]), st.sampled_from(["plain", "packed", "torn"]), st.integers(0, 200), st.integers(1, 255))
def test_mimic_tables(sets, data, form, at, bits):
    place = sets / "mimic-cxr"
    place.mkdir(exist_ok=True)
    packed = bytearray(gzip.compress(data))
    if form == "torn":
        packed[at % len(packed)] ^= bits
    name = "mimic-cxr-2.0.0-split.csv"
    (place / name).write_bytes(data)
    (place / f"{name}.gz").unlink(missing_ok=True)
    if form != "plain":
        (place / f"{name}.gz").write_bytes(packed)
    with only_our_errors():
        prepare(place, sets / "out", "mimic-cxr")


XML = b"""<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e "x">]>
<eCitation><AbstractText Label="IMPRESSION">Normal &e;.</AbstractText></eCitation>"""


@fuzz
@given(damaged([XML]))
def test_xray_reports(sets, data):
    place = lay_out(sets, "iu-xray")
    (place / "ecgen-radiology").mkdir(exist_ok=True)
    (place / "ecgen-radiology" / "1.xml").write_bytes(data)
    with only_our_errors():
        prepare(place, sets / "out", "iu-xray")
