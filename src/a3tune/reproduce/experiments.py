"""What the paper's tables and figures compare, read from `assets/paper/experiments.yaml`. Runs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

import yaml

from a3tune.errors import ConfigError

Kind = Literal["results", "counts", "settings", "cases"]
ANSWER = "answer"
"""Metric of a column: right answers of any question, open recall or strict closed accuracy."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model with its way to answer; of `counts` and `settings` only the title and the numbers."""

    title: str
    adapter: Literal["base", "lora", "a3tune"] = "base"
    decode: str = "greedy"
    change: tuple[str, ...] = ()
    """Settings that differ, as `labels.top_k=2`."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Setting -> factor of what it is for the data set."""
    x: float | None = None
    """The swept value, in a figure that sweeps one."""
    paper: tuple[float | None, ...] = ()
    """Published numbers by column; empty if there are none in print."""


@dataclass(frozen=True, slots=True)
class Column:
    """What is measured on which questions."""

    data: str
    metric: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field of `meta` -> the values that count."""
    by: str = ""
    """Field of `meta` for each of whose values there is a column of its own."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table or figure."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    kind: Kind = "results"
    model: str = ""
    note: str = ""
    axis: str = ""
    """What a figure sweeps, as its axis is called."""
    peak: float | None = None
    """Swept value at which performance peaks, as the paper's text says."""
    published: str = ""
    """The model that the published numbers are of, where it is another."""

    @property
    def asks(self) -> bool:
        """Whether models answer for it."""
        return self.kind in ("results", "cases")

    @property
    def drawn(self) -> bool:
        """Whether the paper shows it as a plot."""
        return self.kind == "results" and self.name.startswith("fig")


def experiments() -> dict[str, Experiment]:
    """All tables and figures by name, tables first."""
    tree = yaml.safe_load(paper_asset("experiments.yaml"))
    return {name: _experiment(name, entry) for name, entry in tree.items()}


def choose(names: list[str], model: str | None = None) -> list[Experiment]:
    """The named ones; `all` is all of them, `fig5` is `fig5a` and `fig5b`. Raises ConfigError for an unknown name.

    With `model` that one is asked in place of the paper's, and the outcome is called by both.
    """
    known = experiments()
    chosen: dict[str, Experiment] = {}
    for name in names:
        named = {key: value for key, value in known.items() if name in ("all", key, key.rstrip("ab"))}
        if not named:
            raise ConfigError(f"{name}: expected a table or figure of the paper, one of {', '.join(known)}, or all")
        chosen |= named
    return [_of(experiment, model) for experiment in chosen.values()]


def _of(experiment: Experiment, model: str | None) -> Experiment:
    if model in (None, experiment.model) or not experiment.asks:
        return experiment
    note = f"Asked of {model}; rows are called as in the paper, whose numbers are of {experiment.model}."
    note = f"{note} {experiment.note}".strip()
    name = f"{experiment.name}-{model}"
    return replace(experiment, name=name, model=str(model), note=note, published=experiment.model)


def paper_asset(name: str) -> str:
    """Text of a file of `assets/paper/`."""
    return (files("a3tune") / "assets" / "paper" / name).read_text(encoding="utf-8")


def _experiment(name: str, entry: dict[str, Any]) -> Experiment:
    columns = tuple(
        Column(**column | {"where": {key: tuple(values) for key, values in column.get("where", {}).items()}})
        for column in entry.pop("columns")
    )
    rows = tuple(
        Row(**row | {"change": tuple(row.get("change", ())), "paper": tuple(row.get("paper", ()))})
        for row in entry.pop("rows")
    )
    return Experiment(name=name, columns=columns, rows=rows, **entry)
