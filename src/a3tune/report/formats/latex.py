"""Tables as LaTeX with booktabs: the main columns, what answering took; the legend is a comment."""

from collections.abc import Sequence

from a3tune.report.escape import latex
from a3tune.report.formats.markdown import LEGEND
from a3tune.report.table import Cell, Row, Table

_NOTHING = "-"
_EMPHASIS = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}


def as_latex(tables: Sequence[Table]) -> str:
    """Each table after a comment with the name of its class of questions."""
    return "\n".join((f"% {latex(table.title)}\n" if table.title else "") + _one(table) for table in tables)


def _one(table: Table) -> str:
    head = ["Method", *(latex(column.metric.title) for column in table.main), "Passes", "Seconds"]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}",
            r"\toprule",
            _line(head),
            r"\midrule",
            *(_line(_cells(table, row)) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            f"% {LEGEND.format(reference=latex(table.reference))}",
            *([f"% {latex(table.note)}"] if table.note else []),
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cells(table: Table, row: Row) -> list[str]:
    scores = [_cell(row.cells[column.name]) for column in table.main]
    return [latex(row.title), *scores, *(text or _NOTHING for text in row.relative)]


def _cell(cell: Cell) -> str:
    if not cell.text:
        return _NOTHING
    mark = "*" if cell.significant else ""
    return rf"{_EMPHASIS[cell.rank].format(cell.text)}{mark} {{\scriptsize {cell.interval}}}"
