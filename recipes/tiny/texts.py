"""What the pretraining of the tiny models says about scans: captions, position questions, the tokenizer's corpus.

Captions and position questions teach words and reading. The localised question types of the demo are never asked.
"""

from collections.abc import Iterator

import numpy as np

from a3tune.data.phantom.anatomy import LESION_KINDS, MODALITIES, ORGANS, VIEWS
from a3tune.data.phantom.questions import NUMBERS, TEMPLATES, ask, fill
from a3tune.data.phantom.scan import SIZE, Scan
from a3tune.vlm.tiny import PATCH_SIZE

CAPTION_PROMPTS = ("Describe the image.", "What are the findings?", "Write a report of this scan.")
POSITION_PROMPTS = ("What is at row {row}, column {column}?", "Name the structure at row {row}, column {column}.")
POSITION_LESION_PROMPTS = ("What kind of lesion is at row {row}, column {column}?",)
LOOK_PROMPTS = ("How does the {organ} look?", "What about the {organ} in this image?")
SIZES = ("small", "large")
PLACES = ("upper", "lower")


def caption(scan: Scan, rng: np.random.Generator) -> str:
    """A short report: the view, then the findings of each organ in random order."""
    parts = [f"{scan.plane} {scan.modality} of the {scan.body}"]
    for organ in rng.permutation(scan.hosts):
        lesions = [lesion for lesion in scan.lesions if lesion.organ == organ]
        if not lesions:
            parts.append(f"{organ}: no lesion")
        elif len(lesions) == 1:
            rows = np.nonzero(scan.organs[str(organ)])[0]
            place = PLACES[int(lesions[0].centre[0] > rows.mean())]
            parts.append(f"{organ}: one {lesions[0].size} {place} {lesions[0].kind}")
        else:
            kinds = " and ".join(sorted({lesion.kind for lesion in lesions}))
            parts.append(f"{organ}: {NUMBERS[len(lesions) - 1]} lesions, {kinds}")
    return ". ".join(parts) + "."


def position_question(scan: Scan, rng: np.random.Generator) -> tuple[str, str]:
    """What stands at a grid position; half of the time the centre of a lesion."""
    if scan.lesions and rng.random() < 0.6:
        lesion = scan.lesions[rng.integers(len(scan.lesions))]
        row, column = (min(SIZE - 1, int(value)) // PATCH_SIZE for value in lesion.centre)
        if rng.random() < 0.5:
            return POSITION_LESION_PROMPTS[0].format(row=row, column=column), lesion.kind
        return _pick(POSITION_PROMPTS, rng).format(row=row, column=column), f"{lesion.organ}, {lesion.kind}"
    row, column = rng.integers(0, SIZE // PATCH_SIZE, 2)
    y, x = (int((value + 0.5) * PATCH_SIZE) for value in (row, column))
    organ = next((name for name, mask in scan.organs.items() if mask[y, x]), "nothing")
    return _pick(POSITION_PROMPTS, rng).format(row=row, column=column), organ


def look_question(scan: Scan, rng: np.random.Generator) -> tuple[str, str]:
    """Whether an organ is normal: finding what a question names, in other words than the demo's."""
    affected = {lesion.organ for lesion in scan.lesions}
    choices = [organ for organ in scan.hosts if (organ in affected) == (rng.random() < 0.5)] or list(scan.hosts)
    organ = choices[rng.integers(len(choices))]
    return LOOK_PROMPTS[rng.integers(len(LOOK_PROMPTS))].format(
        organ=organ
    ), "abnormal" if organ in affected else "normal"


def generic_question(scan: Scan, rng: np.random.Generator) -> tuple[str, str]:
    """Modality, body part or plane, as the demo asks them."""
    question = ask(scan, _pick(("modality", "body", "plane"), rng), rng)
    assert question is not None
    return question.prompt, question.answer


def corpus() -> Iterator[str]:
    """Every word the tokenizer should know as one token, in the forms in which it appears."""
    words = [
        *ORGANS,
        *LESION_KINDS,
        *MODALITIES,
        *NUMBERS,
        *SIZES,
        *PLACES,
        "yes",
        "no",
        "nothing",
        "lesion",
        "lesions",
    ]
    words += [view.body for view in VIEWS] + [view.plane for view in VIEWS]
    words += [f"row {number}, column {number}" for number in range(10)]
    for word in words:
        yield from (f" {word}", f" the {word}?", f" {word}.", f" {word}:")
    for templates in TEMPLATES.values():
        for template in templates:
            for organ in ORGANS:
                yield f"USER: \n{fill(template, organ, 'cyst')} ASSISTANT: yes"
    yield from (f"USER: \n{prompt} ASSISTANT:" for prompt in CAPTION_PROMPTS for _ in range(20))
    yield from (
        f"USER: \n{p.format(row=3, column=7)}" for p in POSITION_PROMPTS + POSITION_LESION_PROMPTS for _ in range(20)
    )
    yield from ("Medical image of the brain. This picture shows an organ of the patient.",) * 5


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
