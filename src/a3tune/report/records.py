"""What a report is made of: frozen records that the pipeline fills in, and the names of everything in them.

Nothing here holds a path, a patient or a sample's id, so nothing of them can reach the page.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from a3tune.metrics.attention import Normalisation
from a3tune.metrics.stats import Estimate


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is called and shown."""

    title: str
    percent: bool
    """Shown times 100, with a % sign in running text."""
    meaning: str
    """The formula in words; `{tau}` and `{scaled}` are filled in."""
    lower_is_better: bool = False


METRICS = {
    "open_recall": Metric(
        "Open recall",
        True,
        "Share of the words of the reference answer that stand in the model's answer, averaged over the open "
        "questions. Both are lower-cased, without punctuation and articles, number words as digits (as LLaVA-Med).",
    ),
    "closed_accuracy": Metric("Closed accuracy", True, "Share of the yes/no questions that are answered right."),
    "choice_accuracy": Metric(
        "Choice accuracy", True, "Share of the multiple-choice questions whose answer is most like the right option."
    ),
    "choice_accuracy_strict": Metric(
        "Choice accuracy (strict)", True, "Share of the multiple-choice questions whose answer holds the right option."
    ),
    "hallucination": Metric(
        "Hallucination",
        True,
        'Share of the closed questions with the answer "no" that are answered "yes"; the lower the better.',
        lower_is_better=True,
    ),
    "bleu": Metric("BLEU", True, "Sentence BLEU-4 of the reports (smoothing method 4), averaged."),
    "rouge_l": Metric("ROUGE-L", True, "F1 of the longest common subsequence of words, stemmed."),
    "meteor": Metric("METEOR", True, "Matched words, stems and synonyms, with a penalty for broken order."),
    "bertscore": Metric("BERTScore", True, "F1 of the best cosine match of each token's RoBERTa features."),
    "chexbert": Metric("CheXbert", True, "Cosine similarity of CheXbert's features of both reports."),
    "radgraph": Metric("RadGraph", True, "Mean F1 of the entities and of the relations that RadGraph finds."),
    "ratescore": Metric("RaTEScore", True, "Similarity of the medical entities of both reports."),
    "coverage": Metric(
        "Coverage",
        True,
        "Share of the true region on which the attention, {scaled}, is at least {tau}; averaged over the questions "
        "with a true region. A map that is bright everywhere covers everything: read it with the attention mass.",
    ),
    "intensity": Metric(
        "Intensity",
        False,
        "Mean attention inside the true region, {scaled}; averaged over the questions with a true region.",
    ),
    "attention_mass": Metric(
        "Attention mass",
        True,
        "Of all attention on the image, the share that falls inside the true region. Even attention gives the region's "
        "share of the image.",
    ),
    "pointing": Metric(
        "Pointing", True, "How often the patch with the most attention lies inside the true region (the pointing game)."
    ),
    "patch_auroc": Metric(
        "Patch AUROC",
        False,
        "Probability that a patch of the true region gets more attention than one outside it; 0.5 is chance.",
    ),
}
"""Metrics that the page knows, in the order in which it shows them."""

ANSWERS = ("open_recall", "closed_accuracy", "choice_accuracy", "choice_accuracy_strict")
"""Metrics that are broken down by question type, modality and organ."""

CURVES = {
    "loss_llm": "Answer loss L_LLM",
    "loss_align": "Alignment loss L_align",
    "attention_inside": "Attention inside its own labels",
    "heads_overlap": "Heads kept from pass to pass",
}
"""Lines of `metrics.jsonl` that are drawn, and their titles."""

SCALED: dict[Normalisation, str] = {
    "max": "divided by its largest value",
    "sum": "divided by its sum",
    "min-max": "stretched to the range 0 to 1",
}
"""What happened to a map before Coverage and Intensity, in words."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method minus the reference method, on the same questions."""

    difference: Estimate
    p: float | None = None
    """Two-sided, of a paired test, adjusted for the number of comparisons; None if there was no test."""

    @property
    def significant(self) -> bool:
        """The interval of the difference leaves out 0, and so does the test if there is one. NaN is not significant."""
        apart = self.difference.low > 0 or self.difference.high < 0
        return apart and (self.p is None or self.p < 0.05)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A logged value over the optimiser steps."""

    steps: np.ndarray
    """int [n], rising."""
    values: np.ndarray
    """float [n]."""


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """How a router shares the work among its experts."""

    use: tuple[float, ...]
    """Mean use of each expert over layers; sums to 1."""
    entropy: float
    """Of the gate, nats."""


@dataclass(frozen=True, slots=True, eq=False)
class MethodResult:
    """One column of every comparison: a model, or a baseline without one."""

    name: str
    title: str
    scores: Mapping[str, Estimate]
    """By metric, see `METRICS`; in the metric's own unit (shares, not percent)."""
    differences: Mapping[str, Comparison] = field(default_factory=dict)
    """By metric, against `ReportData.reference`; empty for the reference itself."""
    breakdown: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(default_factory=dict)
    """By field (`question_type`, `modality`, ...) and its value: scores of answers by metric, see `ANSWERS`."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By name, see `CURVES`; empty for a model that was not trained."""
    experts: Mapping[Literal["query", "key"], ExpertUse] = field(default_factory=dict)
    head_share: np.ndarray | None = None
    """float [L, H]: share of the logged steps in which a head was selected."""


@dataclass(frozen=True, slots=True)
class LabelScores:
    """How well weak labels find the true regions; the mean over `count` questions."""

    recall_at_k: float
    mean_best_iou: float
    ceiling: float
    """Recall with all proposed segments in place of the best K: what ranking alone could reach."""
    count: int


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """Weak labels against the true regions."""

    top_k: int
    iou_threshold: float
    """A region counts as found if a label overlaps it by at least this intersection over union."""
    overall: LabelScores
    by_body: Mapping[str, LabelScores] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """How one method answered a case, and where it looked."""

    title: str
    answer: str
    score: float
    """In [0, 1]: 1 is right, 0 is wrong."""
    heat: np.ndarray
    """float [H, W] >= 0: attention laid on the image's pixels (`vlm.patches.paint`)."""
    mass: float
    """Share of the attention inside the true region."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One question, side by side."""

    image: np.ndarray
    """uint8 [H, W] or [H, W, 3]."""
    prompt: str
    answer: str
    region: np.ndarray
    """bool [H, W]: the true region."""
    labels: tuple[np.ndarray, ...]
    """bool [H, W] each: the weak labels, best first."""
    views: tuple[View, ...]
    reason: str
    """Why this case is shown."""
    tags: tuple[str, ...] = ()
    """Words such as modality, body part, question type."""


@dataclass(frozen=True, slots=True)
class Cases:
    """The cases of a page and the rule that chose them."""

    rule: str
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """Everything on the page."""

    title: str
    methods: tuple[MethodResult, ...]
    """Best read in the order base, LoRA, A3Tune."""
    reference: str
    """Name of the method that the others are compared with."""
    counts: Mapping[str, int]
    """Such as questions, images and patients, for the summary: name -> number in the test set."""
    seeds: int
    """Training runs behind each number."""
    command: str
    """That makes the page again; paths in it are shortened (`public_command`)."""
    settings: Mapping[str, str]
    """See `public_settings`."""
    seconds: Mapping[str, float]
    """Wall-clock time by stage."""
    tau: float
    normalisation: Normalisation
    question_only: MethodResult | None = None
    """Answers without the image; only the metrics of answers."""
    labels: LabelQuality | None = None
    cases: Cases | None = None
    synthetic: bool = False
    """The scans are phantoms."""
    notes: tuple[str, ...] = ()
    """Further limits and remarks, one sentence or more each."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and hardware, without names of hosts and users."""


def curves_from_log(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curves of `CURVES` in the lines of `metrics.jsonl`; one that was never logged is missing."""
    logged = [line for line in lines if "step" in line]
    found: dict[str, Curve] = {}
    for name in CURVES:
        points = [(line["step"], line[name]) for line in logged if line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            found[name] = Curve(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
    return found


def heads_from_log(lines: Iterable[Mapping[str, Any]]) -> np.ndarray | None:
    """Share of the logged steps in which each head was aligned, float [L, H]; None if the run aligned nothing."""
    selected = [[list(map(int, row)) for row in line["heads_selected"]] for line in lines if "heads_selected" in line]
    return np.mean(selected, axis=0) if selected else None


def experts_from_log(lines: Iterable[Mapping[str, Any]]) -> dict[Literal["query", "key"], ExpertUse]:
    """The experts' use in the last line of `metrics.jsonl` that holds it."""
    found: dict[Literal["query", "key"], ExpertUse] = {}
    for line in lines:
        for kind in ("query", "key"):
            if f"{kind}_use" in line:
                found[kind] = ExpertUse(tuple(line[f"{kind}_use"]), line[f"{kind}_entropy"])
    return found


def public_command(command: str) -> str:
    """A command line whose paths are cut down to their last part."""
    return re.sub(r"[^\s=\"']*/([^\s/\"']*)", r"…/\1", command)
