"""OmniMedVQA (Hu et al. 2024) as published: multiple choice, its open-access part.

    QA_information/Open-access/*.json    one per source: [{"question_id", "question", "question_type", "gt_answer",
                                         "option_A", ... "option_D", "image_path", "modality_type", "dataset"}, ...]
    Images/ACRIMA/Im002_ACRIMA.png       named by "image_path", relative to the folder

The options stand in the prompt, and beside it for `choice_accuracy`. There is no published split; 3 of 10 images are
the test set, drawn with our seed. The paper asks other rows of the set, openly, as CARES prepared them (`cares.py`).
"""

from pathlib import Path
from typing import Any

from a3tune.data.sets.reading import Reading, Splits
from a3tune.data.sets.split import by_group
from a3tune.types import Sample

QUESTIONS = Path("QA_information") / "Open-access"
TEST_SHARE = 0.3
_META = {"modality": ("modality_type", "modality"), "question_type": ("question_type",), "dataset": ("dataset",)}
"""Field of `meta` -> the published field; one file names it differently."""


def recognises(folder: Path) -> bool:
    """Whether this looks like the published OmniMedVQA."""
    return (folder / QUESTIONS).is_dir()


def read(reading: Reading, variant: str) -> Splits:
    """All questions, split by image."""
    everything = Splits()
    files = sorted((reading.folder / QUESTIONS).glob("*.json"))
    if not files:
        reading.problem(f"{QUESTIONS.as_posix()}/*.json", "missing")
    for number, path in enumerate(files, start=1):
        where = path.relative_to(reading.folder).as_posix()
        for index, row in enumerate(reading.load(where), start=1):
            sample = _sample(reading, where, f"{path.stem}-{index}", row)
            reading.add(everything, "all", where, sample, "no image, or no options with the answer")
        if reading.progress:
            reading.progress(number, len(files))
    train, test = by_group(everything.get("all", []), lambda sample: sample.image, TEST_SHARE)
    return reading.split_again(train, test)


def _sample(reading: Reading, where: str, name: str, row: dict[str, Any]) -> Sample | None:
    image = reading.image(where, reading.folder, row.get("image_path"))
    question, answer = (reading.text(where, row, key) for key in ("question", "gt_answer"))
    given = (reading.text(where, row, key) for key in sorted(row) if key.startswith("option_"))
    options = tuple(dict.fromkeys(option for option in given if option))
    if image is None or len(options) < 2 or answer not in options:
        reading.problem(
            where, f"{name}: expected an image and two options or more, the answer among them: left out", blocking=False
        )
        return None
    meta = {field: reading.text(where, row, key) for field, keys in _META.items() for key in keys if row.get(key)}
    prompt = f"{question} Choose one: {'; '.join(options)}."
    return Sample(f"omnimedvqa-choice-{name}", image, prompt, answer, "choice", meta=meta, options=options)
