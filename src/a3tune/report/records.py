"""What a report is made of: frozen records that the pipeline fills in.

Nothing here holds a path, a patient or a sample's id, so nothing of them can reach the page.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from a3tune.metrics.attention import Normalisation
from a3tune.metrics.catalogue import Kind, describe
from a3tune.metrics.stats import Estimate
from a3tune.training.score import MEASURED, VALIDATION

CURVES = {
    "loss_llm": "Answer loss L_LLM",
    "loss_align": "Alignment loss L_align",
    "attention_inside": "Attention inside its own labels",
    "heads_overlap": "Heads kept from pass to pass",
}
"""Lines of `metrics.jsonl` that are drawn, and their titles."""


def validation_curve(name: str) -> str | None:
    """Title of the curve of what a validation measured, by its name in `metrics.jsonl`; None: it is not drawn."""
    measured = name.removeprefix(VALIDATION)
    if measured == name or (measured not in CURVES and describe(measured).kind not in MEASURED):
        return None
    return f"{CURVES.get(measured) or describe(measured).title}, validation"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run minus the reference run, on the same questions."""

    difference: Estimate
    """Its interval is of this difference alone: not adjusted."""
    p: float | None = None
    """Two-sided, of a paired test, adjusted for the number of comparisons; None if there was no test."""

    @property
    def significant(self) -> bool:
        """The interval of the difference leaves out 0, and a test, if there is one, agrees. NaN is not significant."""
        apart = self.difference.low > 0 or self.difference.high < 0
        return apart and (self.p is None or self.p < 0.05)


@dataclass(frozen=True, slots=True)
class RightAnswers:
    """What a run got right in one of several tests (`meta.test`)."""

    share: Estimate
    """Of right answers (`catalogue.right`), 0 to 1."""
    comparison: Comparison | None
    """With the reference; None for the reference itself."""


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
class RunResult:
    """What came out of an evaluated run, or of a baseline without a model: one row of every comparison."""

    name: str
    title: str
    scores: Mapping[str, Estimate]
    """By metric (`metrics.catalogue`), in the metric's own unit (shares, not percent)."""
    differences: Mapping[str, Comparison] = field(default_factory=dict)
    """By metric, against `ReportData.reference`; empty for the reference itself."""
    breakdown: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = field(default_factory=dict)
    """By field (`question_type`, `modality`, ...) and its value: scores of answers by metric."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By name, see `CURVES` and `validation_curve`; empty for a model that was not trained."""
    experts: Mapping[Literal["query", "key"], ExpertUse] = field(default_factory=dict)
    head_share: np.ndarray | None = None
    """float [L, H]: share of the logged steps in which a head was selected."""
    deletion: Mapping[Literal["attention", "random"], Curve] = field(default_factory=dict)
    """Mean log-probability of the answers over the image tokens hidden, in %, by order; empty if none was measured."""


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
    """How one run answered a case, and where it looked."""

    title: str
    answer: str
    right: float | None
    """How right: 0 is wrong, 1 is right; None for a report."""
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
    results: tuple[RunResult, ...]
    """Best read in the order base, LoRA, A3Tune."""
    reference: str
    """Name of the run that the others are compared with."""
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
    shown: str = ""
    """Name of the run that the page is about: its first sentence, its cases. Empty: the last."""
    tests: Mapping[str, Mapping[str, RightAnswers]] = field(default_factory=dict)
    """Title of a test, name of a run -> what it got right; empty where the questions name no tests."""
    question_only: RunResult | None = None
    """Answers without the image; only the metrics of answers."""
    labels: LabelQuality | None = None
    cases: Cases | None = None
    synthetic: bool = False
    """The scans are phantoms."""
    unlike: Mapping[Kind, str] = field(default_factory=dict)
    """Kinds of metrics that the runs measured in different ways, with a sentence that says in which: their scores are
    neither ranked nor tested."""
    notes: tuple[str, ...] = ()
    """Further limits and remarks, one sentence or more each."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and hardware, without names of hosts and users."""
