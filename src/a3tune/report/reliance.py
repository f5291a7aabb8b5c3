"""What answers rest on, as the page shows it: a sentence and a row for each run, and charts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from a3tune.metrics.catalogue import describe
from a3tune.report import figures
from a3tune.report.records import RunResult
from a3tune.report.summary import number, typographic
from a3tune.report.table import Cell, Column, interval_text, ranked_cells

_HIDDEN = {"inside": "region", "elsewhere": "elsewhere", "outside": "all else"}
_COLUMNS = ("accuracy_intact", *(f"accuracy_{part}_hidden" for part in _HIDDEN), "reliance_margin")


@dataclass(frozen=True, slots=True)
class RelianceRow:
    """Accuracy of one run with parts of the images hidden."""

    name: str
    title: str
    count: int
    """Questions with a region."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Reliance:
    """The section."""

    sentences: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[RelianceRow, ...]
    count: int
    """Questions of every run; 0: they differ."""
    bars: Markup
    curves: tuple[tuple[str, Markup], ...]
    """Title of a run, and its deletion curves."""


def reliance(results: Sequence[RunResult]) -> Reliance | None:
    """Of the runs that were asked with parts of the images hidden; None if none was."""
    measured = [result for result in results if "reliance_inside" in result.scores]
    if not measured:
        return None
    shown = [name for name in _COLUMNS if any(name in result.scores for result in measured)]
    cells = {name: ranked_cells(name, [result.scores.get(name) for result in measured], rank=False) for name in shown}
    rows = [
        RelianceRow(
            result.name,
            result.title,
            result.scores["reliance_inside"].count,
            tuple(cells[name][index] for name in shown),
        )
        for index, result in enumerate(measured)
    ]
    return Reliance(
        tuple(map(_sentence, measured)),
        tuple(Column(name, describe(name)) for name in shown),
        tuple(rows),
        rows[0].count if len({row.count for row in rows}) == 1 else 0,
        _bars(results),
        tuple(_curves(results)),
    )


def _sentence(result: RunResult) -> str:
    """How often answers change, and whether the region matters more than a place like it."""

    def changed(part: str) -> str:
        name = f"reliance_{part}"
        return number(result.scores[name].mean, name)

    rest = f"Hiding all but the region changes {changed('outside')} %."
    told = f"{result.title}: hiding the region changes {changed('inside')} % of the answers"
    margin = result.scores.get("reliance_margin")
    if margin is None:
        return f"{told}; no place as large was free elsewhere, so that there is no control. {rest}"
    mean = number(margin.mean, "reliance_margin")
    interval = typographic(interval_text(describe("reliance_margin"), margin))
    if margin.low > 0:
        verdict = "the answers rest on the regions more than on places like them"
    elif margin.high < 0:
        verdict = "the answers rest on other places more than on the regions"
    else:
        verdict = "nothing that could not be chance"
    if margin.count < result.scores["reliance_inside"].count:
        # Of fewer questions: the region's share of these is what the difference is from.
        inside = number(result.scores["reliance_elsewhere"].mean + margin.mean, "reliance_inside")
        told = f"{told}; of the {margin.count} with a place as large elsewhere it changes {inside} %"
    return (
        f"{told}, hiding as much elsewhere {changed('elsewhere')} %. The difference of {mean} {interval} says: "
        f"{verdict}. {rest}"
    )


def _bars(results: Sequence[RunResult]) -> Markup:
    groups = [(title, [result.scores.get(f"reliance_{part}") for result in results]) for part, title in _HIDDEN.items()]
    spoken = "; ".join(
        f"{title} hidden: "
        + ", ".join(
            f"{result.title} {number(estimate.mean, 'reliance_inside')} %"
            for result, estimate in zip(results, estimates, strict=True)
            if estimate is not None
        )
        for title, estimates in groups
    )
    return figures.group_chart(groups, f"Share of the answers that change: {spoken}")


def _curves(results: Sequence[RunResult]) -> list[tuple[str, Markup]]:
    charts = []
    for slot, result in enumerate(results):
        if not result.deletion:
            continue
        by_attention, at_random = result.deletion["attention"], result.deletion["random"]
        half = " and at random ".join(f"{_middle(curve.values):.2f}" for curve in (by_attention, at_random))
        alt = (
            f"{result.title}: mean log-probability of the answer's tokens, {by_attention.values[0]:.2f} with no image "
            f"token hidden, {by_attention.values[-1]:.2f} with all; with half of them hidden by attention {half}"
        )
        chart = figures.curve_chart([(slot, by_attention)], alt, across="% of image tokens hidden", thin=[at_random])
        charts.append((result.title, chart))
    return charts


def _middle(values: np.ndarray) -> float:
    return float(values[len(values) // 2])
