"""Tables as Markdown, for terminals and pages: the main columns, what answering took, and a legend."""

from collections.abc import Sequence

from a3tune.report.escape import markdown
from a3tune.report.table import Cell, Row, Table

LEGEND = (
    "Best bold, second underlined; 95 % bootstrap intervals over images or patients, of each mean alone, not "
    "adjusted; * differs from {reference} question by question (paired permutation test, Holm-adjusted over all "
    "comparisons of this table, p < .05). Passes and seconds of answering are relative to {reference}."
)
_NOTHING = "-"
_EMPHASIS = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}


def as_markdown(tables: Sequence[Table]) -> str:
    """Each table under the name of its class of questions."""
    return "\n".join((f"### {markdown(table.title)}\n\n" if table.title else "") + _one(table) for table in tables)


def _one(table: Table) -> str:
    head = ["Method", *(markdown(column.metric.title) for column in table.main), "Passes", "Seconds"]
    lines = [head, ["---"] * len(head), *(_line(table, row) for row in table.rows)]
    legend = LEGEND.format(reference=markdown(table.reference)).replace("*", "&ast;")
    legend += f" {markdown(table.note)}" if table.note else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{legend}\n"


def _line(table: Table, row: Row) -> list[str]:
    scores = [_cell(row.cells[column.name]) for column in table.main]
    return [markdown(row.title), *scores, *(text or _NOTHING for text in row.relative)]


def _cell(cell: Cell) -> str:
    if not cell.text:
        return _NOTHING
    return f"{_EMPHASIS[cell.rank].format(cell.text)}{'&ast;' if cell.significant else ''} {cell.interval}"
