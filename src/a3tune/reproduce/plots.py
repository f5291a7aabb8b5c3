"""A figure's table -> a plot with intervals, as SVG: lines over a swept value, else bars; one panel for each metric.

Readable without colour: of two series one is hatched. Text stays text, so that it can be searched and read aloud.
"""

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from a3tune.metrics.stats import Estimate
from a3tune.reproduce.experiments import Experiment
from a3tune.reproduce.places import REGIONS
from a3tune.reproduce.tables import Cell, Table, column_metric, estimate_text
from a3tune.text import one_line

_INK, _MUTED = "#1b1d22", "#5b616b"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "a3tune",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.axisbelow": True,
    "grid.color": "#e3e4e6",
    "hatch.linewidth": 0.7,
}
_STEPS = [1, 2, 2.5, 5, 10]
_WIDTH = 700 / 96
"""Of a picture, in inches: 700 CSS pixels, where text of 9.5 points is 12.7 pixels high."""
_BAR = 0.27
"""Height of one bar, in inches."""
_FILLS = (("#e6edf6", "////"), ("#7fa8d9", ""), ("#f7e3d8", "...."), ("#d98a5f", ""))
"""Colour and hatch of the series, in their order: light and hatched, darker and plain."""
_WIDE = 8
"""From this ratio of the largest to the smallest swept value on, equal factors are equally far apart."""
_LONG = 15
"""With more characters than this the swept values are written upwards."""


def draw(experiment: Experiment, table: Table) -> bytes | None:
    """The plot of a figure's table as an SVG file, the same bytes for the same numbers; None without any number."""
    if not any(_measured(row) for row in table.cells):
        return None
    # Matplotlib reads a matplotlibrc of the current folder, which may be a stranger's and start LaTeX.
    with style.context(["default", _STYLE]):
        if experiment.axis:
            figure = _sweep(experiment, table)
        elif any(column.by for column in experiment.columns):
            figure = _classes(table)
        else:
            figure = _rows(table)
        figure.suptitle(_caption(experiment, table), x=0.01, ha="left", fontsize=8.5, color=_MUTED)
        return _svg(figure, f"{table.name}: {table.title}", "; ".join(_described(table)))


def _sweep(experiment: Experiment, table: Table) -> Figure:
    """For each column a panel with a line over the swept value."""
    figure, panels = _panels(len(table.columns), 2.7)
    x = np.array([row.x for row in experiment.rows], dtype=float)
    smallest = x[x > 0].min()
    wide, labels = x.max() >= _WIDE * smallest, [f"{value:g}" for value in x]
    for at, axes in enumerate(panels):
        axes.set_title(_title(table, at))
        if wide:
            axes.set_xscale("symlog", base=2, linthresh=smallest)
        axes.set_xticks(x, labels, rotation=90 if len("".join(labels)) > _LONG else 0)
        axes.minorticks_off()
        axes.set_xlim(_around(axes, x))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.grid(axis="y")
        if experiment.peak is not None:
            axes.axvline(experiment.peak, color=_MUTED, linestyle=":", linewidth=1.3)
        measured = _measured([row[at] for row in table.cells])
        means = [estimate.mean for _, estimate in measured]
        values = [x[index] for index, _ in measured]
        axes.errorbar(values, means, _whiskers(measured), color=_INK, marker="o", markersize=5, capsize=3)
    figure.supxlabel(experiment.axis, fontsize=9.5)
    return figure


def _rows(table: Table) -> Figure:
    """For each column a panel with a bar for each row."""
    figure, panels = _panels(len(table.columns), 1.0 + 1.3 * _BAR * len(table.rows), sharey=True)
    for at, axes in enumerate(panels):
        axes.set_title(_title(table, at))
        _bars(axes, table.rows, [("", [row[at] for row in table.cells])], _FILLS[1:])
    return figure


def _classes(table: Table) -> Figure:
    """One panel: for each class of questions a bar for each row."""
    figure, [axes] = _panels(1, 1.2 + _BAR * (len(table.rows) + 0.5) * len(table.columns))
    names = [
        one_line(", ".join(value for values in column.where.values() for value in values)) for column in table.measured
    ]
    _bars(axes, names, list(zip(table.rows, table.cells, strict=True)), _FILLS)
    axes.set_xlabel(_title(table, 0))
    figure.legend(loc="outside lower left", ncols=len(table.rows), frameon=False)
    return figure


def _bars(
    axes: Axes, groups: Sequence[str], series: Sequence[tuple[str, Sequence[Cell]]], fills: Sequence[tuple[str, str]]
) -> None:
    """Groups from top to bottom, in each a bar for each (title, one cell per group), with its number at the end."""
    height = 0.8 / len(series)
    ends = [0.0]
    for number, (title, cells) in enumerate(series):
        colour, hatch = fills[number % len(fills)]
        measured = _measured(cells)
        if not measured:
            continue
        places = [index + height * (number + 0.5) - 0.4 for index, _ in measured]
        means = [estimate.mean for _, estimate in measured]
        style = {"color": colour, "edgecolor": _INK, "linewidth": 0.8, "hatch": hatch, "label": title}
        axes.barh(places, means, 0.9 * height, **style)
        axes.errorbar(means, places, xerr=_whiskers(measured), fmt="none", ecolor=_INK, elinewidth=1.2, capsize=2.5)
        for place, (_, estimate) in zip(places, measured, strict=True):
            end = max(value for value in (estimate.mean, estimate.high) if math.isfinite(value))
            ends.append(end)
            text = estimate_text(estimate).split()[0]
            axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, 1.3 * max(ends) or 1)
    axes.set_xticks([tick for tick in MaxNLocator(4, steps=_STEPS).tick_values(0, max(ends)) if tick <= max(ends)])
    axes.set_yticks(range(len(groups)), groups, parse_math=False)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _panels(count: int, height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _around(axes: Axes, x: np.ndarray) -> tuple[float, float]:
    """Ends of the axis: all swept values, measured or not, with some room."""
    scale = axes.xaxis.get_transform()
    low, high = scale.transform(np.array([x.min(), x.max()]))
    room = 0.05 * (high - low)
    left, right = scale.inverted().transform(np.array([low - room, high + room]))
    return float(left), float(right)


def _measured(cells: Sequence[Cell]) -> list[tuple[int, Estimate]]:
    """The measured ones with their positions."""
    return [(at, cell.ours) for at, cell in enumerate(cells) if cell.ours and math.isfinite(cell.ours.mean)]


def _whiskers(measured: Sequence[tuple[int, Estimate]]) -> np.ndarray:
    """Lengths below and above each mean, float [2, n]; 0 where there is no interval."""
    ends = [(estimate.mean - estimate.low, estimate.high - estimate.mean) for _, estimate in measured]
    return np.nan_to_num(np.array(ends, dtype=float).reshape(-1, 2).T).clip(0)


def _title(table: Table, at: int) -> str:
    return column_metric(table.measured[at].metric).heading


def _caption(experiment: Experiment, table: Table) -> str:
    data = ", ".join(dict.fromkeys(column.data.removesuffix(REGIONS) for column in experiment.columns))
    what = f"{data}, mean and 95 % interval." if table.comparable else "Mean and 95 % interval."
    peak = ["Dotted: where performance peaks in the paper."] if experiment.peak is not None else []
    about = [f"{name.capitalize()}: {value}." for name, value in table.about.items()]
    return textwrap.fill(" ".join([what, *peak, *about]), 115)


def _described(table: Table) -> Iterator[str]:
    """All numbers in words, for readers who cannot see the picture."""
    for at, column in enumerate(table.columns):
        measured = _measured([row[at] for row in table.cells])
        numbers = [f"{table.rows[index]} {estimate_text(estimate)}" for index, estimate in measured]
        yield f"{column}: " + (", ".join(numbers) or "nothing measured")


def _svg(figure: Figure, title: str, description: str) -> bytes:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    head, root, rest = file.getvalue().partition("<svg ")
    attributes, end, body = rest.partition(">")
    named = f'\n <title id="title">{escape(title)}</title>\n <desc id="desc">{escape(one_line(description))}</desc>'
    return f'{head}{root}role="img" aria-labelledby="title desc" {attributes}{end}{named}{body}'.encode()
