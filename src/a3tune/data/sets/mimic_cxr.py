"""MIMIC-CXR reports (Johnson et al. 2019, credentialed access), images as in MIMIC-CXR-JPG 2.0.0.

    mimic-cxr-2.0.0-split.csv.gz       dicom_id, study_id, subject_id, split   (or .csv)
    mimic-cxr-2.0.0-metadata.csv.gz    dicom_id, ViewPosition, ...: a frontal view is preferred (optional)
    files/p10/p10000032/s50414267/<dicom_id>.jpg
    files/p10/p10000032/s50414267.txt  the report; or under mimic-cxr-reports/files/

As in the paper, 2,000 studies of the training split and 500 of the test split are drawn (here with a fixed seed, so the
studies are others), then reports whose findings and impression have fewer than `MIN_WORDS` words are left out: the
paper, which does not say how few are too few, kept 1,902 and 441. One image per study: its first frontal view. Where
only a part of the set is on the disk, the studies are drawn from that.
"""

import csv
import gzip
import io
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from a3tune.data.sets.iu_xray import PROMPT
from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.sets.reports import report_text
from a3tune.data.sets.split import draw
from a3tune.errors import shown
from a3tune.types import Sample

DRAWN = {"train": 2000, "test": 500}
MIN_WORDS = 10
_SPLIT, _METADATA = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
_LARGEST = 2**27
"""Bytes of an unpacked table; the published ones have some 60 million."""
_LONGEST_ID = 100
_FRONTAL = ("PA", "AP")


def recognises(folder: Path) -> bool:
    """Whether this looks like MIMIC-CXR-JPG: its split file, or folders of patients."""
    return any((folder / f"{_SPLIT}{end}").is_file() for end in ("", ".gz")) or any(folder.glob("files/p1[0-9]"))


def read(reading: Reading, variant: str) -> Splits:
    """The reports of the studies drawn."""
    splits = Splits()
    studies, views = _studies(reading), _views(reading)
    drawn = {
        split: draw(_on_disk(reading, split, sorted(studies.get(split, {}).items()), views), count)
        for split, count in DRAWN.items()
    }
    done, total = 0, sum(map(len, drawn.values()))
    for split, kept in drawn.items():
        splits[split] = []
        for study in kept:
            done += 1
            sample = _sample(reading, study)
            reading.add(splits, split, study.report, sample, f"with fewer than {MIN_WORDS} words")
            if reading.progress:
                reading.progress(done, total)
    return splits


@dataclass(frozen=True, slots=True)
class _Study:
    subject: str
    name: str
    report: str
    """Relative to the folder, as the image."""
    image: str


def _on_disk(
    reading: Reading, split: str, studies: list[tuple[tuple[str, str], list[str]]], views: dict[str, bool]
) -> list[_Study]:
    """Those of which report and image are there: all of them, or the part that was downloaded."""
    found: list[_Study] = []
    absent: Counter[str] = Counter()
    example = {}
    for (subject, study), images in studies:
        place = f"p{subject[:2]}/p{subject}/s{study}"
        reports = [f"files/{place}.txt", f"mimic-cxr-reports/files/{place}.txt"]
        best_first = sorted(images, key=lambda name: (not views.get(name, False), name))
        pictures = [f"files/{place}/{name}.jpg" for name in best_first]
        report = next((item for item in reports if (reading.folder / item).is_file()), None)
        image = next((item for item in pictures if (reading.folder / item).is_file()), None)
        if report and image:
            found.append(_Study(subject, study, report, image))
        else:
            kind = "neither" if not report and not image else "no report" if not report else "no image"
            absent[kind] += 1
            example.setdefault(kind, pictures[0] if report else reports[0])
    if absent:
        share = f"{len(found):,} of {len(studies):,} {split} studies ({len(found) / len(studies):.0%}) are on the disk"
        kinds = ", ".join(f"{count:,} have {kind} (as {example[kind]})" for kind, count in absent.items())
        reading.problem("files", f"{share}, {DRAWN[split]:,} at most are drawn from these; {kinds}", blocking=not found)
    return found


def _sample(reading: Reading, study: _Study) -> Sample | None:
    text = report_text((reading.folder / study.report).read_text(encoding="utf-8", errors="replace"))
    if len(text.split()) < MIN_WORDS:
        what = f"{len(text.split())} words of findings and impression" if text else "no findings and no impression"
        reading.problem(study.report, f"{what} found in it: left out", blocking=False)
        return None
    meta = {"modality": "X-Ray", "organ": "chest", "patient": study.subject}
    return Sample(f"mimic-cxr-{study.name}", reading.folder / study.image, PROMPT, text, "report", meta=meta)


def _studies(reading: Reading) -> dict[str, dict[tuple[str, str], list[str]]]:
    """By split, the images of each (subject, study)."""
    studies: dict[str, dict[tuple[str, str], list[str]]] = {}
    for row in _table(reading, _SPLIT, ("dicom_id", "study_id", "subject_id", "split"), needed=True):
        dicom, study, subject, split = row
        numbers = dicom.replace("-", "").isalnum() and study.isdigit() and subject.isdigit()
        if numbers and max(map(len, row)) <= _LONGEST_ID:
            studies.setdefault(split, {}).setdefault((subject, study), []).append(dicom)
        else:
            reading.problem(_SPLIT, f"expected ids of an image, a study and a subject, got {shown(row, 80)}")
    return studies


def _views(reading: Reading) -> dict[str, bool]:
    """Whether an image is frontal; empty without the metadata."""
    rows = _table(reading, _METADATA, ("dicom_id", "ViewPosition"), needed=False)
    return {dicom: view in _FRONTAL for dicom, view in rows}


def _table(reading: Reading, name: str, columns: tuple[str, ...], *, needed: bool) -> list[tuple[str, ...]]:
    path = next(
        (reading.folder / f"{name}{end}" for end in (".gz", "") if (reading.folder / f"{name}{end}").is_file()), None
    )
    if path is None:
        what = "missing" if needed else "missing: the first image of a study is taken, frontal or not"
        reading.problem(f"{name}.gz", what, blocking=needed)
        return []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        lines = io.StringIO(text.decode(), newline="")
        return [tuple(row[column] or "" for column in columns) for row in csv.DictReader(lines)]
    except (OSError, EOFError, KeyError, TypeError, ValueError, csv.Error, zlib.error) as error:
        reading.problem(path, f"expected a table with the columns {', '.join(columns)}: {shown(error)}")
        return []
