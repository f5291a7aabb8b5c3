"""Writes a phantom data set in the public row format: PNG files and train/validation/test JSONL, split by patient."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from a3tune.data.phantom.findings import REPORT_PROMPT, findings
from a3tune.data.phantom.marks import KIND_OF_BODY, Mark, draw_mark
from a3tune.data.phantom.questions import ANSWERS, GENERIC_TYPES, LOCALISED_TYPES, ORGAN_TYPES, Question, ask
from a3tune.data.phantom.scan import Scan, make_scan
from a3tune.data.rows import write_rows
from a3tune.masks import encode_mask
from a3tune.types import Region, Sample

DEMO_PATIENTS = {"train": 300, "validation": 80, "test": 120}
SCANS_PER_PATIENT = 2
QUESTIONS_PER_SCAN = {"generic": 1, "localised": 6}
MARK_TESTS = ("disagree", "random", "none", "agree")
"""What the marks of a test name: another answer, any, nothing (there is none), the right one."""
_TYPE_ODDS = {"presence": 0.04, "presence of kind": 0.06, "kind": 0.10, "size": 0.24, "position": 0.36, "count": 0.20}
"""Of being tried first on a marked scan: types that few scans allow come first, so that all are about as frequent."""
_SPLIT_STREAM = {"train": 1, "validation": 2, "test": 3}


def write_phantom(
    folder: Path,
    patients: Mapping[str, int] = DEMO_PATIENTS,
    *,
    seed: int = 0,
    reports: bool = False,
    marks: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write the splits named in `patients` and return their JSONL files.

    Images land in `folder/images`. The same seed gives the same bytes; different splits never share a patient.

    Args:
        reports: write one report per scan (`findings.py`) in place of its questions.
        marks: put a mark (`marks.py`) on each scan, and ask one question about it (`ORGAN_TYPES`): in this share of
            the training scans, 0 to 1, the mark names the right answer, in the others another. Every other split is
            written once for each of `MARK_TESTS`, as `test_disagree`: the same scans and questions, other marks.
            `meta` has the `mark`, and in `mark_agrees` whether it names the right answer. One scan in a hundred has
            no lesion that could be asked about, and no row.
        progress: `progress(done, total)` is called after every patient.

    Raises ValueError for a share outside 0 to 1, and for reports with marks: a mark names one answer.
    """
    if marks is not None and not 0 <= marks <= 1:
        raise ValueError(f"write_phantom: marks: expected a share of the training scans, 0 to 1, got {marks}")
    if reports and marks is not None:
        raise ValueError("write_phantom: expected reports or marks, not both: a mark names the answer to a question")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Sample]] = {name: [] for split in patients for name in split_files(split, marks is not None)}
    done, total = 0, sum(patients.values())
    for split, count in patients.items():
        for patient in range(count):
            for number in range(SCANS_PER_PATIENT):
                key = (seed, _SPLIT_STREAM[split], patient, number)
                scan, rng = make_scan(key), np.random.default_rng((*key, 1))
                if marks is not None:
                    copies = _marked(scan, split, marks, rng)
                else:
                    copies = [_Copy(split, scan.image, [report(scan)] if reports else list(draw_questions(scan, rng)))]
                for copy in copies:
                    rows[copy.file] += _samples(folder, scan, copy, f"{split}-{patient:04d}", number)
            done += 1
            if progress:
                progress(done, total)
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, samples in rows.items():
        write_rows(files[name], samples)
    return files


def split_files(split: str, marked: bool) -> list[str]:
    """Names, without suffix, of the files of a split; those of a marked one in the order of `MARK_TESTS`."""
    return [f"{split}_{test}" for test in MARK_TESTS] if marked and split != "train" else [split]


def draw_questions(scan: Scan, rng: np.random.Generator) -> Iterator[Question]:
    """The questions of one scan: generic ones, and localised ones of different types."""
    for kind in rng.permutation(GENERIC_TYPES)[: QUESTIONS_PER_SCAN["generic"]]:
        question = ask(scan, str(kind), rng)
        assert question is not None
        yield question
    left = QUESTIONS_PER_SCAN["localised"]
    for kind in rng.permutation(LOCALISED_TYPES):
        question = ask(scan, str(kind), rng) if left else None
        if question is not None:
            left -= 1
            yield question


def report(scan: Scan) -> Question:
    """The report of a scan as a question about its lesions: their union is the region."""
    masks = [lesion.mask for lesion in scan.lesions]
    region = np.any(masks, axis=0) if masks else None
    return Question("report", REPORT_PROMPT, findings(scan), "report", "", region)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A scan as one file of rows has it."""

    file: str
    image: np.ndarray
    questions: list[Question]
    meta: Mapping[str, str] = field(default_factory=dict)
    """Of the copy, beside what is known of the scan."""
    suffix: str = ""
    """Of the picture's file name: copies with the same mark share it."""


def _marked(scan: Scan, split: str, share: float, rng: np.random.Generator) -> Iterator[_Copy]:
    """Copies of a scan with one question, and marks that name its answer or do not."""
    kinds = rng.choice(ORGAN_TYPES, len(ORGAN_TYPES), replace=False, p=[_TYPE_ODDS[kind] for kind in ORGAN_TYPES])
    asked = (ask(scan, str(kind), rng) for kind in kinds)
    question = next((question for question in asked if question is not None), None)
    if question is None:
        return
    answers, kind = ANSWERS[question.type], KIND_OF_BODY[scan.body]
    right = answers.index(question.answer)
    wrong = int(rng.choice([code for code in range(len(answers)) if code != right]))
    either = right if rng.random() < 1 / len(answers) else wrong
    tests = {"disagree": wrong, "random": either, "none": None, "agree": right}
    codes = [right if rng.random() < share else wrong] if split == "train" else [tests[test] for test in MARK_TESTS]
    place = int(rng.integers(2**32))
    for file, code in zip(split_files(split, marked=True), codes, strict=True):
        if code is None:
            yield _Copy(file, scan.image, [question], {"mark": "none"})
            continue
        mark, agrees = Mark(kind, code), "yes" if code == right else "no"
        image = draw_mark(scan, mark, np.random.default_rng(place))
        yield _Copy(file, image, [question], {"mark": mark.name, "mark_agrees": agrees}, f"-{code}")


def _samples(folder: Path, scan: Scan, copy: _Copy, patient: str, number: int) -> Iterator[Sample]:
    """Writes the picture of a copy; its rows."""
    name = f"{patient}-{number}"
    path = folder / "images" / f"{name}{copy.suffix}.png"
    Image.fromarray(copy.image).save(path)
    for index, question in enumerate(copy.questions):
        meta = {
            "question_type": question.type,
            "modality": scan.modality,
            "body": scan.body,
            "plane": scan.plane,
            "organ": question.organ,
            "patient": patient,
        }
        yield Sample(
            id=f"{name}-{index}",
            image=path,
            prompt=question.prompt,
            answer=question.answer,
            answer_type=question.answer_type,
            regions=_regions(question),
            meta={**meta, **copy.meta},
        )


def _regions(question: Question) -> tuple[Region, ...]:
    """None is known of a question about the whole scan: it asks about no particular place."""
    return () if question.region is None else (Region(mask=encode_mask(question.region), name=question.organ),)
