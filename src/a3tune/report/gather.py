"""Evaluated runs -> `ReportData`: reads what the runs left, compares them question by question, draws the cases.

Knows the files of run folders; loads no model. How the page looks is `html.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a3tune.config import RunConfig
from a3tune.data.images import load_image
from a3tune.errors import LabelError, RunError
from a3tune.evaluation.predictions import Map, read_maps, read_predictions
from a3tune.evaluation.results import Results, clusters, make_prediction, scores, summarise
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.quality import MIN_IOU, Quality
from a3tune.labels.store import read_quality
from a3tune.masks import decode_mask, region_mask
from a3tune.metrics.stats import Estimate, holm, paired_difference, paired_permutation_test
from a3tune.metrics.vqa import prior_baseline
from a3tune.report.cases import Selection, score, select_cases
from a3tune.report.records import (
    ANSWERS,
    METRICS,
    Case,
    Cases,
    Comparison,
    LabelQuality,
    LabelScores,
    MethodResult,
    View,
    curves_from_log,
    experts_from_log,
    heads_from_log,
)
from a3tune.run.folder import RunFolder
from a3tune.types import Labels, Prediction, Sample
from a3tune.vlm.patches import paint


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A run that was evaluated, as the report takes it."""

    name: str
    title: str
    predictions: tuple[Prediction, ...]
    """One for each test question, in their order."""
    maps: Mapping[str, Map]
    """By sample id; see `results.Results.maps`."""
    log: tuple[Mapping[str, Any], ...]
    """Lines of `metrics.jsonl`; none if nothing was trained."""


def read_method(name: str, title: str, folder: RunFolder, samples: Sequence[Sample]) -> Method:
    """What a run left in its folder. Raises RunError when it was not evaluated on exactly these questions."""
    by_id = {prediction.id: prediction for prediction in read_predictions(folder)}
    missing = [sample.id for sample in samples if sample.id not in by_id]
    if missing or len(by_id) != len(samples):
        raise RunError(
            f"{folder.path}: expected answers to the {len(samples)} test questions of the other runs, got "
            f"{len(by_id)} answers, {len(missing)} of these questions are not among them; evaluate all runs on one file"
        )
    predictions = tuple(by_id[sample.id] for sample in samples)
    return Method(name, title, predictions, read_maps(folder), tuple(_lines(folder.metrics)))


def method_results(methods: Sequence[Method], samples: Sequence[Sample], reference: str) -> tuple[MethodResult, ...]:
    """Scores of every method and its differences to `reference`; p-values are adjusted over all comparisons (Holm)."""
    compared = {
        (method.name, metric): found
        for method in methods
        for metric, found in _compare(
            method, next(m for m in methods if m.name == reference), clusters(samples)
        ).items()
    }
    adjusted = holm([p for _, p in compared.values()])
    differences: dict[str, dict[str, Comparison]] = {method.name: {} for method in methods}
    for ((name, metric), (difference, _)), p in zip(compared.items(), adjusted, strict=True):
        differences[name][metric] = Comparison(difference, float(p))
    return tuple(
        _result(method, summarise(samples, method.predictions), differences[method.name]) for method in methods
    )


def question_only(train: Sequence[Sample], samples: Sequence[Sample]) -> MethodResult:
    """The most frequent training answer to each test question: what can be had without looking."""
    answers = prior_baseline(train, samples)
    predictions = tuple(make_prediction(sample, answer) for sample, answer in zip(samples, answers, strict=True))
    return _result(Method("question_only", "Question only", predictions, {}, ()), summarise(samples, predictions), {})


def label_scores(quality: Mapping[str, Quality], *, top_k: int, min_iou: float) -> LabelQuality | None:
    """Label quality as the page shows it; None if no true region is known."""
    if "all" not in quality:
        return None
    found = {
        name: LabelScores(group.recall, group.best_iou, group.ceiling_recall, group.samples)
        for name, group in quality.items()
    }
    groups = {name.partition("=")[2]: value for name, value in found.items() if name != "all"}
    return LabelQuality(top_k, min_iou, found["all"], groups)


def choose_cases(methods: Sequence[Method], method: str, reference: str) -> Selection:
    """The questions to show side by side; see `select_cases`."""
    titles = {item.name: item.title for item in methods}
    predictions = {item.name: item.predictions for item in methods}
    return select_cases(predictions, method=method, reference=reference, titles=(titles[method], titles[reference]))


def draw_cases(
    chosen: Selection,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    labels: Mapping[str, Labels],
    boxes: Callable[[int, int], np.ndarray],
) -> Cases:
    """The chosen cases with their pictures.

    Args:
        labels: weak labels by sample id, as far as there are any.
        boxes: height, width -> boxes of the image tokens (`vlm.grids.token_boxes`).
    """
    by_id = {sample.id: index for index, sample in enumerate(samples)}
    return Cases(
        chosen.rule,
        tuple(
            _case(samples[by_id[choice.id]], by_id[choice.id], choice.reason, methods, labels, boxes)
            for choice in chosen.choices
        ),
    )


def _compare(method: Method, reference: Method, groups: Sequence[str]) -> dict[str, tuple[Estimate, float]]:
    """By metric, the difference and its p-value; nothing of the reference itself, or where no question has both."""
    if method is reference:
        return {}
    own, other = ([scores(prediction) for prediction in item.predictions] for item in (method, reference))
    compared = {}
    for metric in METRICS:
        first, second = (np.array([found.get(metric, np.nan) for found in item]) for item in (own, other))
        if not np.isnan(first - second).all():
            compared[metric] = paired_difference(first, second, groups), paired_permutation_test(first, second, groups)
    return compared


def _case(
    sample: Sample,
    index: int,
    reason: str,
    methods: Sequence[Method],
    labels: Mapping[str, Labels],
    boxes: Callable[[int, int], np.ndarray],
) -> Case:
    image = np.asarray(load_image(sample.image))
    size = (image.shape[0], image.shape[1])
    own = labels.get(sample.id)
    masks = [region_mask(region, *size) for region in sample.regions or ()]
    token_boxes = boxes(*size)
    views = [
        View(
            title=method.title,
            answer=method.predictions[index].prediction,
            score=score(method.predictions[index]),
            heat=paint(method.maps[sample.id].astype(np.float32), token_boxes, size),
            mass=method.predictions[index].attention.get("attention_mass", float("nan")),
        )
        for method in methods
    ]
    return Case(
        image=image,
        prompt=sample.prompt,
        answer=sample.answer,
        region=np.any(masks, axis=0) if masks else np.zeros(size, dtype=bool),
        labels=tuple(decode_mask(segment.mask) for segment in own.segments) if own else (),
        views=tuple(views),
        reason=reason,
        tags=tuple(sample.meta[key] for key in ("modality", "body", "question_type") if key in sample.meta),
    )


def _result(method: Method, results: Results, differences: Mapping[str, Comparison]) -> MethodResult:
    breakdown = {
        field: {
            value: {metric: found[metric] for metric in ANSWERS if metric in found} for value, found in classes.items()
        }
        for field, classes in results.breakdown.items()
    }
    return MethodResult(
        name=method.name,
        title=method.title,
        scores={name: found for name, found in results.metrics.items() if name in METRICS},
        differences=differences,
        breakdown=breakdown,
        curves=curves_from_log(method.log),
        experts=experts_from_log(method.log),
        head_share=heads_from_log(method.log),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a JSONL file; none if there is no file."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        for read in (curves_from_log, experts_from_log, heads_from_log):
            read(lines)  # what the page takes from them
        return lines
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise RunError(
            f"{path}: expected one JSON object per line, as training logs them: {error}; train again"
        ) from None


def counts(samples: Sequence[Sample]) -> dict[str, int]:
    found = {"questions": len(samples), "images": len({sample.image for sample in samples})}
    patients = {sample.meta["patient"] for sample in samples if "patient" in sample.meta}
    return found | ({"patients": len(patients)} if patients else {})


def stored_quality(config: RunConfig) -> LabelQuality | None:
    """How good the weak labels of a run are; None where nobody knows, or its store is not there any more."""
    try:
        settings = fitting_settings(config.label_store, config.labels)
    except LabelError:
        return None
    quality = read_quality(config.label_store, settings.name, config.labels.top_k)
    return None if quality is None else label_scores(quality, top_k=config.labels.top_k, min_iou=MIN_IOU)
