"""MIMIC-CXR reports (Johnson et al. 2019, credentialed access), images as in MIMIC-CXR-JPG 2.0.0.

    mimic-cxr-2.0.0-split.csv.gz       dicom_id, study_id, subject_id, split   (or .csv)
    mimic-cxr-2.0.0-metadata.csv.gz    dicom_id, ViewPosition, ...: a frontal view is preferred (optional)
    files/p10/p10000032/s50414267/<dicom_id>.jpg
    files/p10/p10000032/s50414267.txt  the report; or under mimic-cxr-reports/files/

As in the paper, 2,000 studies of the training split and 500 of the test split are drawn (here with a fixed seed, so the
studies are others), then reports whose findings and impression have fewer than `MIN_WORDS` words are left out: the
paper, which does not say how few are too few, kept 1,902 and 441. One image per study: its first frontal view.
"""

import csv
import gzip
import io
import re
import zlib
from pathlib import Path

from a3tune.data.sets.iu_xray import PROMPT
from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.sets.split import draw
from a3tune.errors import shown
from a3tune.types import Sample

DRAWN = {"train": 2000, "test": 500}
MIN_WORDS = 10
_SPLIT, _METADATA = "mimic-cxr-2.0.0-split.csv", "mimic-cxr-2.0.0-metadata.csv"
_LARGEST = 2**27
"""Bytes of an unpacked table; the published ones have some 60 million."""
_LONGEST_ID = 100
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ,/()&-]{2,}):", re.MULTILINE)
_FRONTAL = ("PA", "AP")


def recognises(folder: Path) -> bool:
    """Whether this looks like MIMIC-CXR-JPG: its split file, or folders of patients."""
    return any((folder / f"{_SPLIT}{end}").is_file() for end in ("", ".gz")) or (folder / "files" / "p10").is_dir()


def read(reading: Reading, variant: str) -> Splits:
    """The reports of the studies drawn."""
    splits = Splits()
    studies = _studies(reading)
    total = sum(min(len(studies.get(split, {})), count) for split, count in DRAWN.items())
    views = _views(reading)
    done = 0
    for split, count in DRAWN.items():
        for (subject, study), images in draw(sorted(studies.get(split, {}).items()), count):
            done += 1
            sample = _sample(
                reading, subject, study, sorted(images, key=lambda name: (not views.get(name, False), name))
            )
            reading.add(splits, split, _SPLIT, sample)
            if reading.progress:
                reading.progress(done, total)
    return splits


def report_sections(report: str) -> dict[str, str]:
    """Text of each section of a report by its heading ("FINDINGS:" at the start of a line), white space evened out."""
    headings = list(_HEADING.finditer(report))
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    sections: dict[str, str] = {}
    for heading, end in zip(headings, ends, strict=False):
        name, text = heading[1].strip(), " ".join(report[heading.end() : end].split())
        sections[name] = f"{sections[name]} {text}".strip() if name in sections else text
    return sections


def _sample(reading: Reading, subject: str, study: str, images: list[str]) -> Sample | None:
    place = f"p{subject[:2]}/p{subject}/s{study}"
    name = f"mimic-cxr-{study}"
    candidates = [f"files/{place}.txt", f"mimic-cxr-reports/files/{place}.txt"]
    file = next((item for item in candidates if (reading.folder / item).is_file()), None)
    image = reading.image(_SPLIT, reading.folder, f"files/{place}/{images[0]}.jpg")
    if file is None:
        reading.problem(candidates[0], "missing")
        return None
    sections = report_sections((reading.folder / file).read_text(encoding="utf-8", errors="replace"))
    both = sections.get("FINDINGS AND IMPRESSION", "")
    report = " ".join(filter(None, (sections.get("FINDINGS", ""), sections.get("IMPRESSION", ""), both)))
    if image is None or len(report.split()) < MIN_WORDS:
        return None
    meta = {"modality": "X-Ray", "organ": "chest", "patient": subject}
    return Sample(name, image, PROMPT, report, "report", meta=meta)


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
