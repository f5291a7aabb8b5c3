"""Evaluated runs -> one page about them, or a table. Reads what the runs left; loads no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from a3tune.config import RunConfig
from a3tune.config.public import public_settings
from a3tune.data.rows import read_rows, read_split
from a3tune.errors import DataError, RunError
from a3tune.evaluation.predictions import read_cost
from a3tune.evaluation.results import classes
from a3tune.machine.files import write_atomic
from a3tune.report.formats import written
from a3tune.report.gather import EvaluatedRun, counts, question_only, read_run, run_results, stored_quality
from a3tune.report.measured import alike, measured_over
from a3tune.report.records import Cases, ReportData
from a3tune.report.table import comparison_table
from a3tune.run.folder import RunFolder, read_json, read_settings
from a3tune.types import Sample


@dataclass(frozen=True, slots=True)
class Page:
    """What a report says besides what its runs left."""

    title: str
    command: str
    """That makes the page again."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of the runs, by the names of their folders; the others are called by these names."""
    reference: str | None = None
    """Run that the others are compared with; None is the first."""
    shown: str | None = None
    """Run whose cases are drawn; None is the last."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    synthetic: bool = False


def write_report(runs: Sequence[Path], out: Path, page: Page) -> ReportData:
    """One page about evaluated runs, in this order.

    Raises RunError when a folder holds no evaluated run, two have one name, or the runs answered different questions.
    """
    folders = _named(runs)
    reference, shown = page.reference or next(iter(folders)), page.shown or list(folders)[-1]
    configs = {name: _evaluation(folder) for name, folder in folders.items()}
    config = configs[shown]
    from a3tune.report.html import render  # imports matplotlib, which is slow: after the checks

    samples = read_split(config.data, "test")
    evaluated = [read_run(name, page.titles.get(name, name), folder, samples) for name, folder in folders.items()]
    data = ReportData(
        title=page.title,
        results=run_results(evaluated, samples, reference, attention_alike=_alike(configs)),
        reference=reference,
        counts=counts(samples),
        seeds=1,
        command=page.command,
        settings=public_settings(config),
        seconds=page.seconds,
        tau=config.evaluation.tau,
        normalisation=config.evaluation.normalisation,
        question_only=question_only(read_rows(config.data.train), samples) if config.data.train else None,
        labels=stored_quality(config),
        cases=_cases(config, evaluated, samples, shown, reference) if shown != reference else None,
        synthetic=page.synthetic,
        attention_alike=_alike(configs),
        notes=(_measured(configs, page.titles),),
        environment=_environment(folders[shown]),
    )
    write_atomic(out, render(data).encode())
    return data


def compare(runs: Sequence[Path], forms: Sequence[str], by: str | None = None) -> list[str]:
    """A table of evaluated runs in this order, compared with the first, in each of `forms` (`report.table.FORMATS`).

    `by` is a field of `meta`: a table for each of its values.

    Raises as `write_report`; DataError when no question has the field.
    """
    folders = _named(runs)
    reference = next(iter(folders))
    configs = {name: _evaluation(folder) for name, folder in folders.items()}
    samples = read_split(configs[reference].data, "test")
    evaluated = [read_run(name, name, folder, samples) for name, folder in folders.items()]
    costs = {name: read_cost(folder) for name, folder in folders.items()}
    indices_of = {"": list(range(len(samples)))} if by is None else classes(samples, by)
    if not indices_of:
        known = sorted({name for sample in samples for name in sample.meta})
        raise DataError(f"meta.{by}: expected a field of the questions, they have {', '.join(known) or 'none'}")
    tables, same, note = [], _alike(configs), _measured(configs, {})
    for value, indices in indices_of.items():
        part = [replace(run, predictions=tuple(run.predictions[index] for index in indices)) for run in evaluated]
        results = run_results(part, [samples[index] for index in indices], reference, attention_alike=same)
        tables.append(comparison_table(results, reference, title=value, costs=costs, note=note, attention_alike=same))
    return [written(tables, form) for form in forms]


def _named(runs: Sequence[Path]) -> dict[str, RunFolder]:
    folders = {path.resolve().name: RunFolder.open(path) for path in runs}
    if len(folders) < len(runs):
        raise RunError(f"runs: expected folders of different names, got {', '.join(map(str, runs))}; rename one")
    return folders


def _evaluation(folder: RunFolder) -> RunConfig:
    path = folder.evaluation
    if not path.is_file():
        raise RunError(f"{folder.path}: holds no {path.name}: it was not evaluated; use `a3tune eval` first")
    return read_settings(path)


def _alike(configs: Mapping[str, RunConfig]) -> bool:
    return alike(config.active_evaluation for config in configs.values())


def _measured(configs: Mapping[str, RunConfig], titles: Mapping[str, str]) -> str:
    return measured_over({titles.get(name, name): config.active_evaluation for name, config in configs.items()})


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
