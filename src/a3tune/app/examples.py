"""Synthetic scans to start with, drawn in memory, each with a mark that misleads. Knows no model and no page."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from a3tune.data.phantom.marks import KIND_OF_BODY, Mark, draw_mark
from a3tune.data.phantom.questions import ANSWERS, Question, ask
from a3tune.data.phantom.scan import Scan, make_scan

SEEDS = (6, 11, 26, 31)
KINDS = ("kind", "presence", "presence of kind", "size", "modality")
"""Types of question that are suggested, where they can be asked about a scan: the demo's, and one about all of it."""


@dataclass(frozen=True, eq=False)
class Example:
    """A scan, and questions whose answers and regions are known."""

    title: str
    image: Image.Image
    questions: tuple[Question, ...]


@cache
def examples() -> tuple[Example, ...]:
    """The same scans at every start."""
    return tuple(_example(number, seed) for number, seed in enumerate(SEEDS, 1))


def _example(number: int, seed: int) -> Example:
    scan = make_scan(seed)
    rng = np.random.default_rng(seed)
    questions = tuple(question for kind in KINDS if (question := ask(scan, kind, rng)) is not None)
    mark = _misleading(scan, questions)
    title = f"{number}: {scan.modality}, {scan.body}, {scan.plane}, {mark.name}"
    return Example(title, Image.fromarray(draw_mark(scan, mark, rng)).convert("RGB"), questions)


def _misleading(scan: Scan, questions: tuple[Question, ...]) -> Mark:
    """A mark that in the demo's training names another answer to the first question."""
    answers = ANSWERS[questions[0].type]
    right = answers.index(questions[0].answer)
    return Mark(KIND_OF_BODY[scan.body], (right + 1) % len(answers))
