"""Compared results as one table: which columns, how numbers are rounded, who is best, what differs significantly.

Built once; `formats/` and `html` write it down. Knows no markup.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from a3tune.evaluation.predictions import Cost
from a3tune.metrics.catalogue import Kind, Metric, describe, in_order
from a3tune.metrics.stats import Estimate
from a3tune.report.records import Comparison, RunResult

FORMATS = (".md", ".tex", ".csv")
"""Ends of the file names that say how a table is written (`formats.written`)."""
NO_INTERVAL = "no interval"
_NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True, slots=True)
class Change:
    """A result minus that of the reference, on the same questions."""

    comparison: Comparison
    text: str
    """The mean as shown, with its sign."""
    interval: str
    """Of this difference alone, as shown."""
    p: str
    """As shown, adjusted for the number of comparisons; empty if nothing was tested."""
    direction: Literal["higher", "lower", "same"]
    """`same`: no significant difference."""
    good: bool
    """A significant difference to the better."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A score of a result."""

    estimate: Estimate
    text: str = ""
    """The mean as shown; empty if there is none."""
    interval: str = ""
    """`[low, high]` as shown."""
    rank: int = 0
    """1 is best, 2 second, as shown: equal numbers share a rank. 0: neither, all numbers are equal, or nobody
    knows which way is better."""
    change: Change | None = None
    """None: nothing was compared, as with the reference itself."""

    @property
    def significant(self) -> bool:
        """Whether it differs from the reference."""
        return self.change is not None and self.change.direction != "same"


@dataclass(frozen=True, slots=True)
class Column:
    """A metric that at least one result has."""

    name: str
    metric: Metric
    unlike: str = ""
    """Why the results cannot be compared in it; empty if they can."""


@dataclass(frozen=True, slots=True)
class Row:
    """A result."""

    name: str
    title: str
    cells: Mapping[str, Cell]
    """By name of the column, each column of the table."""
    cost: Cost | None = None
    relative: tuple[str, str] = ("", "")
    """Passes and seconds of answering over those of the reference, as shown; empty where nothing was counted."""


@dataclass(frozen=True, slots=True)
class Table:
    """Results as rows, metrics as columns."""

    title: str
    """Class of questions; empty for all of them."""
    reference: str
    """Title of the result that the others are compared with."""
    main: tuple[Column, ...]
    further: tuple[Column, ...]
    """Scores that are not tested, and those of metrics that nobody here knows."""
    rows: tuple[Row, ...] = field(default_factory=tuple)
    note: str = ""
    """A sentence below it."""


def comparison_table(
    results: Sequence[RunResult],
    reference: str,
    *,
    title: str = "",
    costs: Mapping[str, Cost] | None = None,
    note: str = "",
    unlike: Mapping[Kind, str] | None = None,
) -> Table:
    """The table of results compared with `reference`, the name of one of them; metrics that none has are left out.

    `costs` are those of answering all questions, by name of the result; `unlike` are the kinds of metrics that the
    results measured in different ways, and in which, so that nobody is best in them.
    """
    reasons = unlike or {}
    names = in_order(name for result in results for name, score in result.scores.items() if math.isfinite(score.mean))
    columns = [Column(name, describe(name), reasons.get(describe(name).kind, "")) for name in names]
    cells = {
        name: ranked_cells(
            name,
            [result.scores.get(name) for result in results],
            [result.differences.get(name) for result in results],
            rank=describe(name).kind not in reasons,
        )
        for name in names
    }
    rows = [
        Row(
            result.name,
            result.title,
            {name: cells[name][index] for name in names},
            costs[result.name] if costs else None,
            _relative(costs[result.name], costs[reference]) if costs else ("", ""),
        )
        for index, result in enumerate(results)
    ]
    return Table(
        title,
        next(result.title for result in results if result.name == reference),
        tuple(column for column in columns if column.metric.main),
        tuple(column for column in columns if not column.metric.main),
        tuple(rows),
        note,
    )


def ranked_cells(
    name: str,
    estimates: Sequence[Estimate | None],
    comparisons: Sequence[Comparison | None] | None = None,
    *,
    rank: bool = True,
) -> list[Cell]:
    """Estimates of one metric as cells, ranked among each other; None and NaN are cells without a number."""
    metric = describe(name)
    texts = ["" if estimate is None else metric.text(estimate.mean) for estimate in estimates]
    distinct = sorted({float(text) for text in texts if text}, reverse=not metric.lower_is_better)
    ranked = rank and len(distinct) > 1 and metric.kind != "unknown"
    ranks = dict(zip(distinct, (1, 2), strict=False)) if ranked else {}
    changes = [_change(metric, comparison) for comparison in comparisons or [None] * len(estimates)]
    return [
        Cell(estimate, text, interval_text(metric, estimate), ranks.get(float(text), 0), change)
        if estimate is not None and text
        else Cell(_NO_ESTIMATE, change=change)
        for estimate, text, change in zip(estimates, texts, changes, strict=True)
    ]


def _change(metric: Metric, comparison: Comparison | None) -> Change | None:
    if comparison is None or not math.isfinite(comparison.difference.mean):
        return None
    difference = comparison.difference
    higher = difference.mean > 0
    direction = ("higher" if higher else "lower") if comparison.significant else "same"
    good = direction != "same" and higher != metric.lower_is_better
    text, interval = metric.text(difference.mean, signed=True), interval_text(metric, difference)
    return Change(comparison, text, interval, _p_text(comparison.p), direction, good)


def _p_text(p: float | None) -> str:
    """Such as `p = .043`; never rounded over the level of .05."""
    if p is None or not math.isfinite(p):
        return ""
    if p < 0.001:
        return "p < .001"
    shown = math.floor(1000 * p) / 1000 if p < 0.05 else p
    return f"p = {shown:.3f}".replace("= 0.", "= .")


def interval_text(metric: Metric, estimate: Estimate) -> str:
    """`[low, high]` as tables show it; `NO_INTERVAL` where there is none, as of one group alone."""
    low, high = metric.text(estimate.low), metric.text(estimate.high)
    return f"[{low}, {high}]" if low and high else NO_INTERVAL


def _relative(cost: Cost, reference: Cost) -> tuple[str, str]:
    def over(cost: float, reference: float) -> str:
        return f"{cost / reference:.2f}x" if reference else ""

    return over(cost.passes, reference.passes), over(cost.answer_seconds, reference.answer_seconds)
