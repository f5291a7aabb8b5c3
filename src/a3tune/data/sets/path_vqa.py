"""PathVQA (He et al. 2020), in the forms that hold no pickle.

    data/train-*.parquet, validation-*, test-*    Hugging Face flaviagiammarino/path-vqa: image, question, answer
    qas/<split>/<split>_qa.json                   the published rows as JSON: [{"image", "question", "answer"}, ...]
    images/<split>/<image>.jpg                    the published images; <split> is train, val or test

The published qas are pickles (`<split>_qa.pkl`), and a pickle can run any code when it is read: they are not read here.
Published counts are 19,755/6,279/6,761; the Hugging Face form leaves out duplicates and has 19,654/6,259/6,719.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from a3tune.data.paths import inside
from a3tune.data.sets.hub import has_counts, parquet_files, read_parquet
from a3tune.data.sets.reading import Reading, Splits
from a3tune.errors import DataError
from a3tune.types import ImageSource, Sample

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_ROWS = {"train": 19755, "validation": 6279, "test": 6761}
_ROWS_ON_HUB = {"train": 19654, "validation": 6259, "test": 6719}
_SUFFIXES = (".jpg", ".png", ".jpeg")


def recognises(folder: Path) -> bool:
    """Whether this looks like PathVQA: questions by split, or parquet files with as many rows as it has."""
    return any((folder / "qas" / name).is_dir() for name in _SPLITS.values()) or has_counts(folder, _ROWS, _ROWS_ON_HUB)


def read(reading: Reading, variant: str) -> Splits:
    """The questions of the published splits."""
    if parquet_files(reading.folder):
        return read_parquet(reading, tuple(_SPLITS), lambda *row: _sample(reading, *row))
    splits = Splits()
    _read_json(reading, splits)
    return splits


def _read_json(reading: Reading, splits: Splits) -> None:
    for split, name in _SPLITS.items():
        where = f"qas/{name}/{name}_qa.json"
        pickled = reading.folder / "qas" / name / f"{name}_qa.pkl"
        if pickled.is_file() and not (reading.folder / where).is_file():
            reading.problem(pickled, f"a pickle can run any code when it is read: convert it to {where} (docs/data.md)")
            continue
        folder = reading.folder / "images" / name
        for row in reading.load(where):
            image = reading.image(where, folder, _file_name(folder, str(row.get("image"))))
            number = reading.rows[split] + 1
            reading.add(splits, split, where, image and _sample(reading, where, row, f"{split}-{number}", image))


def _file_name(folder: Path, name: str) -> str:
    """A row's image with the ending that rows leave out."""
    if name.endswith(_SUFFIXES):
        return name
    with suppress(DataError):  # `Reading.image` notes a name that leads out of the folder
        return next((name + end for end in _SUFFIXES if inside(folder, name + end).is_file()), name + _SUFFIXES[0])
    return name


def _sample(reading: Reading, where: str, row: dict[str, Any], name: str, image: ImageSource) -> Sample:
    answer = reading.text(where, row, "answer")
    closed = answer.lower() in ("yes", "no")
    return Sample(
        id=f"path-vqa-{name}",
        image=image,
        prompt=reading.text(where, row, "question"),
        answer=answer,
        answer_type="closed" if closed else "open",
        meta={"modality": "Pathology", "question_type": "yes/no" if closed else "open"},
    )
