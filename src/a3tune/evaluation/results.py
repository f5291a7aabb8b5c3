"""Answers and their scores -> means with intervals, also by test, question type, modality, body part and organ.

Knows predictions, wherever they come from; no model.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from a3tune.data.images import content_hash, split_fragment
from a3tune.evaluation.predictions import Cost, Map
from a3tune.metrics.catalogue import answer_scores
from a3tune.metrics.stats import Estimate, mean_interval
from a3tune.types import ImageSource, Prediction, Sample

BREAKDOWN = ("test", "question_type", "modality", "body", "organ")
"""Fields of `meta` that results are broken down by."""
MOST_TESTS = 8
"""More values of `meta.test` are not the tests of an evaluation, but something else of that name: a blood test."""


@dataclass(frozen=True, slots=True)
class Results:
    """The outcome of an evaluation."""

    predictions: tuple[Prediction, ...]
    """One per sample, in the samples' order."""
    metrics: Mapping[str, Estimate]
    """Mean and 95 % interval of every score, by name; see `scores`."""
    breakdown: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    """The same by field of `meta` (those of `BREAKDOWN` that samples have) and its value."""
    counts: Mapping[str, int]
    """Samples; those of each answer type; those with attention metrics, and with reliance if that
    was measured; images or patients that were resampled."""
    maps: Mapping[str, Map] = field(default_factory=dict)
    """By sample id, float16 `[N]`: attention on each image token over the selected heads, largest value 1."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What answers and attention depend on; `occlusion`: how parts of the images were hidden, if they were."""
    cost: Cost = field(default_factory=Cost)
    """Of all answers, earlier sessions included."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured (a metric of radiology reports, attention): why, and how to get what it needs."""

    def as_json(self) -> dict[str, Any]:
        """Content of `results.json`; undefined numbers are null."""
        return {
            "metrics": _as_json(self.metrics),
            "breakdown": {
                field: {value: _as_json(metrics) for value, metrics in classes.items()}
                for field, classes in self.breakdown.items()
            },
            "counts": dict(self.counts),
            "settings": dict(self.settings),
            "cost": asdict(self.cost),
            "absent": dict(self.absent),
        }


def make_prediction(sample: Sample, text: str, attention: Mapping[str, float] | None = None) -> Prediction:
    """The record of an answer to a sample."""
    return Prediction(
        id=sample.id,
        prompt=sample.prompt,
        answer=sample.answer,
        answer_type=sample.answer_type,
        prediction=text,
        meta=dict(sample.meta),
        attention=attention or {},
        options=sample.options,
    )


def summarise(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    *,
    maps: Mapping[str, Map] | None = None,
    settings: Mapping[str, Any] | None = None,
    cost: Cost | None = None,
) -> Results:
    """Means and intervals of predictions, one per sample in the same order, wherever they come from."""
    groups = clusters(samples)
    sample_scores = [scores(prediction) for prediction in predictions]
    breakdown = {
        field: {value: _estimates(sample_scores, groups, chosen) for value, chosen in classes(samples, field).items()}
        for field in BREAKDOWN
    }
    counts = {"samples": len(samples), "groups": len(set(groups))}
    for sample in samples:
        counts[sample.answer_type] = counts.get(sample.answer_type, 0) + 1
    counts["with_attention"] = sum(bool(prediction.attention) for prediction in predictions)
    if any(prediction.reliance for prediction in predictions):
        counts["with_reliance"] = sum(bool(prediction.reliance) for prediction in predictions)
    return Results(
        predictions=tuple(predictions),
        metrics=_estimates(sample_scores, groups, range(len(samples))),
        breakdown={field: values for field, values in breakdown.items() if values},
        counts=counts,
        maps=maps or {},
        settings=settings or {},
        cost=cost or Cost(),
    )


def scores(prediction: Prediction) -> dict[str, float]:
    """Every score of one sample by name: of its answer or report and, where measured, of its attention and reliance."""
    answer = answer_scores(prediction.prediction, prediction.answer, prediction.answer_type, prediction.options)
    return answer | dict(prediction.report) | dict(prediction.attention) | dict(prediction.reliance)


def clusters(samples: Sequence[Sample]) -> list[str]:
    """For each sample what it is not independent of: its patient (`meta["patient"]`) if known, else its image's file.

    Frames and slices of one file are not independent, whatever way its path is written. Of copies nobody knows here.
    """
    images = {sample.image for sample in samples if not sample.meta.get("patient")}
    names = {image: _file_name(image) for image in images}
    return [sample.meta.get("patient") or names[sample.image] for sample in samples]


def classes(samples: Sequence[Sample], field: str) -> dict[str, list[int]]:
    """Indices of the samples by their value of a field of `meta`, in order of appearance; without it: in no class."""
    indices: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        if field in sample.meta:
            indices.setdefault(sample.meta[field], []).append(index)
    return indices


def named_tests(metas: Iterable[Mapping[str, str]]) -> list[str]:
    """The tests that questions name in `meta.test`, in order of appearance; none if there are over `MOST_TESTS`."""
    tests = list(dict.fromkeys(meta["test"] for meta in metas if "test" in meta))
    return tests if len(tests) <= MOST_TESTS else []


def _estimates(
    sample_scores: Sequence[Mapping[str, float]], groups: Sequence[str], chosen: Sequence[int]
) -> dict[str, Estimate]:
    names = dict.fromkeys(name for index in chosen for name in sample_scores[index])
    chosen_groups = [groups[index] for index in chosen]
    return {
        name: mean_interval([sample_scores[index].get(name, np.nan) for index in chosen], chosen_groups)
        for name in names
    }


def estimate_as_json(estimate: Estimate) -> dict[str, Any]:
    """`mean` and `ci95`, null where a number is not defined."""
    mean, low, high = (x if np.isfinite(x) else None for x in (estimate.mean, estimate.low, estimate.high))
    return {"mean": mean, "ci95": [low, high]}


def _as_json(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate_as_json(estimate) | {"count": estimate.count} for name, estimate in metrics.items()}


def _file_name(image: ImageSource) -> str:
    return content_hash(image) if isinstance(image, bytes) else os.path.realpath(split_fragment(image)[0])
