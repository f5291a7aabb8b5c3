"""Finished runs -> a table beside the published numbers, as records, Markdown and JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from a3tune.data.rows import read_rows
from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.results import classes, clusters, scores
from a3tune.metrics.catalogue import Metric, describe
from a3tune.metrics.stats import Estimate, seeds_interval
from a3tune.report.escape import markdown
from a3tune.reproduce.experiments import ANSWER, Column, Experiment, Row
from a3tune.reproduce.grid import run_of
from a3tune.reproduce.places import REGIONS, Places
from a3tune.run.folder import RunFolder
from a3tune.types import Sample

Scores = Mapping[str, Mapping[str, float]]
"""Of a run's answers: sample id -> metric -> value."""
_ANSWER = Metric("Right answers", "Open recall of open questions, strict accuracy of closed ones.", main=False)


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured and what the paper has, in the unit of the table (percent, or the metric's own)."""

    ours: Estimate | None
    """None: cannot be had here."""
    paper: float | None = None
    change: Estimate | None = None
    """Difference from the first row, paired question by question, where the table compares with it."""


@dataclass(frozen=True, slots=True)
class Table:
    """One experiment's outcome."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    measured: tuple[Column, ...]
    """What each column is here."""
    rows: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    comparable: bool
    """Whether the published numbers are of the same data."""
    about: Mapping[str, str]


def results_table(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Table:
    """The table of an experiment whose runs are done. A cell without answers is empty."""
    columns = _columns(places, experiment)
    kept = [_questions(places, column) for column, _ in columns]
    read = cache(run_scores)

    def ours(row: Row, column: Column, samples: Sequence[Sample]) -> Estimate | None:
        runs = [run_of(places, out, experiment, row, column, seed) for seed in seeds] if samples else []
        folders = [RunFolder(path) for path in dict.fromkeys(run.answers(row.decode) for run in runs)]
        return _estimate([read(folder) for folder in folders if folder.results.is_file()], samples, column.metric)

    cells = tuple(
        tuple(
            Cell(ours(row, column, samples), row.paper[at] if at is not None and row.paper else None)
            for (column, at), samples in zip(columns, kept, strict=True)
        )
        for row in experiment.rows
    )
    return _table(places, experiment, [column for column, _ in columns], cells, seeds)


def counts_table(places: Places, experiment: Experiment) -> Table:
    """Rows in the splits of every data set (Table 6)."""
    return _known_table(places, experiment, lambda data, split: len(read_rows(places.data[data] / f"{split}.jsonl")))


def settings_table(places: Places, experiment: Experiment) -> Table:
    """The value of a setting for every data set (Table 7)."""
    model = next(iter(places.models), "")

    def value(data: str, setting: str) -> float:
        section, name = setting.split(".")
        return getattr(getattr(places.config(model, data, ()), section), name)

    return _known_table(places, experiment, value)


def as_markdown(table: Table, picture: str | None = None) -> str:
    """The table with its heading; ours [95 % interval], then the paper's number and the difference.

    `picture` is the name of a plot of the same numbers, beside the file.
    """
    heading = f"{table.name}: {table.title}"
    lines = [f"## {heading}", ""]
    lines += [table.note.strip(), ""] if table.note else []
    lines += [f"![{heading}; a plot of the numbers in the table below]({picture})", ""] if picture else []
    lines += [f"| | {' | '.join(map(markdown, table.columns))} |", "|---" * (len(table.columns) + 1) + "|"]
    for title, row in zip(table.rows, table.cells, strict=True):
        lines.append(f"| {markdown(title)} | " + " | ".join(_text(cell, table.comparable) for cell in row) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in table.about.items())]
    if not table.comparable:
        lines.append("- The published numbers (in brackets) are of other data or models: no difference is meant.")
    return "\n".join(lines) + "\n"


def as_json(table: Table) -> str:
    """The whole record; a number that is not defined is null."""

    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    tree = asdict(table, dict_factory=lambda items: {key: plain(value) for key, value in items})
    return json.dumps(tree, indent=1) + "\n"


def column_metric(name: str) -> Metric:
    """What is known of a column's metric: the catalogue's entry, or `ANSWER`, which only these tables have."""
    return _ANSWER if name == ANSWER else describe(name)


def _known_table(places: Places, experiment: Experiment, value: Callable[[str, str], float]) -> Table:
    """A table of numbers without chance: `value(data set, title of the row)`; empty where a data set has no place."""

    def ours(data: str, row: str) -> Estimate | None:
        number = float(value(data, row)) if data in places.data else None
        return None if number is None else Estimate(number, number, number, 1)

    cells = tuple(
        tuple(
            Cell(ours(column.data, row.title), number)
            for column, number in zip(experiment.columns, row.paper, strict=True)
        )
        for row in experiment.rows
    )
    return _table(places, experiment, experiment.columns, cells, ())


def _columns(places: Places, experiment: Experiment) -> list[tuple[Column, int | None]]:
    """Columns as measured here, and which published column each is; several that are the same here become one."""
    columns: dict[tuple, tuple[Column, int | None]] = {}
    for at, column in enumerate(experiment.columns):
        folder = places.data.get(column.data)
        data = folder or column.data  # without a place it is no other's column
        where = dict(
            places.classes.get((key, value), (key, value)) for key, values in column.where.items() for value in values
        )
        here = replace(
            column, where={key: (value,) for key, value in where.items()} if places.classes else column.where
        )
        if column.by and folder is not None:
            values = classes(read_rows(folder / "test.jsonl"), column.by)
            for value in values:
                one_class = replace(here, by="", where={column.by: (value,)})
                columns.setdefault((data, column.metric, value), (one_class, None))
        else:
            columns.setdefault((data, column.metric, tuple(here.where.items())), (here, at))
    return list(columns.values())


def _heading(column: Column) -> str:
    where = ", ".join("/".join(values) for values in column.where.values())
    metric = column_metric(column.metric).title if column.metric else ""
    return ", ".join(part for part in (column.data.removesuffix(REGIONS), where, metric) if part)


def _questions(places: Places, column: Column) -> list[Sample]:
    """The test questions that count in a column; none where its data set has no place."""
    if column.data not in places.data:
        return []
    samples = read_rows(places.data[column.data] / "test.jsonl")
    return [sample for sample in samples if all(sample.meta.get(k) in values for k, values in column.where.items())]


def run_scores(folder: RunFolder) -> Scores:
    """Scores of a run's answers; `ANSWER` among them."""
    by_id = {prediction.id: scores(prediction) for prediction in read_predictions(folder)}
    return {
        name: values | {ANSWER: values.get("open_recall", values.get("closed_accuracy_strict", np.nan))}
        for name, values in by_id.items()
    }


def _estimate(runs: Sequence[Scores], samples: Sequence[Sample], metric: str) -> Estimate | None:
    """Mean over runs and samples in the unit of the table; None without any."""
    if not runs or not samples:
        return None
    return in_unit(metric, seeds_interval(of_runs(runs, samples, metric), clusters(samples)))


def of_runs(runs: Sequence[Scores], samples: Sequence[Sample], metric: str) -> np.ndarray:
    """A metric of every sample by every run, float [runs, samples]; NaN where it is not defined."""
    return np.array([[run[sample.id].get(metric, np.nan) for sample in samples] for run in runs])


def in_unit(metric: str, estimate: Estimate) -> Estimate:
    """An estimate of shares in the unit of a table."""
    scale = 100 if column_metric(metric).percent else 1
    return Estimate(scale * estimate.mean, scale * estimate.low, scale * estimate.high, estimate.count)


def _table(
    places: Places,
    experiment: Experiment,
    columns: Sequence[Column],
    cells: tuple[tuple[Cell, ...], ...],
    seeds: Sequence[int],
) -> Table:
    about = {"training seeds": " ".join(map(str, seeds))} if seeds else {}
    about |= (
        {"data": "phantom scans and the shipped tiny model in the place of all data sets and models"}
        if places.stand_in
        else {}
    )
    rows = tuple(row.title for row in experiment.rows)
    return Table(
        experiment.name,
        experiment.title,
        experiment.note,
        tuple(_heading(column) for column in columns),
        tuple(columns),
        rows,
        cells,
        not (places.stand_in or experiment.published),
        about,
    )


def estimate_text(estimate: Estimate) -> str:
    """A mean, and its interval if it has one; a single number as it is."""
    if estimate.count == 1:
        return f"{estimate.mean:g}"
    digits = _digits(estimate)
    text = f"{estimate.mean:.{digits}f}"
    return text + (f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if estimate.high > estimate.low else "")


def _digits(estimate: Estimate) -> int:
    return 3 if 0 < abs(estimate.mean) < 1 else 1


def _text(cell: Cell, comparable: bool) -> str:
    paper = "" if cell.paper is None else f" ({cell.paper:g})"
    if cell.ours is None or not math.isfinite(cell.ours.mean):
        return f"-{paper}"
    text, digits = estimate_text(cell.ours), _digits(cell.ours)
    if cell.change is not None and math.isfinite(cell.change.mean):
        low, mean, high = (f"{value:+.{digits}f}" for value in (cell.change.low, cell.change.mean, cell.change.high))
        return f"{text}; {mean}" + (f" [{low}, {high}]" if math.isfinite(cell.change.low) else "")
    if cell.paper is None:
        return text
    return f"{text} (paper {cell.paper:g}, {cell.ours.mean - cell.paper:+.{digits}f})" if comparable else text + paper
