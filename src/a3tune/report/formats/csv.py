"""Tables as CSV for other programs: all scores, unrounded, one line for each class, result and metric."""

import csv
import io
from collections.abc import Sequence

from a3tune.report.escape import spreadsheet
from a3tune.report.table import Table

_COLUMNS = ("class", "method", "metric", "mean", "low", "high", "count", "difference", "p", "passes", "seconds")


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
                + [estimate.mean, estimate.low, estimate.high, estimate.count]
                + (["", ""] if change is None else [change.comparison.difference.mean, change.comparison.p])
                + (["", ""] if row.cost is None else [row.cost.passes, row.cost.answer_seconds])
            )
    return text.getvalue()
