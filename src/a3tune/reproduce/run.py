"""From the names of tables and figures to files with their outcome."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from a3tune.machine.files import write_atomic
from a3tune.report.write import Page, write_report
from a3tune.reproduce.experiments import Experiment, choose
from a3tune.reproduce.grid import plan, run_all, run_of
from a3tune.reproduce.places import PHANTOM, Places, phantom_places, read_places
from a3tune.reproduce.plots import draw
from a3tune.reproduce.tables import Table, as_json, as_markdown, counts_table, results_table, settings_table
from a3tune.run.folder import RunFolder, read_settings

QUICK = {"train": 12, "validation": 4, "test": 6}
"""Phantom patients, to see that everything runs."""
_QUICK_SETTINGS = ("training.max_steps=4", "evaluation.max_new_tokens=4", "training.save_steps=2")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made of one table or figure."""

    file: Path
    text: str
    """To show on a terminal."""
    picture: Path | None = None
    """The plot of a figure."""


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
    model: str | None = None,
) -> list[Outcome]:
    """Run what the named tables and figures need, and write each as `NAME.md` and `NAME.json` (cases: `NAME.html`).

    A figure is drawn too, as `NAME.svg`.

    Args:
        names: of `experiments.yaml`, or `all`.
        on: `phantom`, or a YAML file of places (`read_places`).
        out: folder of runs, labels and outcomes; what is in it is not done again.
        seeds: of training.
        jobs: runs at a time; with 0 nothing is run, and what is there is written.
        quick: few phantom patients and steps: to see that everything runs.
        settings: in place of the demo's, on the phantom.
        model: asked in place of the paper's. None: the paper's; tables whose model has no place are left out.

    Raises ConfigError for an unknown name.
    """
    chosen = choose(list(names), model)
    if on == PHANTOM:
        all_settings = (*(_QUICK_SETTINGS if quick else ()), *settings)
        places = phantom_places(out, all_settings, lambda done, total: None, QUICK if quick else None)
    else:
        places = read_places(Path(on), out)
    for experiment in (one for one in chosen if one.asks and one.model not in places.models):
        say(f"left out: {experiment.name}: models.{experiment.model} has no place; --model NAME asks one that is there")
    chosen = [one for one in chosen if not one.asks or one.model in places.models]
    absent = run_all(plan(places, out, chosen, seeds), jobs, say)
    for name, why in absent.items():
        say(f"left out: {name}: {why}")
    outcomes = {experiment.name: _write(places, out, experiment, seeds) for experiment in chosen}
    for name in (name for name, outcome in outcomes.items() if outcome is None):
        say(f"left out: {name}: nothing of it was measured")
    return list(filter(None, outcomes.values()))


def _write(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Outcome | None:
    if experiment.kind == "cases":
        return _cases(places, out, experiment, seeds[0])
    table = _table(places, out, experiment, seeds)
    if all(cell.ours is None for row in table.cells for cell in row):
        return None
    file = out / f"{experiment.name}.md"
    plot = draw(experiment, table) if experiment.drawn else None
    picture = write_atomic(file.with_suffix(".svg"), plot) if plot else None
    write_atomic(file.with_suffix(".json"), as_json(table).encode())
    write_atomic(file, as_markdown(table, picture.name if picture else None).encode())
    return Outcome(file, as_markdown(table), picture)


def _table(places: Places, out: Path, experiment: Experiment, seeds: Sequence[int]) -> Table:
    if experiment.kind == "counts":
        return counts_table(places, experiment)
    if experiment.kind == "settings":
        return settings_table(places, experiment)
    return results_table(places, out, experiment, seeds)


def _cases(places: Places, out: Path, experiment: Experiment, seed: int) -> Outcome | None:
    """The report's cases: the same questions by all models, with their attention; None without their answers."""
    column = experiment.columns[0]
    if column.data not in places.data:
        return None
    runs = [run_of(places, out, experiment, row, column, seed).answers(row.decode) for row in experiment.rows]
    if not all(RunFolder(run).results.is_file() for run in runs):
        return None
    title, file = f"{experiment.name}: {experiment.title}", out / f"{experiment.name}.html"
    page = Page(
        title,
        f"a3tune reproduce {experiment.name}",
        {run.name: row.title for run, row in zip(runs, experiment.rows, strict=True)},
        reference=runs[-2].name,
        synthetic=places.stand_in,
    )
    write_report(runs, file, page, read_settings(RunFolder(runs[-1]).evaluation))
    return Outcome(file, f"{title}: {file}")
