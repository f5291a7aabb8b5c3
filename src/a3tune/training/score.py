"""The score of the validation that says which adapter is the best: its name, its direction, whether it can be had.

Light: told before anything slow is imported.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from random import Random

from a3tune.config import RunConfig
from a3tune.data.rows import read_split
from a3tune.errors import ConfigError
from a3tune.metrics.catalogue import METRICS, answer_scores, describe
from a3tune.types import Sample

VALIDATION = "eval_"
"""Begins the name of what a validation measured, in the log: transformers' word."""
LOSSES = ("loss", "loss_llm", "loss_align")
"""Of the validation: that of Eq. 12 and its parts; lower is better."""
MEASURED = ("answer", "radiology", "attention")
"""Kinds of metrics that a validation measures."""
_SEED = 0
"""Of the sample; not the training's, so that runs with other seeds are measured on the same rows."""


def validation_sample(config: RunConfig) -> list[Sample]:
    """The rows of `data.validation` that a training is measured on, in their order; none where it is not.

    Raises what `read_split` raises, and ConfigError for a score (`training.keep_best`) that these rows do not have.
    """
    settings = config.training
    if not settings.eval_steps:
        return []
    rows = read_split(config.data, "validation")
    chosen = Random(_SEED).sample(range(len(rows)), min(settings.eval_samples, len(rows)))
    samples = [rows[index] for index in sorted(chosen)]
    if settings.keep_best is not None:
        aligned = config.active_alignment.weight > 0
        if config.labels.source == "truth":
            aligned = aligned and any(sample.regions for sample in samples)
        _check_score(settings.keep_best, samples, aligned=aligned)
    return samples


def is_better(name: str, value: float, than: float) -> bool:
    """Whether a value of a score beats another one; NaN beats nothing."""
    return value < than if name in LOSSES or describe(name).lower_is_better else value > than


def _check_score(name: str, samples: Sequence[Sample], *, aligned: bool) -> None:
    if name not in LOSSES and describe(name).kind not in MEASURED:
        known = [*LOSSES, *(score for score, metric in METRICS.items() if metric.kind in MEASURED)]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise ConfigError(f"training.keep_best: {name} is no score of a validation; {hint}")
    if lacks := _lacks(name, samples, aligned):
        raise ConfigError(
            f"training.keep_best: {name} cannot be measured on the {len(samples)} rows of data.validation that are "
            f"evaluated: {lacks}; choose another score, or other rows"
        )


def _lacks(name: str, samples: Sequence[Sample], aligned: bool) -> str:
    """What is missing for a score; empty if nothing is."""
    kind = "loss" if name in LOSSES else describe(name).kind
    if kind == "answer":
        scored = (answer_scores(one.answer, one.answer, one.answer_type, one.options) for one in samples)
        return "" if any(name in scores for scores in scored) else "no question has it"
    if kind == "radiology":
        return "" if any(one.answer_type == "report" and one.answer for one in samples) else "there is no report"
    if kind == "attention":
        return "" if any(one.regions for one in samples) else "none has a region"
    return "" if name != "loss_align" or aligned else "nothing is aligned"
