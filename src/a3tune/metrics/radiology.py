"""All scores of generated radiology reports. What a metric needs and lacks makes that metric absent, not the others.

Knows the order of things; which metrics there are stands in `catalogue`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.metrics.catalogue import computed

NLTK_DATA = "nltk_data"
"""Key in `weights` of the folder with nltk's `punkt_tab` and `wordnet`; the other keys are names of metrics."""
NO_REPORT = "No report generated."
"""Stands for a prediction that is too short to be a report."""
_SHORTEST = 10
_PREFIX = "Assistant:"

_NLTK = ("bleu", "rouge_l", "meteor")


@dataclass(frozen=True, slots=True)
class RadiologyScores:
    """What `radiology_scores` returns."""

    values: Mapping[str, tuple[float, ...]]
    """By metric, one score per report, in their order; a metric of the paper is the mean of them (x 100)."""
    absent: Mapping[str, str]
    """By metric that could not run: why, and how to get what it needs."""


def radiology_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    weights: Mapping[str, Path] | None = None,
    *,
    metrics: Sequence[str] | None = None,
) -> RadiologyScores:
    """Scores of radiology reports against their references (Appendix D.1), one for one; predictions are cleaned first.

    Args:
        weights: local folders by the names of `weight_names`; what each holds stands in `docs/metrics.md`.
        metrics: names of the catalogue; None is all of this kind.

    Raises:
        ConfigError: a metric or a key of `weights` is unknown.
        DataError: not as many predictions as references.
    """
    folders, functions = dict(weights or {}), computed("radiology")
    metrics = tuple(functions) if metrics is None else metrics
    _refuse_unknown("metric", metrics, tuple(functions))
    check_weights(folders)
    if len(predictions) != len(references):
        raise DataError(f"expected one prediction for each of {len(references)} references, got {len(predictions)}")
    cleaned = [clean(text) for text in predictions]
    values: dict[str, tuple[float, ...]] = {}
    absent: dict[str, str] = {}
    for name in metrics:
        try:
            scored = functions[name](cleaned, references, folders.get(NLTK_DATA if name in _NLTK else name))
        except ModelError as error:
            absent[name] = str(error)
        else:
            values |= {key: tuple(scores) for key, scores in scored.items()}
    return RadiologyScores(values, absent)


def check_weights(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that `weights` may not have."""
    _refuse_unknown("weights", names, weight_names())


def weight_names() -> tuple[str, ...]:
    """Names that `weights` may have: nltk's data, and every metric that has a folder of its own."""
    return (NLTK_DATA, *(name for name in computed("radiology") if name not in _NLTK))


def clean(prediction: str) -> str:
    """The report without an "Assistant:" before it; `NO_REPORT` if fewer than 10 characters remain."""
    text = prediction.strip().removeprefix(_PREFIX).strip()
    return text if len(text) >= _SHORTEST else NO_REPORT


def _refuse_unknown(kind: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{kind}: expected {', '.join(known)}, got {', '.join(unknown)}")
