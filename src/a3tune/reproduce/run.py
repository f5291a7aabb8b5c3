"""From the names of tables and figures to files with their outcome."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from a3tune.commands import Page, write_report
from a3tune.files import write_atomic
from a3tune.reproduce.experiments import Experiment, choose
from a3tune.reproduce.grid import plan, run_all, run_of
from a3tune.reproduce.places import PHANTOM, Places, phantom_places, read_places
from a3tune.reproduce.tables import Table, as_json, as_markdown, counts_table, results_table, settings_table

QUICK = {"train": 12, "validation": 4, "test": 6}
"""Phantom patients, to see that everything runs."""
_QUICK_SETTINGS = ("training.max_steps=4", "evaluation.max_new_tokens=4", "training.save_steps=2")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made of one table or figure."""

    file: Path
    text: str
    """To show on a terminal."""


def reproduce(
    names: Sequence[str],
    on: str,
    out: Path,
    seeds: Sequence[int],
    jobs: int,
    say: Callable[[str], None],
    *,
    quick: bool = False,
    settings: Sequence[str] = (),
) -> list[Outcome]:
    """Run what the named tables and figures need, and write each as `NAME.md` and `NAME.json` (cases: `NAME.html`).

    Args:
        names: of `experiments.yaml`, or `all`.
        on: `phantom`, or a YAML file of places (`read_places`).
        out: folder of runs, labels and outcomes; what is in it is not done again.
        seeds: of training.
        jobs: runs at a time.
        quick: few phantom patients and steps: to see that everything runs.
        settings: in place of the demo's, on the phantom.

    Raises ConfigError for an unknown name or a place that is missing.
    """
    chosen = choose(list(names))
    if on == PHANTOM:
        own = (*(_QUICK_SETTINGS if quick else ()), *settings)
        places = phantom_places(out, own, lambda done, total: None, QUICK if quick else None)
    else:
        places = read_places(Path(on), out)
    absent = run_all(plan(places, out, chosen, seeds), jobs, say)
    for name, why in absent.items():
        say(f"left out: {name}: {why}")
    return [_write(places, out, experiment, seeds) for experiment in chosen]


def _write(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Outcome:
    if experiment.kind == "cases":
        return _cases(places, out, experiment, seeds[0])
    table = _table(places, out, experiment, seeds)
    text = as_markdown(table)
    write_atomic(out / f"{experiment.name}.json", as_json(table).encode())
    write_atomic(out / f"{experiment.name}.md", text.encode())
    return Outcome(out / f"{experiment.name}.md", text)


def _table(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Table:
    if experiment.kind == "counts":
        return counts_table(places, experiment)
    if experiment.kind == "settings":
        return settings_table(places, experiment)
    return results_table(places, out, experiment, seeds)


def _cases(places: Places, out: Path, experiment: Experiment, seed: int) -> Outcome:
    """The report's cases: the same questions by all models, with their attention."""
    column = experiment.columns[0]
    runs = [run_of(places, out, experiment, row, column, seed).answers(row.decode) for row in experiment.rows]
    title, file = f"{experiment.name}: {experiment.title}", out / f"{experiment.name}.html"
    page = Page(
        title,
        f"a3tune reproduce {experiment.name}",
        {run.name: row.title for run, row in zip(runs, experiment.rows, strict=True)},
        reference=runs[-2].name,
        synthetic=places.stand_in,
    )
    write_report(runs, file, page)
    return Outcome(file, f"{title}: {file}")
