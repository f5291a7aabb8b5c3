"""`ReportData` -> one self-contained HTML page: no script, no network, everything from data escaped.

Knows which numbers stand where. The layout is `report.html.j2` and `report.css`, the charts `figures.py`, the sentences
`summary.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from a3tune.metrics.stats import Estimate
from a3tune.report import figures
from a3tune.report.records import CURVES, METRICS, Case, Comparison, MethodResult, ReportData, View, public_command
from a3tune.report.summary import NOTHING, glossary, limits, number, summary

EXPERT_KINDS = {"query": "Q-MoE: routed by the prompt", "key": "K-MoE: routed by each image token"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a table."""

    value: str
    interval: str = ""
    rank: str = ""
    """best, second or empty."""
    mark: str = ""
    """up, down, same or empty."""
    tone: str = ""
    """good, bad, same or empty: what a difference means."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    slot: int
    """Colour and mark of the method."""
    cells: tuple[Cell, ...]
    count: int = 0
    """Questions, where rows are classes of questions."""
    unit: str = ""
    """Metric of the row, where rows differ in it."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Answers by one field of the questions."""

    title: str
    rows: tuple[Row, ...]


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
    )
    reference = next(method.title for method in data.methods if method.name == data.reference)
    metrics = [name for name in METRICS if any(name in method.scores for method in data.methods)]
    page = environment.get_template("report.html.j2").render(
        data=data,
        command=public_command(data.command),
        reference=reference,
        summary=summary(data),
        metrics=[METRICS[name] for name in metrics],
        scores=_score_rows(data.methods, metrics),
        differences=_difference_rows(data.methods, metrics, data.reference),
        interval_figures=[_interval_figure(data, name) for name in metrics],
        breakdowns=[_breakdown(data, name) for name in data.methods[0].breakdown],
        tested=any(c.p is not None for method in data.methods for c in method.differences.values()),
        curve_figures=list(_curve_figures(data.methods, ("loss_llm", "loss_align", "attention_inside"))),
        trained=[slot for slot, method in enumerate(data.methods) if method.curves],
        expert_figures=list(_expert_figures(data.methods)),
        head_figures=list(_head_figures(data.methods)),
        kept_figures=list(_curve_figures(data.methods, ("heads_overlap",))),
        baseline=_score_rows([data.question_only], metrics)[0] if data.question_only else None,
        cases=[_case(number, case) for number, case in enumerate(data.cases.cases, 1)] if data.cases else [],
        settings=_grouped(data.settings),
        total=sum(data.seconds.values()),
        limits=limits(data),
        glossary=glossary(data.tau, data.normalisation, metrics),
        duration=duration,
        share=_share,
        key=figures.method_key,
    )
    # Rows of JSON may hold half of a surrogate pair, which no file can.
    return page.encode("utf-8", "replace").decode("utf-8")


def duration(seconds: float) -> str:
    """Such as `48 s`, `6 min 05 s` or `2 h 03 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _score_rows(methods: Sequence[MethodResult], metrics: Sequence[str]) -> list[Row]:
    ranks = {
        metric: _ranks([method.scores.get(metric) for method in methods], METRICS[metric].lower_is_better)
        for metric in metrics
    }
    return [
        Row(
            method.title,
            slot,
            tuple(_cell(method.scores.get(metric), metric, ranks[metric][slot]) for metric in metrics),
        )
        for slot, method in enumerate(methods)
    ]


def _difference_rows(methods: Sequence[MethodResult], metrics: Sequence[str], reference: str) -> list[Row]:
    return [
        Row(method.title, slot, tuple(_difference(method.differences.get(metric), metric) for metric in metrics))
        for slot, method in enumerate(methods)
        if method.name != reference and method.differences
    ]


def _cell(estimate: Estimate | None, metric: str, rank: str = "") -> Cell:
    if estimate is None or not math.isfinite(estimate.mean):
        return Cell(NOTHING)
    return Cell(number(estimate.mean, metric), _interval(estimate, metric), rank)


def _difference(comparison: Comparison | None, metric: str) -> Cell:
    if comparison is None or not math.isfinite(comparison.difference.mean):
        return Cell(NOTHING)
    mean = comparison.difference.mean
    mark = tone = "same"
    if comparison.significant:
        mark = "up" if mean > 0 else "down"
        tone = "good" if (mean > 0) != METRICS[metric].lower_is_better else "bad"
    return Cell(number(mean, metric, signed=True), _interval(comparison.difference, metric), mark=mark, tone=tone)


def _interval(estimate: Estimate, metric: str) -> str:
    if not math.isfinite(estimate.low):
        return "no interval"
    return f"[{number(estimate.low, metric)}, {number(estimate.high, metric)}]"


def _ranks(estimates: Sequence[Estimate | None], lower_is_better: bool = False) -> list[str]:
    """best and second by the mean; equals share a rank, and alone nobody is best."""
    means = [e.mean if e is not None and math.isfinite(e.mean) else None for e in estimates]
    order = sorted({mean for mean in means if mean is not None}, reverse=not lower_is_better)
    if len(order) < 2:
        return [""] * len(means)
    return ["best" if mean == order[0] else "second" if mean == order[1] else "" for mean in means]


def _interval_figure(data: ReportData, metric: str) -> Figure:
    rows = [(method.title, method.scores[metric]) for method in data.methods if metric in method.scores]
    known = METRICS[metric]
    baseline = data.question_only.scores.get(metric) if data.question_only else None
    values = "; ".join(f"{title} {number(e.mean, metric)} {_interval(e, metric)}" for title, e in rows)
    return Figure(
        known.title + (", %" if known.percent else ""),
        figures.interval_chart(
            [(method.title, method.scores.get(metric, _NO_ESTIMATE)) for method in data.methods],
            f"{known.title}, mean and 95 % interval: {values}",
            scale=100 if known.percent else 1,
            baseline=baseline.mean if baseline else None,
        ),
    )


def _breakdown(data: ReportData, field: str) -> Breakdown:
    """One row per value and metric, one cell per method; the baseline comes last and takes no part in the ranking."""
    rows = []
    for value, metrics in data.methods[0].breakdown[field].items():
        for metric in metrics:
            estimates = [method.breakdown[field][value][metric] for method in data.methods]
            cells = [_cell(e, metric, rank) for e, rank in zip(estimates, _ranks(estimates), strict=True)]
            if data.question_only:
                found = data.question_only.breakdown.get(field, {}).get(value, {})
                cells.append(_cell(found.get(metric), metric))
            rows.append(Row(value, 0, tuple(cells), estimates[0].count, METRICS[metric].title))
    return Breakdown(field.replace("_", " ").capitalize(), tuple(rows))


def _curve_figures(methods: Sequence[MethodResult], names: Sequence[str]) -> Iterator[Figure]:
    for name in names:
        title = CURVES[name]
        curves = [(slot, method.curves[name]) for slot, method in enumerate(methods) if name in method.curves]
        if curves:
            ends = "; ".join(f"{methods[slot].title} ends at {curve.values[-1]:.3g}" for slot, curve in curves)
            yield Figure(title, figures.curve_chart(curves, f"{title} over the optimiser steps: {ends}"))


def _expert_figures(methods: Sequence[MethodResult]) -> Iterator[Figure]:
    for slot, method in enumerate(methods):
        for kind, expert in method.experts.items():
            even = math.log(len(expert.use))
            detail = f"{EXPERT_KINDS[kind]}; entropy {expert.entropy:.2f} of at most {even:.2f} nats"
            uses = ", ".join(f"expert {i} {100 * use:.0f} %" for i, use in enumerate(expert.use, 1))
            chart = figures.bar_chart(expert.use, slot, f"{method.title}, {detail}: {uses}")
            yield Figure(method.title, chart, detail)


def _head_figures(methods: Sequence[MethodResult]) -> Iterator[Figure]:
    for slot, method in enumerate(methods):
        if method.head_share is not None:
            layers, heads = method.head_share.shape
            layer, head = divmod(int(method.head_share.argmax()), heads)
            alt = (
                f"{method.title}: {layers} layers of {heads} heads; most often selected: head {head + 1} of layer "
                f"{layer + 1}, {100 * method.head_share[layer, head]:.0f} % of the time"
            )
            yield Figure(method.title, figures.head_grid(method.head_share, slot, alt))


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
    return "right" if view.score >= 1 else "wrong" if view.score <= 0 else "partly"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else NOTHING


def _grouped(settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Settings by the section before their dot."""
    groups: dict[str, dict[str, str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        groups.setdefault(section or "run", {})[name] = value
    return groups


_NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan, 0)
