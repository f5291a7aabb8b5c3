"""What answers rest on: how they change when parts of the image are hidden. Knows answers and log-probabilities.

Names of scores end in the name of a filling, or in none for the mean over all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from a3tune.metrics.catalogue import right
from a3tune.metrics.vqa import normalise
from a3tune.types import Filling, Part, Prediction


@dataclass(frozen=True, slots=True)
class Hiding:
    """How parts of images were hidden: scores of runs can be compared where it is the same."""

    fillings: tuple[Filling, ...]
    dilation: float
    """In lengths of an image's longer side."""
    steps: int
    """Of a deletion curve."""
    regions: Literal["true", "weak"]
    """The data's own, or weak labels."""
    top_k: int | None = None
    """Weak labels of a question, at most."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """All else that weak labels depend on, as JSON values."""


@dataclass(frozen=True, slots=True)
class Occluded:
    """What a model says to one sample with parts of the image hidden, and how fast its answer fades."""

    id: str
    intact: str
    """The answer to the whole image."""
    answers: Mapping[Part, Mapping[Filling, str]] = field(default_factory=dict)
    """By what was hidden and what stood in its place; empty for a sample without a region."""
    by_attention: tuple[float, ...] = ()
    """Mean log-probability (nats) of the intact answer's tokens with 0 to 100 % of the image tokens hidden, in equal
    steps, those with the most attention first. Empty where it was not measured."""
    at_random: tuple[float, ...] = ()
    """The same with as many tokens drawn anew at each step."""


def reliance_scores(prediction: Prediction, occluded: Occluded) -> dict[str, float]:
    """Every score of one sample by name; empty for a sample without a region. Definitions: docs/metrics.md."""
    scores: dict[str, float] = {}
    intact = right(prediction, occluded.intact)
    if occluded.answers and intact is not None:
        scores["accuracy_intact"] = intact
    for part, answers in occluded.answers.items():
        changed = {filling: _changed(occluded.intact, text) for filling, text in answers.items()}
        scores |= _by_filling(f"reliance_{part}", changed)
        shares = {filling: right(prediction, text) for filling, text in answers.items()}
        known = {filling: value for filling, value in shares.items() if value is not None}
        scores |= _by_filling(f"accuracy_{part}_hidden", known)
    if "elsewhere" in occluded.answers:
        scores["reliance_margin"] = scores["reliance_inside"] - scores["reliance_elsewhere"]
    if occluded.by_attention:
        scores["deletion_attention"] = _lost(occluded.by_attention)
        scores["deletion_random"] = _lost(occluded.at_random)
        scores["deletion_gain"] = scores["deletion_attention"] - scores["deletion_random"]
    return scores


def _by_filling(name: str, values: Mapping[str, float]) -> dict[str, float]:
    if not values:
        return {}
    each = {f"{name}_{filling}": value for filling, value in values.items()}
    return {name: float(np.mean(list(values.values())))} | each


def _changed(intact: str, text: str) -> float:
    return float(normalise(intact) != normalise(text))


def _lost(curve: tuple[float, ...]) -> float:
    """Area between the intact answer's log-probability and the curve, over the share hidden from 0 to 1."""
    return float(np.trapezoid(curve[0] - np.asarray(curve), dx=1 / (len(curve) - 1)))
