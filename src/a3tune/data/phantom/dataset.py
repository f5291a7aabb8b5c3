"""Writes a phantom data set in the public row format: PNG files and train/validation/test JSONL, split by patient."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from a3tune.data.phantom.findings import REPORT_PROMPT, findings
from a3tune.data.phantom.questions import GENERIC_TYPES, LOCALISED_TYPES, Question, ask
from a3tune.data.phantom.scan import Scan, make_scan
from a3tune.data.rows import write_rows
from a3tune.masks import encode_mask
from a3tune.types import Region, Sample

DEMO_PATIENTS = {"train": 300, "validation": 80, "test": 120}
SCANS_PER_PATIENT = 2
QUESTIONS_PER_SCAN = {"generic": 1, "localised": 6}
_SPLIT_STREAM = {"train": 1, "validation": 2, "test": 3}


def write_phantom(
    folder: Path,
    patients: Mapping[str, int] = DEMO_PATIENTS,
    *,
    seed: int = 0,
    reports: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write the splits named in `patients` and return their JSONL files.

    `reports` writes one report per scan (`findings.py`) in place of its questions.
    Images land in `folder/images`. The same seed gives the same bytes; different splits never share a patient.
    `progress(done, total)` is called after every patient.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    done, total = 0, sum(patients.values())
    for split, count in patients.items():
        samples: list[Sample] = []
        for patient in range(count):
            samples += _patient_samples(folder, split, patient, (seed, _SPLIT_STREAM[split], patient), reports)
            done += 1
            if progress:
                progress(done, total)
        files[split] = folder / f"{split}.jsonl"
        write_rows(files[split], samples)
    return files


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


def _patient_samples(folder: Path, split: str, patient: int, seed: tuple[int, ...], reports: bool) -> Iterator[Sample]:
    for number in range(SCANS_PER_PATIENT):
        scan = make_scan((*seed, number))
        name = f"{split}-{patient:04d}-{number}"
        path = folder / "images" / f"{name}.png"
        Image.fromarray(scan.image).save(path)
        random = np.random.default_rng((*seed, number, 1))
        for index, question in enumerate([report(scan)] if reports else draw_questions(scan, random)):
            yield Sample(
                id=f"{name}-{index}",
                image=path,
                prompt=question.prompt,
                answer=question.answer,
                answer_type=question.answer_type,
                regions=_regions(question),
                meta={
                    "question_type": question.type,
                    "modality": scan.modality,
                    "body": scan.body,
                    "plane": scan.plane,
                    "organ": question.organ,
                    "patient": f"{split}-{patient:04d}",
                },
            )


def _regions(question: Question) -> tuple[Region, ...]:
    """None is known of a question about the whole scan: it asks about no particular place."""
    return () if question.region is None else (Region(mask=encode_mask(question.region), name=question.organ),)
