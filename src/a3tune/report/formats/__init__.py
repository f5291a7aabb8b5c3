"""`report.table.Table` -> text, one file for each format. What stands in a table and who is best is decided there."""

from collections.abc import Callable, Sequence

from a3tune.report.formats.csv import as_csv
from a3tune.report.formats.latex import as_latex
from a3tune.report.formats.markdown import as_markdown
from a3tune.report.table import FORMATS, Table

__all__ = ["FORMATS", "written"]
_WRITERS: dict[str, Callable[[Sequence[Table]], str]] = dict(zip(FORMATS, (as_markdown, as_latex, as_csv), strict=True))


def written(tables: Sequence[Table], form: str) -> str:
    """Tables, one for each class of questions, in one of `FORMATS`.

    Markdown and LaTeX hold the main columns, CSV all scores.
    """
    return _WRITERS[form](tables)
