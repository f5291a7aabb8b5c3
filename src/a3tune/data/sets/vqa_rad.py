"""VQA-RAD (Lau et al. 2018, CC0), in the layouts that are in use.

    VQA_RAD Dataset Public.json, "VQA_RAD Image Folder/"    as published on OSF: 2,248 rows
    trainset.json, testset.json, images/                    as most code uses it: 3,064 and 451 rows
    parquet files (`hub.py`)                                Hugging Face flaviagiammarino/vqa-rad: 1,793 and 451 rows

Fields: qid, image_name, image_organ, question, answer, answer_type, question_type, phrase_type. Rows whose phrase_type
begins with "test_" are the test rows of the first layout. The second layout's training rows hold 1,267 `frame` rows,
questions made from templates, that are no rows of the first: without them (1,206 free-form and 591 paraphrased) it has
the 1,797 of the paper's Table 6. Variants:

    paper            free-form and paraphrased questions in the published split: 1,797 and 451
    all              every row in the published split: 3,064 and 451 (1,797 and 451 in the first layout)
    image-disjoint   every row, split again by image with a seed: all 203 test images of the published split are
                     training images too
"""

from pathlib import Path
from typing import Any

from a3tune.data.sets.hub import has_counts, parquet_files, read_parquet
from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.sets.split import by_group
from a3tune.errors import DataError
from a3tune.types import AnswerType, ImageSource, Sample

VARIANTS = ("paper", "all", "image-disjoint")
TEST_SHARE = 0.2
"""Of the images, in the image-disjoint split."""
_PUBLIC = "VQA_RAD Dataset Public.json"
_IMAGE_FOLDERS = ("VQA_RAD Image Folder", "images")
_ROWS_ON_HUB = {"train": 1793, "test": 451}
_MISSPELT = {"ATRIB": "ATTRIB", "PRSE": "PRES"}


def recognises(folder: Path) -> bool:
    """Whether this looks like VQA-RAD: one of its question files, or parquet files with as many rows as it has."""
    return has_counts(folder, _ROWS_ON_HUB) or any(
        (folder / name).is_file() for name in (_PUBLIC, "trainset.json", "testset.json")
    )


def read(reading: Reading, variant: str) -> Splits:
    """The questions of one of `VARIANTS`."""
    if parquet_files(reading.folder):
        if variant != "paper":
            raise DataError(f"variant {variant!r}: Hugging Face's form of VQA-RAD has the published split only")
        return read_parquet(reading, ("train", "test"), lambda *row: _parquet_sample(reading, *row))
    images = next((name for name in _IMAGE_FOLDERS if (reading.folder / name).is_dir()), _IMAGE_FOLDERS[-1])
    splits = Splits()
    rows = list(_rows(reading))
    for number, (split, file, row) in enumerate(rows, start=1):
        if variant == "paper" and row.get("phrase_type") == "frame":
            continue
        image = reading.image(file, reading.folder / images, row.get("image_name"))
        reading.add(splits, split, file, image and _sample(reading, file, row, image))
        if reading.progress:
            reading.progress(number, len(rows))
    if variant == "image-disjoint":
        samples = [sample for split in ("train", "test") for sample in splits.get(split, [])]
        return reading.split_again(*by_group(samples, lambda sample: sample.image, TEST_SHARE))
    return splits


def _parquet_sample(reading: Reading, where: str, row: dict[str, Any], name: str, image: ImageSource) -> Sample:
    answer = reading.text(where, row, "answer")
    return Sample(
        id=f"vqa-rad-{name}",
        image=image,
        prompt=reading.text(where, row, "question"),
        answer=answer,
        answer_type="closed" if answer.lower() in ("yes", "no") else "open",
    )


def _rows(reading: Reading) -> list[tuple[str, str, dict[str, Any]]]:
    if (reading.folder / _PUBLIC).is_file():
        rows = [(str(row.get("phrase_type")).startswith("test_"), row) for row in reading.load(_PUBLIC)]
        return [("test" if test else "train", _PUBLIC, row) for test, row in rows]
    files = {"train": "trainset.json", "test": "testset.json"}
    return [(split, file, row) for split, file in files.items() for row in reading.load(file)]


def _sample(reading: Reading, file: str, row: dict[str, Any], image: Path) -> Sample:
    text = {key: reading.text(file, row, key) for key in ("qid", "question", "answer", "answer_type", "question_type")}
    kinds = [kind.strip().upper() for kind in text["question_type"].split(",")]
    answer_type: AnswerType = "closed" if text["answer_type"].upper() == "CLOSED" else "open"
    meta = {
        "organ": reading.text(file, row, "image_organ").lower(),
        "question_type": "+".join(sorted(_MISSPELT.get(kind, kind) for kind in kinds)),
        "phrase_type": reading.text(file, row, "phrase_type").removeprefix("test_"),
        "qid": text["qid"],
    }
    return Sample(
        id=f"vqa-rad-{text['qid']}",
        image=image,
        prompt=text["question"],
        answer=text["answer"],
        answer_type=answer_type,
        meta={key: value for key, value in meta.items() if value},
    )
