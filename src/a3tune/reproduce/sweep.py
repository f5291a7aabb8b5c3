"""A sweep: every variation trained with every seed and asked validation questions; a table, a picture, a choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from a3tune.data.rows import read_split
from a3tune.evaluation.results import clusters
from a3tune.machine.files import write_atomic
from a3tune.metrics.stats import Estimate, paired_difference, seeds_interval
from a3tune.reproduce.experiments import Column, Experiment, Row
from a3tune.reproduce.grid import Job, Run, run_all, run_name
from a3tune.reproduce.plots import draw
from a3tune.reproduce.tables import (
    Cell,
    Scores,
    Table,
    as_json,
    as_markdown,
    column_metric,
    in_unit,
    of_runs,
    run_scores,
)
from a3tune.reproduce.variations import Variation, settings_of
from a3tune.run.folder import RunFolder
from a3tune.types import Sample

NAME = "sweep"
Answered = Sequence[Sequence[Scores]]
"""Of every row, the scores of its runs by seed."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is varied, and how it is measured."""

    rows: Sequence[Variation]
    config: Path | None
    overrides: Sequence[str]
    seeds: Sequence[int]
    scores: Sequence[str]
    """Metrics of the columns; rows are chosen by the first."""
    out: Path
    """Folder of the runs and of `sweep.md`, `sweep.json` and `sweep.svg`."""

    def run(self, row: Variation, seed: int) -> Run:
        config = settings_of(row, self.config, self.overrides, seed, self.out)
        name = run_name([row.title, f"seed{seed}"], config)
        return Run(replace(config, output=self.out / "runs" / name), trained=True)


def sweep(plan: Sweep, jobs: int, say: Callable[[str], None]) -> str:
    """Train and answer what is not there yet, and write the table; returns it with what it says, as Markdown.

    Stopped, it goes on where it was. Raises RunError for a run that was made of other rows, labels or weights.
    """
    runs = [[plan.run(row, seed) for seed in plan.seeds] for row in plan.rows]
    shared = runs[0][0].config
    decode = shared.evaluation.decode
    run_all([Job(run, [decode]) for own in runs for run in own], jobs, say, labels=False)
    samples = read_split(shared.data, "test")
    answered = [[run_scores(RunFolder(run.answers(decode))) for run in own] for own in runs]
    table = _table(plan, answered, samples)
    text = as_markdown(table) + "\n" + _choice(plan, answered, samples) + "\n"
    picture = draw(_experiment(plan), table)
    if picture is not None:
        write_atomic(plan.out / f"{NAME}.svg", picture)
    write_atomic(plan.out / f"{NAME}.json", as_json(table).encode())
    write_atomic(plan.out / f"{NAME}.md", text.encode())
    return text


def _experiment(plan: Sweep) -> Experiment:
    """The sweep as what `reproduce` draws."""
    columns = tuple(Column("validation", score) for score in plan.scores)
    return Experiment(NAME, "validation questions", columns, tuple(Row(row.title) for row in plan.rows))


def _table(plan: Sweep, answered: Answered, samples: Sequence[Sample]) -> Table:
    experiment = _experiment(plan)

    def cell(at: int, metric: str) -> Cell:
        groups, values = clusters(samples), of_runs(answered[at], samples, metric)
        change = in_unit(metric, paired_difference(values, of_runs(answered[0], samples, metric), groups))
        return Cell(in_unit(metric, seeds_interval(values, groups)), change=change if at else None)

    return Table(
        NAME,
        experiment.title,
        f"Mean and 95 % interval over seeds and patients; then the difference from {plan.rows[0].title}, "
        "question by question.",
        tuple(column_metric(score).title for score in plan.scores),
        experiment.columns,
        tuple(row.title for row in plan.rows),
        tuple(tuple(cell(at, score) for score in plan.scores) for at in range(len(plan.rows))),
        True,
        {"training seeds": " ".join(map(str, plan.seeds)), "questions": str(len(samples))},
    )


def _choice(plan: Sweep, answered: Answered, samples: Sequence[Sample]) -> str:
    """The row that is best by the first score, and those that chance may have put behind it."""
    score = plan.scores[0]
    metric, groups = column_metric(score), clusters(samples)
    values = [of_runs(own, samples, score) for own in answered]
    means = [float(np.nanmean(own)) if np.isfinite(own).any() else math.nan for own in values]
    if all(map(math.isnan, means)):
        return f"No question has a {metric.title.lower()}: nothing can be chosen by it; name another --score."
    sign = -1 if metric.lower_is_better else 1
    best = int(np.nanargmax([sign * mean for mean in means]))
    behind = [
        row.title
        for at, row in enumerate(plan.rows)
        if at != best and _in_doubt(paired_difference(values[best], values[at], groups))
    ]
    end = f" Chance may have put these behind it: {'; '.join(behind)}." if behind else " Chance explains no other row."
    few = " One seed is not a finding: give --seed three times." if len(plan.seeds) == 1 else ""
    return f"Best by {metric.title.lower()}: {plan.rows[best].title}.{end}{few}"


def _in_doubt(difference: Estimate) -> bool:
    """Whether an interval holds 0, or there is none."""
    return not (difference.low > 0 or difference.high < 0)
