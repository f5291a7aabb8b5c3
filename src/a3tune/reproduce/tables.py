"""Finished runs -> a table beside the published numbers, as records, Markdown and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from a3tune.data.rows import read_rows
from a3tune.evaluate import classes, clusters, scores
from a3tune.metrics.stats import Estimate, seeds_interval
from a3tune.predictions import read_predictions
from a3tune.report.data import METRICS
from a3tune.report.escape import markdown
from a3tune.reproduce.experiments import Column, Experiment, Row
from a3tune.reproduce.grid import run_of
from a3tune.reproduce.places import REGIONS, Places
from a3tune.run import RunFolder
from a3tune.types import Prediction, Sample

ANSWER = "answer"
"""Metric of a column: right answers of any question, open recall or strict closed accuracy."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured and what the paper has, in the unit of the table (percent, or the metric's own)."""

    ours: Estimate | None
    """None: cannot be had here."""
    paper: float | None


@dataclass(frozen=True, slots=True)
class Table:
    """One experiment's outcome."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    comparable: bool
    """Whether the published numbers are of the same data."""
    about: Mapping[str, str]


def results_table(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Table:
    """The table of an experiment whose runs are done. A cell without answers is empty."""
    columns = _columns(places, experiment)
    cells = tuple(
        tuple(
            Cell(
                _estimate(places, out, experiment, row, column, seeds),
                row.paper[at] if at is not None and row.paper else None,
            )
            for column, at in columns
        )
        for row in experiment.rows
    )
    return _table(places, experiment, [_heading(column) for column, _ in columns], cells, seeds)


def counts_table(places: Places, experiment: Experiment) -> Table:
    """Rows in the splits of every data set (Table 6)."""

    def count(data: str, split: str) -> Estimate | None:
        if data not in places.data:
            return None
        number = float(len(read_rows(places.data[data] / f"{split}.jsonl")))
        return Estimate(number, number, number, 1)

    cells = [
        tuple(Cell(count(column.data, row.title), row.paper[at]) for at, column in enumerate(experiment.columns))
        for row in experiment.rows
    ]
    return _table(places, experiment, [column.data for column in experiment.columns], tuple(cells), ())


def settings_table(places: Places, experiment: Experiment) -> Table:
    """The value of a setting for every data set (Table 7)."""

    def value(data: str, setting: str) -> Estimate | None:
        if data not in places.data:
            return None
        section, name = setting.split(".")
        number = float(getattr(getattr(places.config(next(iter(places.models)), data, ()), section), name))
        return Estimate(number, number, number, 1)

    cells = [
        tuple(Cell(value(column.data, row.title), row.paper[at]) for at, column in enumerate(experiment.columns))
        for row in experiment.rows
    ]
    return _table(places, experiment, [column.data for column in experiment.columns], tuple(cells), ())


def as_markdown(table: Table) -> str:
    """The table with its heading; ours [95 % interval], then the paper's number and the difference."""
    lines = [f"## {table.name}: {table.title}", ""]
    lines += [table.note.strip(), ""] if table.note else []
    lines += [f"| | {' | '.join(map(markdown, table.columns))} |", "|---" * (len(table.columns) + 1) + "|"]
    for title, row in zip(table.rows, table.cells, strict=True):
        lines.append(f"| {markdown(title)} | " + " | ".join(_text(cell, table.comparable) for cell in row) + " |")
    lines += ["", *(f"- {name}: {value}" for name, value in table.about.items())]
    if not table.comparable:
        lines.append("- The published numbers (in brackets) are of other data and models: no difference is meant.")
    return "\n".join(lines) + "\n"


def as_json(table: Table) -> str:
    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    tree = asdict(table, dict_factory=lambda items: {key: plain(value) for key, value in items})
    return json.dumps(tree, indent=1) + "\n"


def _columns(places: Places, experiment: Experiment) -> list[tuple[Column, int | None]]:
    """Columns as measured here, and which published column each is; several that are the same here become one."""
    found: dict[tuple, tuple[Column, int | None]] = {}
    for at, column in enumerate(experiment.columns):
        folder = places.data.get(column.data, Path(column.data))
        where = dict(
            places.classes.get((key, value), (key, value)) for key, values in column.where.items() for value in values
        )
        here = replace(
            column, where={key: (value,) for key, value in where.items()} if places.classes else column.where
        )
        if column.by:
            values = classes(read_rows(folder / "test.jsonl"), column.by)
            for value in values:
                own = replace(here, by="", where={column.by: (value,)})
                found.setdefault((folder, column.metric, value), (own, None))
        else:
            found.setdefault((folder, column.metric, tuple(here.where.items())), (here, at))
    return list(found.values())


def _heading(column: Column) -> str:
    metric = METRICS[column.metric].title if column.metric in METRICS else column.metric
    where = ", ".join("/".join(values) for values in column.where.values())
    return ", ".join(part for part in (column.data.removesuffix(REGIONS), where, metric) if part)


def _estimate(
    places: Places, out: Path, experiment: Experiment, row: Row, column: Column, seeds: Sequence[int]
) -> Estimate | None:
    folder = places.data.get(column.data)
    if folder is None:
        return None
    samples = read_rows(folder / "test.jsonl")
    kept = [sample for sample in samples if all(sample.meta.get(k) in values for k, values in column.where.items())]
    found = {}
    for seed in seeds if row.adapter != "base" else seeds[:1]:
        answers = RunFolder(run_of(places, out, experiment, row, column, seed).answers(row.decode))
        if answers.results.is_file():
            found[seed] = _values(read_predictions(answers), kept, column.metric)
    if not found or not kept:
        return None
    estimate = seeds_interval(np.stack(list(found.values())), clusters(kept))
    scale = 100 if column.metric not in METRICS or METRICS[column.metric].percent else 1
    return Estimate(scale * estimate.mean, scale * estimate.low, scale * estimate.high, estimate.count)


def _values(predictions: Sequence[Prediction], samples: Sequence[Sample], metric: str) -> np.ndarray:
    by_id = {prediction.id: scores(prediction) for prediction in predictions}
    if metric == ANSWER:
        return np.array(
            [by_id[s.id].get("open_recall", by_id[s.id].get("closed_accuracy_strict", np.nan)) for s in samples]
        )
    return np.array([by_id[sample.id].get(metric, np.nan) for sample in samples])


def _table(
    places: Places,
    experiment: Experiment,
    columns: Sequence[str],
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
        experiment.name, experiment.title, experiment.note, tuple(columns), rows, cells, not places.stand_in, about
    )


def _text(cell: Cell, comparable: bool) -> str:
    paper = "" if cell.paper is None else f" ({cell.paper:g})"
    if cell.ours is None or not math.isfinite(cell.ours.mean):
        return f"-{paper}"
    digits = 3 if 0 < abs(cell.ours.mean) < 1 else 1
    text = f"{cell.ours.mean:.{digits}f}"
    if cell.ours.high > cell.ours.low:
        text += f" [{cell.ours.low:.{digits}f}, {cell.ours.high:.{digits}f}]"
    if cell.paper is None:
        return text
    return f"{text} (paper {cell.paper:g}, {cell.ours.mean - cell.paper:+.{digits}f})" if comparable else text + paper
