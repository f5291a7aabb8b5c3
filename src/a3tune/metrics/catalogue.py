"""Every metric, once: what it is called, how it is shown, what it means and how it is computed.

Whatever computes or shows metrics reads `METRICS`. A metric of one's own is one more entry (docs/howto/own-metric.md).
Knows texts, maps and regions; not who made them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from a3tune.metrics import attention, vqa
from a3tune.metrics.attention import Array, Normalisation
from a3tune.metrics.text import Scores, Texts, bleu, meteor, rouge_l
from a3tune.metrics.vqa import AnswerScore
from a3tune.types import AnswerType, Filling, Prediction

Kind = Literal["answer", "radiology", "attention", "reliance", "unknown"]
RadiologyScore = Callable[[Texts, Texts, Path | None], Scores]
"""(predictions, references, folder of weights) -> by name of the score, one for each radiology report."""
AttentionScore = Callable[[ArrayLike, ArrayLike, float, Normalisation], Array]
"""(map_BN, region_BN, tau, normalisation) -> [B]; NaN where it is not defined."""

ALL_HEADS = "_all_heads"
"""Ends the name of an attention metric of the map over all heads."""
_FORMS: tuple[tuple[str, Kind, str, str], ...] = (
    (ALL_HEADS, "attention", "all heads", "Of the map over all heads (Eq. 2)"),
    *((f"_{name}", "reliance", name, f"With {name} in place of what is hidden") for name in get_args(Filling)),
)
"""Further forms of the metrics of a kind: how their names end, and what they are, for titles and in a sentence."""
SCALED: dict[Normalisation, str] = {
    "max": "divided by its largest value",
    "sum": "divided by its sum",
    "min-max": "stretched to the range 0 to 1",
}
"""What happened to a map before Coverage and Intensity, in words."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, for the code that computes it and for the code that shows it."""

    title: str
    meaning: str
    """The formula in words; `{tau}` and `{scaled}` are filled in by `explained`."""
    compute: AnswerScore | RadiologyScore | AttentionScore | None = None
    """As its kind has it. None: another metric gives this one, too (`radgraph` its parts), all of its kind are made at
    once (`metrics.reliance`), or nobody here can."""
    kind: Kind = "answer"
    """What is measured: the answer to a question, the text of a radiology report, the attention on the image, or what
    the answer rests on."""
    percent: bool = True
    """Shown times 100, with a % sign in running text; else as a plain number."""
    lower_is_better: bool = False
    main: bool = True
    """Stands in the main tables and is tested; else among the further scores."""
    by_question: bool = True
    """If it is of answers and in the main tables: the report also shows it by question type, modality and organ."""

    plain: str = ""
    """What goes up or down, for readers who know none of this; empty: the title says it."""

    @property
    def heading(self) -> str:
        """The title with the unit, for columns and axes."""
        return self.title + (", %" if self.percent else "")

    def text(self, value: float, *, signed: bool = False) -> str:
        """A value as tables show it: percent with one decimal or a plain number with three; empty if not finite."""
        if not np.isfinite(value):
            return ""
        text = f"{100 * value:.1f}" if self.percent else f"{value:.3f}"
        if float(text) == 0:
            return text.lstrip("-")
        return f"+{text}" if signed and value > 0 else text

    def explained(self, tau: float, normalisation: Normalisation) -> str:
        """Its meaning, with the settings of the evaluation."""
        return self.meaning.replace("{tau}", f"{tau:g}").replace("{scaled}", SCALED[normalisation])


def _later(module: str, function: str) -> RadiologyScore:
    """A function of `metrics/`, imported when it is called: encoders need PyTorch, which takes seconds to import."""

    def compute(predictions: Texts, references: Texts, folder: Path | None) -> Scores:
        return getattr(import_module(f"a3tune.metrics.{module}"), function)(predictions, references, folder)

    return compute


METRICS: dict[str, Metric] = {
    "open_recall": Metric(
        "Open recall",
        "Share of the words of the reference answer that stand in the model's answer, averaged over the open "
        "questions. Both are lower-cased, without punctuation and articles, number words as digits (as LLaVA-Med).",
        vqa.of_type("open", vqa.open_recall),
        plain="words of the right answer that are said",
    ),
    "open_recall_clipped": Metric(
        "Open recall (clipped)",
        "Open recall in which no word counts more often than it stands in the reference answer.",
        vqa.of_type("open", partial(vqa.open_recall, clipped=True)),
        main=False,
    ),
    "closed_accuracy": Metric(
        "Closed accuracy",
        "Share of the yes/no questions that are answered right.",
        vqa.published_closed,
        plain="yes/no questions answered right",
    ),
    "closed_accuracy_strict": Metric(
        "Closed accuracy (strict)",
        "Share of the closed questions whose answer's first yes or no is the right one; a reference answer that is "
        "neither must stand in the answer as whole words.",
        vqa.of_type("closed", partial(vqa.closed_accuracy, mode="strict")),
        main=False,
    ),
    "choice_accuracy": Metric(
        "Choice accuracy",
        "Share of the multiple-choice questions whose answer is most like the right option.",
        vqa.published_choice,
        plain="multiple-choice questions answered right",
    ),
    "choice_accuracy_strict": Metric(
        "Choice accuracy (strict)",
        "Share of the multiple-choice questions whose answer holds the right option.",
        vqa.of_type("choice", partial(vqa.closed_accuracy, mode="strict")),
    ),
    "hallucination": Metric(
        "Hallucination",
        'Share of the closed questions with the answer "no" that are answered "yes"; the lower the better.',
        vqa.hallucination,
        lower_is_better=True,
        by_question=False,
        plain="findings claimed that are not there",
    ),
    "bleu": Metric("BLEU", "Sentence BLEU-4 of the reports (smoothing method 4), averaged.", bleu, "radiology"),
    "rouge_l": Metric("ROUGE-L", "F1 of the longest common subsequence of words, stemmed.", rouge_l, "radiology"),
    "meteor": Metric(
        "METEOR", "Matched words, stems and synonyms, with a penalty for broken order.", meteor, "radiology"
    ),
    "bertscore": Metric(
        "BERTScore",
        "F1 of the best cosine match of each token's RoBERTa features.",
        _later("bertscore", "bert_score"),
        "radiology",
    ),
    "chexbert": Metric(
        "CheXbert",
        "Cosine similarity of CheXbert's features of both reports.",
        _later("chexbert", "chexbert"),
        "radiology",
    ),
    "radgraph": Metric(
        "RadGraph",
        "Mean F1 of the entities and of the relations that RadGraph finds.",
        _later("radgraph", "radgraph"),
        "radiology",
    ),
    "radgraph_simple": Metric(
        "RadGraph (entities)", "F1 of the entities that RadGraph finds: words and label.", None, "radiology", main=False
    ),
    "radgraph_partial": Metric(
        "RadGraph (partial)",
        "F1 of the entities that RadGraph finds, where also having relations or none must agree.",
        None,
        "radiology",
        main=False,
    ),
    "radgraph_complete": Metric(
        "RadGraph (complete)",
        "F1 of the entities that RadGraph finds, where also their relations must agree.",
        None,
        "radiology",
        main=False,
    ),
    "ratescore": Metric(
        "RaTEScore",
        "Similarity of the medical entities of both reports.",
        _later("ratescore", "ratescore"),
        "radiology",
    ),
    "coverage": Metric(
        "Coverage",
        "Share of the true region on which the attention, {scaled}, is at least {tau}; averaged over the questions "
        "with a true region. A map that is bright everywhere covers everything: read it with the attention mass.",
        lambda map_BN, region_BN, tau, how: attention.coverage(map_BN, region_BN, tau=tau, normalisation=how),
        "attention",
        plain="part of the right region that is looked at",
    ),
    "intensity": Metric(
        "Intensity",
        "Mean attention inside the true region, {scaled}; averaged over the questions with a true region.",
        lambda map_BN, region_BN, tau, how: attention.intensity(map_BN, region_BN, normalisation=how),
        "attention",
        percent=False,
        plain="brightness of the attention in the right region",
    ),
    "attention_mass": Metric(
        "Attention mass",
        "Of all attention on the image, the share that falls inside the true region. Even attention gives the region's "
        "share of the image.",
        lambda map_BN, region_BN, tau, how: attention.attention_mass(map_BN, region_BN),
        "attention",
        plain="attention that falls inside the right region",
    ),
    "pointing": Metric(
        "Pointing",
        "How often the patch with the most attention lies inside the true region (the pointing game).",
        lambda map_BN, region_BN, tau, how: attention.pointing(map_BN, region_BN),
        "attention",
        plain="images where the brightest spot is inside the right region",
    ),
    "patch_auroc": Metric(
        "Patch AUROC",
        "Probability that a patch of the true region gets more attention than one outside it; 0.5 is chance.",
        lambda map_BN, region_BN, tau, how: attention.patch_auroc(map_BN, region_BN),
        "attention",
        percent=False,
    ),
    "reliance_inside": Metric(
        "Reliance inside",
        "Share of the answers that change when the region is hidden, averaged over what stands in its place. Read it "
        "against reliance elsewhere: any change of an image changes some answers.",
        kind="reliance",
    ),
    "reliance_outside": Metric(
        "Reliance outside",
        "Share of the answers that change when all but the region is hidden; the lower, the more the region is enough.",
        kind="reliance",
        lower_is_better=True,
    ),
    "reliance_elsewhere": Metric(
        "Reliance elsewhere",
        "Share of the answers that change when as much of the image is hidden where the region is not: the control.",
        kind="reliance",
        lower_is_better=True,
    ),
    "deletion_gain": Metric(
        "Deletion gain",
        "How much faster the answer loses its log-probability when image tokens are hidden by attention, the most "
        "attended first, than when as many are hidden at random: the area between both curves, nats per token. 0: the "
        "map is no better than chance.",
        kind="reliance",
        percent=False,
    ),
    "reliance_margin": Metric(
        "Reliance margin",
        "Reliance inside less reliance elsewhere, of the questions that have both.",
        kind="reliance",
        main=False,
    ),
    "accuracy_intact": Metric(
        "Accuracy, nothing hidden",
        "Open recall, closed or choice accuracy, as the question has it, averaged over the questions with a region.",
        kind="reliance",
        main=False,
    ),
    "accuracy_inside_hidden": Metric(
        "Accuracy, region hidden",
        "Accuracy of the same questions when the region is hidden.",
        kind="reliance",
        main=False,
    ),
    "accuracy_outside_hidden": Metric(
        "Accuracy, all but the region hidden",
        "Accuracy of the same questions when all but the region is hidden.",
        kind="reliance",
        main=False,
    ),
    "accuracy_elsewhere_hidden": Metric(
        "Accuracy, elsewhere hidden",
        "Accuracy of the same questions when as much is hidden where the region is not.",
        kind="reliance",
        main=False,
    ),
    "deletion_attention": Metric(
        "Deletion by attention",
        "Log-probability that the answer loses, averaged over the shares of image tokens hidden, the most attended "
        "first; nats per token.",
        kind="reliance",
        percent=False,
        main=False,
    ),
    "deletion_random": Metric(
        "Deletion at random",
        "Log-probability that the answer loses when as many image tokens are hidden at random; nats per token.",
        kind="reliance",
        percent=False,
        lower_is_better=True,
        main=False,
    ),
}
"""By name, in the order in which tables show them; those of radiology reports as in the paper's Table 3.

`METRICS["mine"] = Metric("Mine", "What it is.", mine)` is all that a metric of one's own needs.
"""


def describe(name: str) -> Metric:
    """What is known of a metric: its entry, that of a form of it (all heads, one filling), or no more than its name.

    Scores on disk may be of a metric that only the program which made them knew.
    """
    if name in METRICS:
        return METRICS[name]
    for suffix, kind, form, meaning in _FORMS:
        known = METRICS.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if known is not None and known.kind == kind:
            title = f"{known.title} ({form})"
            return replace(known, title=title, meaning=f"{meaning}: {known.meaning}", compute=None, main=False)
    meaning = "Not known to this program: it stands in the predictions, as whoever evaluated them named it."
    return Metric(name, meaning, kind="unknown", percent=False, main=False)


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once: in the order of the catalogue, then their other forms, then those that it does not know."""
    given = set(names)
    forms = (name + suffix for suffix, *_ in _FORMS for name in METRICS)
    known = [name for name in (*METRICS, *forms) if name in given]
    return known + sorted(given.difference(known))


def computed(kind: Kind) -> dict[str, Callable[..., Any]]:
    """By name, the functions of all metrics of a kind that are computed on their own."""
    return {
        name: metric.compute for name, metric in METRICS.items() if metric.kind == kind and metric.compute is not None
    }


def answer_scores(
    prediction: str, answer: str, answer_type: AnswerType, options: Sequence[str] = ()
) -> dict[str, float]:
    """Every score of an answer that its question has, by name; radiology reports have none of these."""
    scores = {name: score(prediction, answer, answer_type, options) for name, score in computed("answer").items()}
    return {name: value for name, value in scores.items() if value is not None}


def right(prediction: Prediction, text: str | None = None) -> float | None:
    """How right its answer is, or `text` in the place of its answer: the first score that its question has.

    That is open recall, closed or choice accuracy: 0 is wrong, 1 right. None for a radiology report.
    """
    said = prediction.prediction if text is None else text
    scores = answer_scores(said, prediction.answer, prediction.answer_type, prediction.options)
    return next(iter(scores.values()), None)


def attention_metrics(
    map_BN: ArrayLike, region_BN: ArrayLike, *, tau: float = 0.15, normalisation: Normalisation = "max"
) -> dict[str, Array]:
    """All metrics of attention by name, each float64 [B]; the arguments are those of `metrics.attention`."""
    return {name: score(map_BN, region_BN, tau, normalisation) for name, score in computed("attention").items()}
