"""Synthetic scans to start with, drawn in memory. Knows no model and no page."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from a3tune.data.phantom.questions import Question, ask
from a3tune.data.phantom.scan import make_scan

SEEDS = (6, 11, 26, 31)
KINDS = ("kind", "count", "position", "presence", "modality")
"""Types of question that are suggested, where they can be asked about a scan."""


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
    questions = (ask(scan, kind, rng) for kind in KINDS)
    title = f"{number}: {scan.modality}, {scan.body}, {scan.plane}"
    return Example(
        title,
        Image.fromarray(scan.image).convert("RGB"),
        tuple(question for question in questions if question is not None),
    )
