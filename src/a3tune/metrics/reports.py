"""All scores of generated reports. What a metric needs and is not here makes that metric absent, not the others.

Knows the names of the metrics; each is a function of its own file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.machine.registry import Registry
from a3tune.metrics.text import Scores, Texts

NLTK_DATA = "nltk_data"
"""Key in `weights` of the folder with nltk's `punkt_tab` and `wordnet`; the other keys are names of metrics."""
NO_REPORT = "No report generated."
"""What a prediction counts as that is too short to be a report."""
_SHORTEST = 10
_PREFIX = "Assistant:"

METRICS: Registry[Callable[[Texts, Texts, Path | None], Scores]] = Registry(
    {
        "bleu": "a3tune.metrics.text:bleu",
        "rouge_l": "a3tune.metrics.text:rouge_l",
        "meteor": "a3tune.metrics.text:meteor",
        "bertscore": "a3tune.metrics.bertscore:bert_score",
        "chexbert": "a3tune.metrics.chexbert:chexbert",
        "radgraph": "a3tune.metrics.radgraph:radgraph",
        "ratescore": "a3tune.metrics.ratescore:ratescore",
    }
)
"""By name, in the paper's order (Table 3): (predictions, references, folder of weights) -> scores by name."""
_NLTK = ("bleu", "rouge_l", "meteor")


@dataclass(frozen=True, slots=True)
class ReportScores:
    """What `report_scores` found."""

    values: Mapping[str, tuple[float, ...]]
    """By metric, one score per report, in their order; a metric of the paper is the mean of them (x 100)."""
    absent: Mapping[str, str]
    """By metric that could not run: why, and how to get what it needs."""


def report_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    weights: Mapping[str, Path] | None = None,
    *,
    metrics: Sequence[str] | None = None,
) -> ReportScores:
    """Scores of reports against their references (Appendix D.1), one for one; predictions are cleaned first.

    Args:
        weights: local folders by the names of `weight_names`; what each holds stands in `docs/metrics.md`.
        metrics: names of `METRICS`; None is all of them.

    Raises:
        ConfigError: a metric or a key of `weights` is unknown.
        DataError: not as many predictions as references.
    """
    folders = dict(weights or {})
    metrics = tuple(METRICS) if metrics is None else metrics
    _refuse_unknown("metric", metrics, tuple(METRICS))
    check_weights(folders)
    if len(predictions) != len(references):
        raise DataError(f"expected one prediction for each of {len(references)} references, got {len(predictions)}")
    cleaned = [clean(text) for text in predictions]
    values: dict[str, tuple[float, ...]] = {}
    absent: dict[str, str] = {}
    for name in metrics:
        try:
            found = METRICS[name](cleaned, references, folders.get(NLTK_DATA if name in _NLTK else name))
        except ModelError as error:
            absent[name] = str(error)
        else:
            values |= {key: tuple(scores) for key, scores in found.items()}
    return ReportScores(values, absent)


def check_weights(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that `weights` may not have."""
    _refuse_unknown("weights", names, weight_names())


def _refuse_unknown(kind: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"{kind}: expected {', '.join(known)}, got {', '.join(unknown)}")


def weight_names() -> tuple[str, ...]:
    """Names that `weights` may have: nltk's data, and every metric that has a folder of its own."""
    return (NLTK_DATA, *(name for name in METRICS if name not in _NLTK))


def clean(prediction: str) -> str:
    """The report without an "Assistant:" before it; `NO_REPORT` if fewer than 10 characters remain."""
    text = prediction.strip().removeprefix(_PREFIX).strip()
    return text if len(text) >= _SHORTEST else NO_REPORT
