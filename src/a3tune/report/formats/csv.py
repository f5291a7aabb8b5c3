"""Tables as CSV for other programs: all scores, unrounded, one line for each class, result and metric."""

import csv
import io
import math
from collections.abc import Sequence

from a3tune.report.escape import spreadsheet
from a3tune.report.table import Change, Table

_COLUMNS = (
    *("class", "method", "metric", "mean", "low", "high", "count"),
    *("difference", "difference_low", "difference_high", "p", "significant"),
    *("passes", "seconds", "unlike"),
)
"""Intervals are of a mean, or a difference, alone; `p` is adjusted for all comparisons of its class. `unlike`: why the
methods cannot be compared in this metric."""


def as_csv(tables: Sequence[Table]) -> str:
    """All tables below one head. Further scores come after the main ones; nothing was tested about them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for table in tables:
        columns = (*table.main, *table.further)
        for row, column in ((row, column) for row in table.rows for column in columns):
            cell = row.cells[column.name]
            estimate, change = cell.estimate, cell.change
            writer.writerow(
                [spreadsheet(table.title), spreadsheet(row.title), spreadsheet(column.name)]
                + [*_numbers(estimate.mean, estimate.low, estimate.high), estimate.count]
                + (["", "", "", "", ""] if change is None else _compared(change))
                + (["", ""] if row.cost is None else [row.cost.passes, row.cost.answer_seconds])
                + [spreadsheet(column.unlike)]
            )
    return text.getvalue()


def _compared(change: Change) -> list[object]:
    difference, p = change.comparison.difference, change.comparison.p
    values = _numbers(difference.mean, difference.low, difference.high, math.nan if p is None else p)
    return [*values, "no" if change.direction == "same" else "yes"]


def _numbers(*values: float) -> list[object]:
    """Nothing where there is no number."""
    return [value if math.isfinite(value) else "" for value in values]
