"""Compared methods as one table in the paper's layout: Markdown, LaTeX or CSV.

Knows records and formats; reads no run.
"""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from a3tune.evaluation.predictions import Cost
from a3tune.metrics.stats import Estimate
from a3tune.report.escape import latex, markdown, spreadsheet
from a3tune.report.records import METRICS, MethodResult

FORMATS = (".md", ".tex", ".csv")
"""Ends of the file names that say how a table is written."""
_ESCAPE = {".md": markdown, ".tex": latex}
_MARK = "*"
_LEGEND = (
    "Best bold, second underlined; 95 % bootstrap intervals over images or patients; * differs from {reference} "
    "(paired permutation test, Holm-adjusted over all comparisons of this table, p < .05). Passes and seconds of "
    "answering are relative to {reference}."
)


def comparison_tables(
    classes: Mapping[str, Sequence[MethodResult]], costs: Mapping[str, Cost], reference: str, form: str = ".md"
) -> str:
    """A table for each class of questions (a modality, an organ): the methods as rows, what was measured as columns.

    Args:
        classes: name -> results of the methods (`gather.method_results`); metrics that none of them has are left out.
            The name "" is all questions, and has no heading.
        costs: by method name, of all questions.
        reference: the method that the others were compared with.
        form: one of `FORMATS`.
    """
    if form == ".csv":
        return _csv(classes, costs)
    heading = "% {}\n" if form == ".tex" else "### {}\n\n"
    tables = [
        (heading.format(_ESCAPE[form](name)) if name else "") + _table(methods, costs, reference, form)
        for name, methods in classes.items()
    ]
    return "\n".join(tables)


def _table(methods: Sequence[MethodResult], costs: Mapping[str, Cost], reference: str, form: str) -> str:
    metrics = _metrics(methods)
    titles = ["Method", *(METRICS[name].title for name in metrics), "Passes", "Seconds"]
    emphasis = {name: _ranks([_goodness(method, name) for method in methods]) for name in metrics}
    rows = [
        [
            _ESCAPE[form](method.title),
            *(_cell(method, name, emphasis[name][row], form) for name in metrics),
            *_relative(costs[method.name], costs[reference]),
        ]
        for row, method in enumerate(methods)
    ]
    title = next(method.title for method in methods if method.name == reference)
    legend = _LEGEND.format(reference=_ESCAPE[form](title))
    return _latex(titles, rows, legend) if form == ".tex" else _markdown(titles, rows, legend)


def _metrics(methods: Sequence[MethodResult]) -> list[str]:
    return [name for name in METRICS if any(np.isfinite(_mean(method, name)) for method in methods)]


def _mean(method: MethodResult, metric: str) -> float:
    return method.scores[metric].mean if metric in method.scores else float("nan")


def _goodness(method: MethodResult, metric: str) -> float:
    return -_mean(method, metric) if METRICS[metric].lower_is_better else _mean(method, metric)


def _ranks(values: Sequence[float]) -> list[int]:
    """1 for the best values, 2 for the next, 0 for the rest; equal values (as shown) share a rank."""
    shown = [round(value, 3) for value in values]
    best = sorted({value for value in shown if np.isfinite(value)}, reverse=True)[:2]
    return [best.index(value) + 1 if value in best else 0 for value in shown]


def _cell(method: MethodResult, metric: str, rank: int, form: str) -> str:
    found = method.scores.get(metric)
    if found is None or not np.isfinite(found.mean):
        return "-"
    scale, digits = (100, 1) if METRICS[metric].percent else (1, 3)
    mean = f"{scale * found.mean:.{digits}f}"
    difference = method.differences.get(metric)
    mark = _MARK if difference is not None and difference.significant else ""
    interval = f"[{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"
    if form == ".tex":
        mean = {1: rf"\textbf{{{mean}}}", 2: rf"\underline{{{mean}}}"}.get(rank, mean)
        return rf"{mean}{mark} {{\scriptsize {interval}}}"
    mean = {1: f"**{mean}**", 2: f"<u>{mean}</u>"}.get(rank, mean)
    return f"{mean}{mark.replace(_MARK, '&ast;')} {interval}"


def _relative(cost: Cost, reference: Cost) -> list[str]:
    pairs = ((cost.passes, reference.passes), (cost.answer_seconds, reference.answer_seconds))
    return [f"{own / other:.2f}x" if other else "-" for own, other in pairs]


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], legend: str) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{legend.replace('*', '&ast;')}\n"


def _latex(titles: Sequence[str], rows: Sequence[Sequence[str]], legend: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'c' * (len(titles) - 1)}}}",
            r"\toprule",
            line(titles),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            f"% {legend}",
            "",
        ]
    )


def _csv(classes: Mapping[str, Sequence[MethodResult]], costs: Mapping[str, Cost]) -> str:
    """One line per class, method and metric, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["class", "method", "metric", "mean", "low", "high", "count", "difference", "p", "passes", "seconds"]
    writer.writerow(columns)
    for own, method in ((own, method) for own, methods in classes.items() for method in methods):
        for name in _metrics(classes[own]):
            found = method.scores.get(name, Estimate(float("nan"), float("nan"), float("nan"), 0))
            compared = method.differences.get(name)
            cost = costs[method.name]
            writer.writerow(
                [spreadsheet(own), spreadsheet(method.title), name, found.mean, found.low, found.high, found.count]
                + (["", ""] if compared is None else [compared.difference.mean, compared.p])
                + [cost.passes, cost.answer_seconds]
            )
    return text.getvalue()
