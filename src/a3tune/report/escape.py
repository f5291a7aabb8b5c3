"""Names that others chose, as text of Markdown, LaTeX and CSV: none of these takes it for markup or for a formula."""

from a3tune.text import one_line

_LATEX = {ord(character): rf"\{character}" for character in "&%$#_{}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
}
_FORMULA = ("=", "+", "-", "@")


def markdown(text: str) -> str:
    """For a paragraph or a cell: no HTML, link, picture, code or end of the cell."""
    escaped = one_line(text).replace("\\", "\\\\").replace("|", r"\|").replace("](", r"]\(").replace("`", "'")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def latex(text: str) -> str:
    """For text outside of mathematics."""
    return one_line(text).translate(_LATEX)


def spreadsheet(text: str) -> str:
    """For a cell of CSV: what a spreadsheet would compute gets an apostrophe in front."""
    line = one_line(text)
    return f"'{line}" if line.startswith(_FORMULA) else line
