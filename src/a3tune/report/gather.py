"""Evaluated runs -> what the report says of them: reads what they left, compares them question by question.

Knows the files of run folders; loads no model and no image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from a3tune.config import RunConfig
from a3tune.errors import LabelError, RunError, shown
from a3tune.evaluation.identity import refuse_other_rows, refuse_unlike_rows
from a3tune.evaluation.predictions import Map, read_maps, read_predictions
from a3tune.evaluation.reliance_log import read_reliance
from a3tune.evaluation.results import Results, clusters, make_prediction, scores, summarise
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.quality import MIN_IOU, Quality
from a3tune.labels.stored import read_quality
from a3tune.metrics.catalogue import Kind, describe, in_order
from a3tune.metrics.reliance import Hiding, Occluded
from a3tune.metrics.stats import Estimate, holm, paired_difference, paired_permutation_test
from a3tune.metrics.vqa import prior_baseline
from a3tune.report.logs import curves_from_log, experts_from_log, heads_from_log, read_log
from a3tune.report.records import Comparison, Curve, LabelQuality, LabelScores, RunResult
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
    hiding: Hiding | None = None
    """How parts of the images were hidden; None if they were not."""
    occluded: Mapping[str, Occluded] = field(default_factory=dict)
    """By sample id; none if nothing was hidden."""


def read_runs(
    folders: Mapping[str, RunFolder], titles: Mapping[str, str], samples: Sequence[Sample], *, images: bool = False
) -> list[EvaluatedRun]:
    """`read_run` of each, by name; raises RunError, too, when they were asked about other images under the same ids."""
    runs = [read_run(name, titles[name], folder, samples, images=images) for name, folder in folders.items()]
    refuse_unlike_rows(list(folders.values()))
    return runs


def read_run(
    name: str, title: str, folder: RunFolder, samples: Sequence[Sample], *, images: bool = False
) -> EvaluatedRun:
    """What a run left in its folder. Raises RunError when it was not evaluated on exactly these questions, with the
    answers, regions and, if `images` are asked for, the images that they have now."""
    by_id = {prediction.id: prediction for prediction in read_predictions(folder)}
    missing = [sample.id for sample in samples if sample.id not in by_id]
    others = len(by_id) - (len(samples) - len(missing))
    if missing or others:
        raise RunError(
            f"{folder.path}: expected answers to the {len(samples)} test questions; {len(missing)} of them are not "
            f"answered, and {others} answers are to other questions. Evaluate all runs on one file, to the end"
        )
    predictions = tuple(by_id[sample.id] for sample in samples)
    for sample, prediction in zip(samples, predictions, strict=True):
        _refuse_other_words(folder, sample, prediction)
    refuse_other_rows(folder, samples, images=images)
    log = tuple(read_log(folder.metrics))
    return EvaluatedRun(name, title, predictions, read_maps(folder), log, *read_reliance(folder))


def run_results(
    runs: Sequence[EvaluatedRun], samples: Sequence[Sample], reference: str, *, unlike: Collection[Kind] = ()
) -> tuple[RunResult, ...]:
    """Scores of every run and its differences to `reference`, one of their names.

    Metrics of the main tables are compared, but for the kinds that the runs measured in different ways (`unlike`);
    p-values are adjusted over all comparisons (Holm).
    """
    groups = clusters(samples)
    scores_of = {run.name: [scores(prediction) for prediction in run.predictions] for run in runs}
    compared = {
        (run.name, metric): difference_and_p
        for run in runs
        if run.name != reference
        for metric, difference_and_p in _compare(scores_of[run.name], scores_of[reference], groups).items()
        if describe(metric).kind not in unlike
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


def _refuse_other_words(folder: RunFolder, sample: Sample, prediction: Prediction) -> None:
    """Raise RunError for an answer that says itself that it is one to another question than `sample`."""
    for part in ("prompt", "answer", "answer_type", "options"):
        then, now = getattr(prediction, part), getattr(sample, part)
        if then != now:
            raise RunError(
                f"{folder.path}: the {part} of sample {shown(sample.id, 80)} is not the one that was evaluated: it was "
                f"{shown(then, 80)}, and is {shown(now, 80)}. Put it back as it was, or evaluate again with another "
                "output"
            )


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
        deletion=_deletion([run.occluded[one.id] for one in run.predictions if one.id in run.occluded]),
    )


def _deletion(occluded: Sequence[Occluded]) -> dict[Literal["attention", "random"], Curve]:
    """Means over the samples that have deletion curves."""
    curves = [(one.by_attention, one.at_random) for one in occluded if one.by_attention]
    if not curves:
        return {}
    by_attention, at_random = np.mean(curves, axis=0)
    hidden = np.linspace(0, 100, len(by_attention))
    return {"attention": Curve(hidden, by_attention), "random": Curve(hidden, at_random)}


def _by_question(names: Mapping[str, Estimate]) -> list[str]:
    """The metrics that are broken down by question type, modality and organ."""
    metrics = {name: describe(name) for name in in_order(names)}
    return [name for name, known in metrics.items() if known.kind == "answer" and known.main and known.by_question]
