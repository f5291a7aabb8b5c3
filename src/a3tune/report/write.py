"""Evaluated runs -> one page about them, or a table. Reads what the runs left; loads no model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from a3tune.config import DataConfig, RunConfig
from a3tune.config.public import public_settings
from a3tune.config.settings import LABEL_MAKING
from a3tune.data.images import split_fragment
from a3tune.data.paths import within
from a3tune.data.rows import read_rows, read_split
from a3tune.errors import DataError, ModelError, RunError
from a3tune.evaluation.predictions import read_cost
from a3tune.evaluation.results import classes
from a3tune.machine.files import write_atomic
from a3tune.metrics.catalogue import Kind
from a3tune.models import check_at_hand
from a3tune.report.formats import written
from a3tune.report.gather import EvaluatedRun, counts, question_only, read_runs, run_results, stored_quality
from a3tune.report.measured import cut_at, measured_by_hiding, measured_over, unlike
from a3tune.report.records import Cases, ReportData
from a3tune.report.table import comparison_table
from a3tune.report.tests import right_by_test
from a3tune.run.folder import RunFolder, read_json, read_settings
from a3tune.run.names import named_runs
from a3tune.run.neighbour import LEFT_OUT, rows_named, taken_over
from a3tune.types import Sample


@dataclass(frozen=True, slots=True)
class Page:
    """What a report says besides what its runs left."""

    title: str
    command: str
    """That makes the page again."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of the runs, by their names (`run.names`); the others are called by these names."""
    tests: Mapping[str, str] = field(default_factory=dict)
    """Of the tests that questions name (`meta.test`): how a sentence says where; the others stand by their names."""
    reference: str | None = None
    """Run that the others are compared with; None is the first."""
    shown: str | None = None
    """Run that the first sentence and the cases are about; None is the last."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    synthetic: bool = False


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    page: Page,
    given: RunConfig | None = None,
    rows: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ReportData:
    """One page about evaluated runs, in this order.

    Args:
        runs: folders, or `NAME=FOLDER` (`run.names`).
        given: settings that the user vouches for, such as `config.yaml` of a run of their own: its model, labels and
            rows are taken. None: those of the shown run, as far as it may be another's (`run.neighbour`).
        rows: the test questions, which the user vouches for; None: those of `given`, else those that the shown run
            names. Of the latter no case is drawn if they name an image outside of their folder.
        say: told what the page lacks for that reason.

    Raises RunError when a folder holds no evaluated run, two have one name, or the runs answered different questions.
    """
    folders = named_runs(runs)
    reference, shown = page.reference or next(iter(folders)), page.shown or list(folders)[-1]
    configs = {name: _evaluation(folder) for name, folder in folders.items()}
    config = configs[shown]
    sources = given or _unvouched(config, folders[shown], say)
    own_rows = rows or (given.data.test if given else None)
    sources = replace(sources, data=replace(sources.data, test=own_rows or config.data.test))
    rows_named(sources.data, folders[shown].evaluation)
    from a3tune.report.html import render  # imports matplotlib, which is slow: after the checks

    samples = read_split(sources.data, "test")
    drawn = shown != reference and (
        (given is not None or _at_hand(sources, folders[shown], say))
        and (own_rows is not None or _inside(sources.data.test, samples, say))
    )
    titles = {name: page.titles.get(name, name) for name in folders}
    evaluated = read_runs(folders, titles, samples, images=drawn)
    train = read_rows(sources.data.train) if sources.data.train else None
    differ, notes = _measured(configs, evaluated)
    answers = {run.name: run.predictions for run in evaluated}
    by_test = right_by_test(answers, samples, reference) if "answer" not in differ else {}
    data = ReportData(
        title=page.title,
        results=run_results(evaluated, samples, reference, unlike=differ),
        reference=reference,
        shown=shown,
        counts=counts(samples),
        seeds=1,
        command=page.command,
        settings=public_settings(config),
        seconds=page.seconds,
        tau=config.evaluation.tau,
        normalisation=config.evaluation.normalisation,
        tests={
            page.tests.get(test, f"in {test}"): found
            for test, found in by_test.items()
            if math.isfinite(found[shown].share.mean)  # reports are neither right nor wrong
        },
        question_only=question_only(train, samples) if train else None,
        labels=stored_quality(sources, train) if train else None,
        cases=_cases(sources, evaluated, samples, shown, reference) if drawn else None,
        synthetic=page.synthetic,
        unlike=differ,
        notes=notes,
        environment=_environment(folders[shown]),
    )
    write_atomic(out, render(data).encode())
    return data


def compare(
    runs: Sequence[str | Path], forms: Sequence[str], by: str | None = None, rows: Path | None = None
) -> list[str]:
    """A table of evaluated runs in this order, compared with the first, in each of `forms` (`report.table.FORMATS`).

    Args:
        runs: folders, or `NAME=FOLDER` (`run.names`).
        by: a field of `meta`: a table for each of its values.
        rows: the questions; None: those that the first run names.

    Raises as `write_report`; DataError when no question has the field.
    """
    folders = named_runs(runs)
    reference = next(iter(folders))
    configs = {name: _evaluation(folder) for name, folder in folders.items()}
    data = DataConfig(test=rows) if rows else configs[reference].data
    samples = read_split(rows_named(data, folders[reference].evaluation), "test")
    evaluated = read_runs(folders, {name: name for name in folders}, samples)
    costs = {name: read_cost(folder) for name, folder in folders.items()}
    indices_of = {"": list(range(len(samples)))} if by is None else classes(samples, by)
    if not indices_of:
        known = sorted({name for sample in samples for name in sample.meta})
        raise DataError(f"meta.{by}: expected a field of the questions, they have {', '.join(known) or 'none'}")
    differ, notes = _measured(configs, evaluated)
    tables = []
    for value, indices in indices_of.items():
        part = [replace(run, predictions=tuple(run.predictions[index] for index in indices)) for run in evaluated]
        results = run_results(part, [samples[index] for index in indices], reference, unlike=differ)
        note = " ".join(notes)
        tables.append(comparison_table(results, reference, title=value, costs=costs, note=note, unlike=differ))
    return [written(tables, form) for form in forms]


def _evaluation(folder: RunFolder) -> RunConfig:
    path = folder.evaluation
    if not path.is_file():
        raise RunError(f"{folder.path}: holds no {path.name}: it was not evaluated; use `a3tune eval` first")
    return read_settings(path)


def _unvouched(config: RunConfig, run: RunFolder, say: Callable[[str], None]) -> RunConfig:
    """What may be taken of the settings beside answers, the rows that these name, and their store of labels: it is
    asked for numbers alone."""
    settings, left_out = taken_over(config, RunConfig(), labels=True)
    labels = replace(settings.labels, store=config.labels.store)
    if left_out := [name for name in left_out if name.removeprefix("labels.") in LABEL_MAKING]:
        say(f"{run.evaluation}: {', '.join(left_out)} left out: {LEFT_OUT}")
        labels = replace(labels, source="none")
    return replace(settings, labels=labels, data=config.data, output=run.path)


def _at_hand(config: RunConfig, run: RunFolder, say: Callable[[str], None]) -> bool:
    """Whether the model, whose image tokens the cases are drawn with, is here."""
    try:
        check_at_hand(config.model.path, run.evaluation)
    except ModelError as error:
        say(f"no cases: {error}, in a file for --config")
        return False
    return True


def _inside(rows: Path | None, samples: Sequence[Sample], say: Callable[[str], None]) -> bool:
    """Whether all images lie in the folder of the rows: others may be anything that a stranger wants to see."""
    assert rows is not None  # they were read
    folder = rows if rows.is_dir() else rows.parent
    paths = [sample.image for sample in samples if isinstance(sample.image, Path)]
    outside = [path for path in paths if not within(folder, split_fragment(path)[0])]
    if outside:
        say(f"no cases: {rows} names images outside of its folder ({outside[0]}). If the rows are yours: --data {rows}")
    return not outside


def _measured(
    configs: Mapping[str, RunConfig], evaluated: Sequence[EvaluatedRun]
) -> tuple[Mapping[Kind, str], tuple[str, ...]]:
    """Kinds of metrics that the runs measured in different ways, with the reason, and how they were measured."""
    settings = {run.title: configs[run.name].active_evaluation for run in evaluated}
    hidings = {run.title: run.hiding for run in evaluated}
    notes = (cut_at(settings), measured_over(settings), measured_by_hiding(hidings))
    return unlike(settings, hidings), tuple(filter(None, notes))


def _cases(
    config: RunConfig, evaluated: Sequence[EvaluatedRun], samples: Sequence[Sample], shown: str, reference: str
) -> Cases:
    from a3tune.report.case_views import make_cases  # asks the models for the boxes of their tokens

    return make_cases(config, evaluated, samples, shown, reference)


def _environment(folder: RunFolder) -> dict[str, str]:
    if not folder.environment.is_file():
        return {}
    written_then = read_json(folder.environment, "delete it")
    flat = {name: value for name, value in written_then.items() if isinstance(value, str | int)}
    packages = written_then.get("packages")
    flat |= packages if isinstance(packages, dict) else {}
    return {name: str(value) for name, value in flat.items()}
