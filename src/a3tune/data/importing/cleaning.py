"""What of imported rows is not kept: copies of a row, and fields that name a patient or have too many values."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from a3tune.data.images import split_fragment
from a3tune.types import Sample

Found = dict[str | None, list[Sample]]
"""Samples by the split that the source gives them, None where it gives none."""
_MOST_VALUES = 50
_PERSONAL = re.compile(
    r"(patient\W?s?|first|last|full|sur|given|family|middle|maiden|vor|nach)[ _]?name|^name$|physician|birth|dob\b"
    r"|address|phone|mail|\bmrn\b|accession|insur|ssn\b|geburt|adresse|telefon",
    re.IGNORECASE,
)
"""Columns that may say who a patient is: never taken into `meta`."""


def file_of(sample: Sample, hashes: Mapping[Path, str]) -> str:
    """What names the file of a sample's image by its content: copies under other names are one."""
    return hashes[sample.image] if isinstance(sample.image, Path) else ""


def without_duplicates(found: Found, hashes: Mapping[Path, str], notes: list[str]) -> None:
    """Takes out rows that say the same of the same image; tells those that say something else."""
    twice, answers = 0, dict[tuple[str, str, str], set[str]]()
    for place, samples in found.items():
        kept, seen = [], set()
        for sample in samples:
            key = (file_of(sample, hashes), split_fragment(Path(str(sample.image)))[1], sample.prompt)
            answers.setdefault(key, set()).add(sample.answer)
            if (*key, sample.answer) in seen:
                twice += 1
                continue
            seen.add((*key, sample.answer))
            kept.append(sample)
        found[place] = kept
    if twice:
        notes.append(f"{twice:,} rows say the same of the same image as another, left out")
    if several := sum(len(item) > 1 for item in answers.values()):
        notes.append(f"{several:,} questions of one image have several answers: all are kept")


def without_personal_fields(splits: dict[str, list[Sample]], became: dict[str, str]) -> None:
    """Takes out of `meta` what says who a patient is, and what has too many values to break results down by."""
    rows = [sample for samples in splits.values() for sample in samples]
    values: dict[str, set[str]] = {}
    for sample in rows:
        for key, value in sample.meta.items():
            values.setdefault(key, set()).add(value)
    dropped = {}
    for key, different in values.items():
        if key == "patient":
            continue
        if _PERSONAL.search(key):
            dropped[key] = "left out: it may say who a patient is"
        elif len(different) > _MOST_VALUES or (len(different) > 3 and len(different) > len(rows) / 2):
            dropped[key] = f"left out: {len(different):,} values are too many to break results down by"
    for key in became:
        kept = became[key] == f"meta.{key}"
        if kept:
            became[key] = dropped.get(key, became[key] if key in values else "left out: no short texts or numbers")
    for name, samples in splits.items():
        splits[name] = [
            replace(sample, meta={key: item for key, item in sample.meta.items() if key not in dropped})
            for sample in samples
        ]
