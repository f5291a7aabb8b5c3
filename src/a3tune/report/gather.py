"""Evaluated runs -> what the report says of them: reads what they left, compares them question by question.

Knows the files of run folders; loads no model and no image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a3tune.config import RunConfig
from a3tune.errors import LabelError, RunError
from a3tune.evaluation.identity import refuse_other_rows
from a3tune.evaluation.predictions import Map, read_maps, read_predictions
from a3tune.evaluation.results import Results, clusters, make_prediction, scores, summarise
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.quality import MIN_IOU, Quality
from a3tune.labels.stored import read_quality
from a3tune.metrics.catalogue import describe, in_order
from a3tune.metrics.stats import Estimate, holm, paired_difference, paired_permutation_test
from a3tune.metrics.vqa import prior_baseline
from a3tune.report.logs import curves_from_log, experts_from_log, heads_from_log, read_log
from a3tune.report.records import Comparison, LabelQuality, LabelScores, RunResult
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Sample


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedRun:
    """What a run left, as the report takes it."""

    name: str
    title: str
    predictions: tuple[Prediction, ...]
    """One for each test question, in their order."""
    maps: Mapping[str, Map]
    """By sample id; see `results.Results.maps`."""
    log: tuple[Mapping[str, Any], ...]
    """Lines of `metrics.jsonl`; none if nothing was trained."""


def read_run(
    name: str, title: str, folder: RunFolder, samples: Sequence[Sample], *, images: bool = False
) -> EvaluatedRun:
    """What a run left in its folder. Raises RunError when it was not evaluated on exactly these questions, with the
    answers, regions and, if `images` are asked for, the images that they have now."""
    by_id = {prediction.id: prediction for prediction in read_predictions(folder)}
    missing = [sample.id for sample in samples if sample.id not in by_id]
    if missing or len(by_id) != len(samples):
        raise RunError(
            f"{folder.path}: expected answers to the {len(samples)} test questions of the other runs, got "
            f"{len(by_id)} answers, {len(missing)} of these questions are not among them; evaluate all runs on one file"
        )
    refuse_other_rows(folder, samples, images=images)
    predictions = tuple(by_id[sample.id] for sample in samples)
    return EvaluatedRun(name, title, predictions, read_maps(folder), tuple(read_log(folder.metrics)))


def run_results(
    runs: Sequence[EvaluatedRun], samples: Sequence[Sample], reference: str, *, attention_alike: bool = True
) -> tuple[RunResult, ...]:
    """Scores of every run and its differences to `reference`, one of their names.

    Metrics of the main tables are compared, those of attention only where all runs measured it alike; p-values are
    adjusted over all comparisons (Holm).
    """
    groups = clusters(samples)
    scores_of = {run.name: [scores(prediction) for prediction in run.predictions] for run in runs}
    compared = {
        (run.name, metric): difference_and_p
        for run in runs
        if run.name != reference
        for metric, difference_and_p in _compare(scores_of[run.name], scores_of[reference], groups).items()
        if attention_alike or describe(metric).kind != "attention"
    }
    adjusted = holm([p for _, p in compared.values()])
    differences: dict[str, dict[str, Comparison]] = {run.name: {} for run in runs}
    for ((name, metric), (difference, _)), p in zip(compared.items(), adjusted, strict=True):
        differences[name][metric] = Comparison(difference, float(p))
    return tuple(_result(run, summarise(samples, run.predictions), differences[run.name]) for run in runs)


def question_only(train: Sequence[Sample], samples: Sequence[Sample]) -> RunResult:
    """The most frequent training answer to each test question: what can be had without looking."""
    answers = prior_baseline(train, samples)
    predictions = tuple(make_prediction(sample, answer) for sample, answer in zip(samples, answers, strict=True))
    unseen = EvaluatedRun("question_only", "Question only", predictions, {}, ())
    return _result(unseen, summarise(samples, predictions), {})


def counts(samples: Sequence[Sample]) -> dict[str, int]:
    """Questions, images and, where they are known, patients."""
    known = {"questions": len(samples), "images": len({sample.image for sample in samples})}
    patients = {sample.meta["patient"] for sample in samples if "patient" in sample.meta}
    return known | ({"patients": len(patients)} if patients else {})


def stored_quality(config: RunConfig, samples: Sequence[Sample]) -> LabelQuality | None:
    """How good the weak labels of a run are on its training samples; None where nobody knows, or its store is not there
    any more."""
    try:
        settings = fitting_settings(config.label_store, config.labels, by_name=True)
    except LabelError:
        return None
    quality = read_quality(config.label_store, settings.name, config.labels.top_k, samples)
    return None if quality is None else label_scores(quality, top_k=config.labels.top_k, min_iou=MIN_IOU)


def label_scores(quality: Mapping[str, Quality], *, top_k: int, min_iou: float) -> LabelQuality | None:
    """Label quality as the page shows it; None if no true region is known."""
    if "all" not in quality:
        return None
    by_group = {
        name: LabelScores(group.recall, group.best_iou, group.ceiling_recall, group.samples)
        for name, group in quality.items()
    }
    by_body = {name.partition("=")[2]: value for name, value in by_group.items() if name != "all"}
    return LabelQuality(top_k, min_iou, by_group["all"], by_body)


def _compare(
    run: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]], groups: Sequence[str]
) -> dict[str, tuple[Estimate, float]]:
    """By metric of the main tables, the difference and its p-value; nothing where no question has both scores."""
    compared = {}
    for metric in in_order(name for sample_scores in run for name in sample_scores):
        if not describe(metric).main:
            continue
        first, second = (np.array([known.get(metric, np.nan) for known in side]) for side in (run, reference))
        if not np.isnan(first - second).all():
            compared[metric] = paired_difference(first, second, groups), paired_permutation_test(first, second, groups)
    return compared


def _result(run: EvaluatedRun, results: Results, differences: Mapping[str, Comparison]) -> RunResult:
    breakdown = {
        field: {value: {name: known[name] for name in _by_question(known)} for value, known in classes.items()}
        for field, classes in results.breakdown.items()
    }
    return RunResult(
        name=run.name,
        title=run.title,
        scores=results.metrics,
        differences=differences,
        breakdown=breakdown,
        curves=curves_from_log(run.log),
        experts=experts_from_log(run.log),
        head_share=heads_from_log(run.log),
    )


def _by_question(names: Mapping[str, Estimate]) -> list[str]:
    """The metrics that are broken down by question type, modality and organ."""
    metrics = {name: describe(name) for name in in_order(names)}
    return [name for name, known in metrics.items() if known.kind == "answer" and known.main and known.by_question]
