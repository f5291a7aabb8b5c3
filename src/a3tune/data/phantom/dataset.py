"""Writes a phantom data set in the public row format: PNG files and train/validation/test JSONL, split by patient."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""`meta.test` of marked questions: the mark names another answer, any, nothing (there is none), the right one."""
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
    types: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write the splits named in `patients` and return their JSONL files.

    Images land in `folder/images`. The same seed gives the same bytes; different splits never share a patient.

    Args:
        reports: write one report per scan (`findings.py`) in place of its questions.
        marks: put a mark (`marks.py`) on each scan, and ask one question about it (`ORGAN_TYPES`): in this share of
            the training scans, 0 to 1, the mark names the right answer, in the others another. Every other split has
            each question four times, once for each of `MARK_TESTS`, which `meta.test` names: the same scan, another
            mark. `meta` has the `mark`, and in `mark_agrees` whether it names the right answer. A scan about which
            nothing of `types` can be asked has no row: one in a hundred, with all types.
        types: of the questions, some of `ORGAN_TYPES`. None: all of them about marked scans; about others every
            `LOCALISED_TYPES`, and one question about the whole scan.
        progress: `progress(done, total)` is called after every patient.

    Raises ValueError for a share outside 0 to 1, for types that are none of `ORGAN_TYPES`, and for reports with marks
    or types: a mark names one answer, and reports answer no question.
    """
    if marks is not None and not 0 <= marks <= 1:
        raise ValueError(f"write_phantom: marks: expected a share of the training scans, 0 to 1, got {marks}")
    if types is not None and (not types or not set(types) <= set(ORGAN_TYPES)):
        raise ValueError(f"write_phantom: types: expected some of {', '.join(ORGAN_TYPES)}, got {', '.join(types)}")
    if reports and (marks is not None or types is not None):
        raise ValueError("write_phantom: expected reports, or marks and types of questions: reports answer none")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Sample]] = {split: [] for split in patients}
    done, total = 0, sum(patients.values())
    for split, count in patients.items():
        for patient in range(count):
            for number in range(SCANS_PER_PATIENT):
                key = (seed, _SPLIT_STREAM[split], patient, number)
                scan, rng = make_scan(key), np.random.default_rng((*key, 1))
                if marks is not None:
                    copies = _marked(scan, split, marks, types or ORGAN_TYPES, rng)
                else:
                    copies = [_Copy(scan.image, [report(scan)] if reports else list(draw_questions(scan, rng, types)))]
                for copy in copies:
                    rows[split] += _samples(folder, scan, copy, f"{split}-{patient:04d}", number)
            done += 1
            if progress:
                progress(done, total)
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, samples in rows.items():
        write_rows(files[name], samples)
    return files


def draw_questions(scan: Scan, rng: np.random.Generator, types: Sequence[str] | None = None) -> Iterator[Question]:
    """The questions of one scan: of these types; None: generic ones, and localised ones of different types."""
    for kind in rng.permutation(GENERIC_TYPES)[: QUESTIONS_PER_SCAN["generic"]] if types is None else ():
        question = ask(scan, str(kind), rng)
        assert question is not None
        yield question
    left = QUESTIONS_PER_SCAN["localised"]
    for kind in rng.permutation(types or LOCALISED_TYPES):
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
    """A scan as rows have it."""

    image: np.ndarray
    questions: list[Question]
    meta: Mapping[str, str] = field(default_factory=dict)
    """Of the copy, beside what is known of the scan."""
    suffix: str = ""
    """Of the picture's file name: copies with the same mark share it."""
    test: str = ""
    """Of `MARK_TESTS`; it ends the ids of the rows."""


def _marked(scan: Scan, split: str, share: float, types: Sequence[str], rng: np.random.Generator) -> Iterator[_Copy]:
    """Copies of a scan with one question, and marks that name its answer or do not."""
    odds = np.array([_TYPE_ODDS[kind] for kind in types])
    kinds = rng.choice(types, len(types), replace=False, p=odds / odds.sum())
    asked = (ask(scan, str(kind), rng) for kind in kinds)
    question = next((question for question in asked if question is not None), None)
    if question is None:
        return
    answers, kind = ANSWERS[question.type], KIND_OF_BODY[scan.body]
    right = answers.index(question.answer)
    wrong = int(rng.choice([code for code in range(len(answers)) if code != right]))
    either = right if rng.random() < 1 / len(answers) else wrong
    if split == "train":
        codes: dict[str, int | None] = {"": right if rng.random() < share else wrong}
    else:
        codes = dict(zip(MARK_TESTS, (wrong, either, None, right), strict=True))
    place = int(rng.integers(2**32))
    for test, code in codes.items():
        meta = {"test": test} if test else {}
        if code is None:
            yield _Copy(scan.image, [question], {**meta, "mark": "none"}, test=test)
            continue
        mark, agrees = Mark(kind, code), "yes" if code == right else "no"
        image = draw_mark(scan, mark, np.random.default_rng(place))
        yield _Copy(image, [question], {**meta, "mark": mark.name, "mark_agrees": agrees}, f"-{code}", test)


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
            id="-".join(filter(None, (name, str(index), copy.test))),
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
