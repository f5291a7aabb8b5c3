"""`ReportData` -> one self-contained HTML page: no script, no network, everything from data escaped.

Knows which numbers stand where. Numbers and ranks are those of `table`, the layout is `report.html.j2` and
`report.css`, the charts `figures.py`, the sentences `summary.py`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from a3tune.metrics.catalogue import Kind, describe
from a3tune.report import figures
from a3tune.report.records import CURVES, Case, ReportData, RunResult, View, validation_curve
from a3tune.report.reliance import reliance
from a3tune.report.summary import NOTHING, by_test, glossary, headline, limits, summary, trust, typographic
from a3tune.report.table import Cell, Column, Row, Table, comparison_table, ranked_cells
from a3tune.text import visible

KINDS: dict[Kind, str] = {
    "answer": "Answers",
    "radiology": "Radiology reports",
    "attention": "Attention",
    "reliance": "Reliance",
    "unknown": "Others",
}
"""Titles of the tables: one for each kind of metrics, so that all columns have room."""
RIGHT = "accuracy_intact"
"""The metric that right answers of a test are written like."""
CASES_OPEN = 2
"""The other cases are folded away."""
EXPERT_KINDS = {"query": "Q-MoE: routed by the prompt", "key": "K-MoE: routed by each image token"}


@dataclass(frozen=True, slots=True)
class Group:
    """Columns of one kind, without those that are the same in every row."""

    title: str
    columns: tuple[Column, ...]
    same: tuple[tuple[str, Cell], ...]
    """Title and cell of the others."""
    changes: tuple[Row, ...]
    """Rows in which these columns are compared."""


@dataclass(frozen=True, slots=True)
class Test:
    """Right answers in one of several tests."""

    title: str
    chart: Markup
    cells: tuple[Cell, ...]
    """One for each run."""


@dataclass(frozen=True, slots=True)
class BreakdownRow:
    """Scores of one metric in one class of questions."""

    title: str
    """The class."""
    metric: str
    """Title of the metric."""
    count: int
    """Questions."""
    cells: tuple[Cell, ...]
    """One for each run, then that of the baseline, which takes no part in the ranking."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Answers by one field of the questions."""

    title: str
    rows: tuple[BreakdownRow, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    caption: str
    svg: Markup
    detail: str = ""


def render(data: ReportData) -> str:
    """The page, as text that UTF-8 can encode."""
    environment = Environment(
        loader=PackageLoader("a3tune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["typographic"] = typographic
    results, baseline = data.results, data.question_only
    table = comparison_table(results, data.reference, unlike=data.unlike)
    without_image = comparison_table([baseline], baseline.name) if baseline else None
    groups = tuple(_groups(table))
    page = environment.get_template("report.html.j2").render(
        data=data,
        command=public_command(data.command),
        headline=headline(data),
        by_test=by_test(data),
        trust=trust(data.seeds),
        summary=summary(data),
        table=table,
        tests=list(_tests(data)),
        groups=groups,
        slots={result.name: slot for slot, result in enumerate(results)},
        interval_figures=[
            _interval_figure(table, column, without_image) for group in groups for column in group.columns
        ],
        reliance=reliance(results),
        breakdowns=[_breakdown(data, name) for name in results[0].breakdown],
        tested=any(c.p is not None for result in results for c in result.differences.values()),
        curve_figures=list(_curve_figures(results, _training_curves(results))),
        validated=any(map(validation_curve, (name for result in results for name in result.curves))),
        trained=[slot for slot, result in enumerate(results) if result.curves],
        expert_figures=list(_expert_figures(results)),
        head_figures=list(_head_figures(results)),
        kept_figures=list(_curve_figures(results, ("heads_overlap",))),
        baseline=without_image,
        cases=[_case(position, case) for position, case in enumerate(data.cases.cases, 1)] if data.cases else [],
        cases_open=CASES_OPEN,
        settings=_grouped(data.settings),
        total=sum(data.seconds.values()),
        limits=limits(data),
        glossary=glossary(data.tau, data.normalisation, [column.name for column in (*table.main, *table.further)]),
        duration=duration,
        share=_share,
        key=figures.method_key,
    )
    # Rows of JSON may hold half of a surrogate pair, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def _visible(value: Any) -> Any:
    """What the page shows of anything: the text of charts, which is markup already, included."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def duration(seconds: float) -> str:
    """Such as `48 s`, `6 min 05 s` or `2 h 03 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def public_command(command: str) -> str:
    """A command line whose paths are cut down to their last part."""
    return re.sub(r"[^\s=\"']*/([^\s/\"']*)", r"…/\1", command)


def _groups(table: Table) -> Iterator[Group]:
    for kind, title in KINDS.items():
        columns = [column for column in table.main if column.metric.kind == kind]
        cells = {column.name: [row.cells[column.name] for row in table.rows] for column in columns}
        same = {name for name, own in cells.items() if len(own) > 1 and len({(c.text, c.interval) for c in own}) == 1}
        varying = tuple(column for column in columns if column.name not in same)
        changes = tuple(row for row in table.rows if any(row.cells[column.name].change for column in varying))
        if columns:
            alike = tuple((column.metric.heading, cells[column.name][0]) for column in columns if column.name in same)
            yield Group(title, varying, alike, changes)


def _tests(data: ReportData) -> Iterator[Test]:
    titles = {result.name: result.title for result in data.results}
    for title, found in data.tests.items():
        shares = [found[name].share for name in titles]
        cells = ranked_cells(RIGHT, shares, [found[name].comparison for name in titles])
        values = _in_words(list(zip(titles.values(), cells, strict=True)))
        alt = f"Right answers {title}, mean and 95 % interval in %: {values}"
        rows = list(zip(titles.values(), shares, strict=True))
        yield Test(title[0].upper() + title[1:], figures.interval_chart(rows, alt, scale=100), tuple(cells))


def _in_words(cells: Sequence[tuple[str, Cell]]) -> str:
    """Numbers of a chart for who does not see it, by title."""
    return "; ".join(f"{title} {typographic(c.text)} {typographic(c.interval)}" for title, c in cells if c.text)


def _interval_figure(table: Table, column: Column, baseline: Table | None) -> Figure:
    """Means and intervals of one metric; a run without a number keeps its place."""
    cells = [(row.title, row.cells[column.name]) for row in table.rows]
    values = _in_words(cells)
    without_image = baseline.rows[0].cells.get(column.name) if baseline else None
    return Figure(
        column.metric.heading,
        figures.interval_chart(
            [(title, cell.estimate) for title, cell in cells],
            f"{column.metric.title}, mean and 95 % interval: {values}",
            scale=100 if column.metric.percent else 1,
            baseline=without_image.estimate.mean if without_image else None,
        ),
    )


def _breakdown(data: ReportData, field: str) -> Breakdown:
    """One row per value and metric, one cell per run, then one of the baseline."""
    rows = []
    for value, by_metric in data.results[0].breakdown[field].items():
        for name, estimate in by_metric.items():
            classes = [result.breakdown.get(field, {}).get(value, {}) for result in data.results]
            cells = ranked_cells(name, [known.get(name) for known in classes])
            if data.question_only:
                known = data.question_only.breakdown.get(field, {}).get(value, {})
                cells += ranked_cells(name, [known.get(name)])
            rows.append(BreakdownRow(value, describe(name).title, estimate.count, tuple(cells)))
    return Breakdown(field.replace("_", " ").capitalize(), tuple(rows))


def _training_curves(results: Sequence[RunResult]) -> list[str]:
    """Those of the training, then those of its validation."""
    known = dict.fromkeys(name for result in results for name in result.curves if validation_curve(name))
    return ["loss_llm", "loss_align", "attention_inside", *known]


def _curve_figures(results: Sequence[RunResult], names: Sequence[str]) -> Iterator[Figure]:
    for name in names:
        title = CURVES.get(name) or validation_curve(name) or name
        curves = [(slot, result.curves[name]) for slot, result in enumerate(results) if name in result.curves]
        if curves:
            ends = "; ".join(f"{results[slot].title} ends at {curve.values[-1]:.3g}" for slot, curve in curves)
            yield Figure(title, figures.curve_chart(curves, f"{title} over the optimiser steps: {ends}"))


def _expert_figures(results: Sequence[RunResult]) -> Iterator[Figure]:
    for slot, result in enumerate(results):
        for kind, expert in result.experts.items():
            even = math.log(len(expert.use))
            detail = f"{EXPERT_KINDS[kind]}; entropy {expert.entropy:.2f} of at most {even:.2f} nats"
            uses = ", ".join(f"expert {i} {100 * use:.0f} %" for i, use in enumerate(expert.use, 1))
            chart = figures.bar_chart(expert.use, slot, f"{result.title}, {detail}: {uses}")
            yield Figure(result.title, chart, detail)


def _head_figures(results: Sequence[RunResult]) -> Iterator[Figure]:
    for slot, result in enumerate(results):
        if result.head_share is not None:
            layers, heads = result.head_share.shape
            layer, head = divmod(int(result.head_share.argmax()), heads)
            alt = (
                f"{result.title}: {layers} layers of {heads} heads; most often selected: head {head + 1} of layer "
                f"{layer + 1}, {100 * result.head_share[layer, head]:.0f} % of the time"
            )
            yield Figure(result.title, figures.head_grid(result.head_share, slot, alt))


def _case(position: int, case: Case) -> dict[str, object]:
    """What the template needs of a case: its panels are drawn here."""
    scan, size = f"scan-{position}", case.region.shape
    plain = figures.case_panel(scan, size, f"Case {position}: the scan")
    marked = figures.case_panel(
        scan,
        size,
        f"Case {position}: outline of the true region and of {len(case.labels)} weak labels",
        region=case.region,
        labels=case.labels,
    )
    views = []
    for view in case.views:
        panel = figures.case_panel(scan, size, _heat_alt(position, view), heat=view.heat, region=case.region)
        views.append((view, _grade(view), panel))
    definition = figures.scan_definition(case.image, scan)
    return {
        "number": position,
        "case": case,
        "definition": definition,
        "plain": plain,
        "marked": marked,
        "views": views,
    }


def _heat_alt(position: int, view: View) -> str:
    return f"Case {position}: attention of {view.title}, {_share(view.mass)} inside the true region"


def _grade(view: View) -> str:
    """Empty for a report."""
    if view.right is None:
        return ""
    return "right" if view.right >= 1 else "wrong" if view.right <= 0 else "partly"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else NOTHING


def _grouped(settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Settings by the section before their dot."""
    groups: dict[str, dict[str, str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        groups.setdefault(section or "run", {})[name] = value
    return groups
