"""SLAKE (Liu et al. 2021, CC BY 4.0), its English questions.

    train.json, validate.json (or validation.json), test.json    img_name, question, answer, q_lang, answer_type, ...
    imgs/xmlab<N>/source.jpg       the image
    imgs/xmlab<N>/mask.png         label values
    imgs/xmlab<N>/detection.json   [{"Liver": [x, y, width, height]}, ...] in pixels
    mask.txt                       value and name of each structure, one a line

or Hugging Face's parquet files of the English questions (`hub.py`), which have no regions.

Regions: of every structure that the question names and the image has, its mask, else its box; of "the abnormality" and
its like the lesions; none asked for where the question is about modality or plane. Published counts are those of the
files; one training row has no answer and is left out.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from a3tune.data.annotations.shapes import box_region, numbers
from a3tune.data.annotations.values import mask_values
from a3tune.data.images import load_image
from a3tune.data.mention import mentioned
from a3tune.data.plain_json import parse_json
from a3tune.data.sets.hub import SPLITS, has_counts, parquet_files, read_parquet
from a3tune.data.sets.reading import Reading, Splits
from a3tune.errors import DataError, shown
from a3tune.masks import encode_mask
from a3tune.types import AnswerType, ImageSource, Region, Sample

PLACELESS = ("Modality", "Plane")
"""Types of questions that ask about the whole image."""
_LESION = re.compile(
    r"cancer|tumou?r|edema|pneumonia|pneumothorax|atelectasis|effusion|mass|nodule|cardiomegal|infiltration", re.I
)
_ASKS_LESION = re.compile(r"\b(abnormalit(y|ies)|lesions?|diseases?|tumou?rs?)\b", re.I)
_MASK_LINE = re.compile(r"^\W*(\d+)\W+(\D.*?)\W*$|^\W*(\D.*?)\W+(\d+)\W*$")

_ROWS_ON_HUB = {"train": 4919, "validation": 1053, "test": 1061}
_LONGEST_LINE = 200
"""Longer texts are no names, and the pattern would need time that grows with the square of their length."""


def recognises(folder: Path) -> bool:
    """Whether this looks like SLAKE: its images' folders, questions that name them, or parquet files with its rows."""
    if has_counts(folder, _ROWS_ON_HUB):
        return True
    if (folder / "imgs").is_dir() and any((folder / "imgs").glob("xmlab*")):
        return True
    file = folder / "test.json"
    if not file.is_file():
        return False
    with file.open("rb") as text:
        return b"xmlab" in text.read(4096)


def read(reading: Reading, variant: str) -> Splits:
    """The English questions of the three published files."""
    folder, splits = reading.folder, Splits()
    if parquet_files(folder) and not (folder / "train.json").is_file():
        return read_parquet(reading, SPLITS, lambda *row: _parquet_sample(reading, *row))
    names = _structure_names(reading)
    regions: dict[Path, list[Region]] = {}
    validation = "validation.json" if (folder / "validation.json").is_file() else "validate.json"
    files = {"train": "train.json", "validation": validation, "test": "test.json"}
    rows = [
        (split, file, row) for split, file in files.items() for row in reading.load(file) if row.get("q_lang") == "en"
    ]
    for number, (split, file, row) in enumerate(rows, start=1):
        image = reading.image(file, folder / "imgs", row.get("img_name"))
        if image is not None and image not in regions:
            regions[image] = _structures(reading, image, names) if image.is_file() else []
        reading.add(splits, split, file, image and _sample(reading, file, row, image, regions[image]))
        if reading.progress:
            reading.progress(number, len(rows))
    return splits


def _parquet_sample(reading: Reading, where: str, row: dict[str, Any], name: str, image: ImageSource) -> Sample | None:
    """A row of Hugging Face's form, which may have lost all but question and answer."""
    if row.get("q_lang") not in (None, "en"):
        return None
    closed = str(row.get("answer_type") or row.get("answer")).strip().lower() in ("closed", "yes", "no")
    fields = {"modality": "modality", "organ": "location", "question_type": "content_type", "qid": "qid"}
    meta = {field: text for field, key in fields.items() if row.get(key) and (text := reading.text(where, row, key))}
    return Sample(
        id=f"slake-{meta.get('qid') or name}",
        image=image,
        prompt=reading.text(where, row, "question"),
        answer=reading.text(where, row, "answer"),
        answer_type="closed" if closed else "open",
        meta=meta,
    )


def asked_regions(question: str, kind: str, regions: list[Region]) -> tuple[Region, ...] | None:
    """The regions that a question asks about; None where that cannot be told."""
    if kind in PLACELESS:
        return ()
    named = set(mentioned(question, {region.name for region in regions}))
    if not named and _ASKS_LESION.search(question):
        named = {region.name for region in regions if _LESION.search(region.name)}
    return tuple(region for region in regions if region.name in named) or None


def _sample(reading: Reading, file: str, row: dict[str, Any], image: Path, regions: list[Region]) -> Sample:
    text = {key: reading.text(file, row, key) for key in ("qid", "question", "answer", "answer_type", "content_type")}
    answer_type: AnswerType = "closed" if text["answer_type"].upper() == "CLOSED" else "open"
    meta = {
        "modality": reading.text(file, row, "modality"),
        "organ": reading.text(file, row, "location"),
        "question_type": text["content_type"],
        "qid": text["qid"],
    }
    return Sample(
        id=f"slake-{text['qid']}",
        image=image,
        prompt=text["question"],
        answer=text["answer"],
        answer_type=answer_type,
        regions=asked_regions(text["question"], text["content_type"], regions),
        meta={key: value for key, value in meta.items() if value},
    )


def _structure_names(reading: Reading) -> dict[int, str]:
    file = reading.folder / "mask.txt"
    if not reading.require(file, "without it masks have no names, and regions are boxes only"):
        return {}
    names: dict[int, str] = {}
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        match = _MASK_LINE.match(line) if len(line) < _LONGEST_LINE else None
        if match:
            value, name = (match[1], match[2]) if match[1] else (match[4], match[3])
            names[int(value)] = name.strip()
        elif line.strip():
            reading.problem(file, f"expected a value and a name in each line, got {shown(line)}", blocking=False)
    return names


def _structures(reading: Reading, image: Path, names: dict[int, str]) -> list[Region]:
    """Masks of an image's structures, and boxes of those that have no mask."""
    try:
        width, height = load_image(image).size
    except DataError:
        reading.problem(image, "expected an image, could not decode it")
        return []
    masks = _masks(reading, image.with_name("mask.png"), (height, width), names)
    have = {region.name.lower() for region in masks}
    boxes = _boxes(reading, image.with_name("detection.json"), (height, width))
    return masks + [box for box in boxes if box.name.lower() not in have]


def _masks(reading: Reading, file: Path, size: tuple[int, int], names: dict[int, str]) -> list[Region]:
    if not reading.require(file, "its image's regions are boxes only") or not names:
        return []
    try:
        values = mask_values(file)
    except DataError as error:
        reading.problem(file, f"left out: {error}", blocking=False)
        return []
    if values.shape != size:
        got = f"{values.shape[1]} x {values.shape[0]}"
        reading.problem(
            file, f"left out: expected {size[1]} x {size[0]} pixels as its image, got {got}", blocking=False
        )
        return []
    present = [int(value) for value in np.unique(values) if value]
    nameless = [str(value) for value in present if value not in names]
    if nameless:
        reading.problem(file, f"the values {', '.join(nameless[:8])} have no name in mask.txt", blocking=False)
    return [Region(mask=encode_mask(values == value), name=names[value]) for value in present if value in names]


def _boxes(reading: Reading, file: Path, size: tuple[int, int]) -> list[Region]:
    if not reading.require(file, "its image has no boxes"):
        return []
    try:
        items = parse_json(file.read_text(encoding="utf-8-sig"), constants=True)
        pairs = [(str(name), box) for item in items for name, box in item.items()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reading.problem(file, f"expected [{{name: [x, y, width, height]}}, ...]: {error}", blocking=False)
        return []
    regions: list[Region] = []
    for name, box in pairs:
        try:
            x, y, width, height = numbers(name, box, 4)
            regions.append(box_region(name, np.array([x, y, x + width, y + height]), size, name))
        except DataError as error:
            reading.problem(file, f"left out: {error}", blocking=False)
    return regions
