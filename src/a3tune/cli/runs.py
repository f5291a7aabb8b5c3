"""Training, answering, measuring and comparing."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from a3tune.cli.app import MISTAKE, app, echo
from a3tune.cli.options import (
    Adapter,
    ConfigFile,
    Data,
    DryRun,
    Force,
    Overrides,
    load_settings,
    quieten,
    refuse_existing,
    show_dry_run,
)
from a3tune.cli.progress import bar
from a3tune.errors import ConfigError, RunError

if TYPE_CHECKING:
    from a3tune.config import RunConfig
    from a3tune.metrics.stats import Estimate

NO_ADAPTER = "none"
ALL = "all"
Rows = Annotated[
    Path | None,
    typer.Option(metavar="DATA.jsonl", help="The questions that the runs answered; else where their settings say."),
]
Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN|NAME=RUN...", help="Evaluated runs, called NAME; the others are compared with the first."
    ),
]
SHOWN = ".md"
"""The form of a table on the screen."""


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; a short probe chooses.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train and compare LoRA and A3Tune on synthetic scans; ends with a report.

    Example: `a3tune demo`, or a quick look: `a3tune demo patients.train=20 patients.test=10 training.epochs=1`
    """
    from a3tune.demo.plan import plan_demo

    plan = plan_demo(out, overrides or ())
    if dry_run:
        show_dry_run(
            plan.configs["a3tune"], f"run {', '.join(plan.stages())} in {out}, as far as they are not finished"
        )
        return
    from a3tune.commands.checks import check_demo

    check_demo(plan.configs.values(), out)
    quieten()
    from a3tune.demo.run import run_demo
    from a3tune.machine.threads import choose_threads

    echo(f"Threads: {choose_threads(threads)}")
    report = run_demo(plan, echo, bar)
    echo(f"Report: {report}")


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    timed_steps: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: take so many steps, and say how long all would take.")
    ] = None,
) -> None:
    """Fine-tune an adapter; a run that was stopped goes on.

    Needs data.train and, unless labels.source is truth or none, the labels of `a3tune label`. With data.train a dry run
    also looks at rows, labels and model, and says how many steps and how much memory it would take.

    Example: `a3tune train data.train=train.jsonl labels.store=labels output=runs/mine`
    """
    from a3tune.commands.settings import training_settings

    settings = training_settings(config, overrides or ())
    if dry_run and settings.data.train is None:
        show_dry_run(
            settings, f"train an adapter ({settings.adapter.kind}) in {settings.output}; data.train is missing"
        )
        return
    from a3tune.commands.checks import check_train

    check_train(settings)
    quieten()
    if dry_run:
        show_dry_run(
            settings, f"train an adapter ({settings.adapter.kind}) on {settings.data.train} in {settings.output}"
        )
        from a3tune.commands.foresee import foresee

        for line in foresee(settings, timed_steps):
            echo(f"# {line}")
        return
    if timed_steps:
        raise ConfigError("--timed-steps: expected with --dry-run, which takes a few steps and keeps nothing of them")
    from a3tune.commands.train import fine_tune
    from a3tune.run.folder import RunFolder
    from a3tune.training.best import read_best

    with bar("Training") as progress:
        folder = RunFolder(fine_tune(settings, progress, lambda line: echo(line, err=True), progress.note))
    echo(f"Adapter: {folder.adapter}")
    if best := read_best(folder):
        echo(f"Best: {folder.best} ({best.score} {best.value:.4g} after step {best.step})")


@app.command("eval")
def evaluate(
    data: Data,
    adapter: Annotated[
        list[str],
        typer.Option(metavar="DIR|none", help="Folder of a trained adapter; none: the base model. Repeatable."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Run folder of the answers and scores; with several, theirs are in it.")
    ],
    overrides: Overrides = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD|all", help="Decoding method: greedy, vcd, opera, ...; all of them. Repeatable."),
    ] = None,
    occlude: Annotated[
        bool,
        typer.Option("--occlude", help="Also ask with the region hidden, with all but it, and with as much elsewhere."),
    ] = False,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Answer questions and measure the answers, and the attention where true regions are known.

    Without --config, an adapter brings the settings it was trained with, but for folders of programs, other models and
    data.

    Several adapters or methods end in a table that compares them with the first. What one of them cannot do, or fails
    at, is listed below it; the others go on.

    With --occlude it also measures what the answers rest on, of true regions or else of weak labels. It asks ten
    times instead of once. An evaluation that is there already is extended.

    Example: `a3tune eval test.jsonl --adapter runs/mine/adapter --out runs/mine`
    """
    given = [*(overrides or ()), f"data.test={data}", f"output={out}"]
    given += [f"evaluation.decode={name}" for name in decode or () if name != ALL]
    given += ["evaluation.occlude=true"] if occlude else []
    chosen = with_adapters(adapter, config, given)
    folder, settings = chosen[0]
    models = [str(folder or run.model.path) for folder, run in chosen]
    if dry_run:
        show_dry_run(settings, f"answer {data} with {' and '.join(models)} in {out}")
        return
    from a3tune.commands.checks import check_evaluate
    from a3tune.decoding import DECODERS

    methods = list(DECODERS) if decode and ALL in decode else decode or [settings.evaluation.decode]
    titles = adapter_titles([folder for folder, _ in chosen])
    if len(set(titles)) < len(titles):
        raise RunError(f"--adapter: expected runs with different names, got {', '.join(models)}")
    check_evaluate(chosen, methods)
    quieten()
    from a3tune.commands.evaluate import by_difference, evaluate_all, evaluate_run
    from a3tune.commands.subject import Subject
    from a3tune.report.write import compare

    if len(adapter) > 1 or len(decode or ()) > 1 or decode == [ALL]:
        subjects = {title: Subject(run, folder) for title, (folder, run) in zip(titles, chosen, strict=True)}
        with bar("Answering") as progress:
            done = evaluate_all(subjects, methods, by_difference(out, subjects, methods), progress)
        if done.runs:
            echo(compare(done.runs, [SHOWN])[0])
        for name, reason in done.absent.items():
            echo(f"left out: {name}: {reason}", err=True)
        for name, error in done.failed.items():
            echo(f"failed: {name}: {error}", err=True)
        if done.failed or not done.runs:
            raise typer.Exit(MISTAKE)
        return
    with bar("Answering") as progress:
        results = evaluate_run(settings, folder, progress)
    for name, score in results.metrics.items():
        echo(f"{name:32} {_score(score)}  n = {score.count}")
    for name, reason in results.absent.items():
        echo(f"absent: {name}: {reason}", err=True)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="In quotes.")],
    image: Annotated[Path, typer.Option(metavar="FILE", help="PNG, JPEG, TIFF, ...")],
    adapter: Adapter = NO_ADAPTER,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Picture of where the model looked.")] = Path(
        "heat.png"
    ),
    force: Force = False,
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Ask one question about one image; prints the answer and draws where the model looked.

    Example: `a3tune ask --adapter runs/mine/adapter --image scan.png "Is there a lesion in the liver?"`
    """
    ((folder, settings),) = with_adapters([adapter], config, overrides or [])
    refuse_existing(out, force)
    if dry_run:
        show_dry_run(settings, f"ask {folder or settings.model.path} about {image}, answer here, picture in {out}")
        return
    from a3tune.commands.checks import check_ask

    check_ask(settings, folder, image)
    quieten()
    from a3tune.commands.ask import ask

    echo(ask(settings, folder, image, question, out))


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page.")] = Path("report.html"),
    data: Rows = None,
    config: ConfigFile = None,
    force: Force = False,
) -> None:
    """Compare evaluated runs on one self-contained page.

    A run may be another's: images outside of the folder of its rows are drawn if you name the rows by --data, labels
    and their models are taken if you name the settings by --config (of a run of your own: RUN/config.yaml).

    Runs are called by their folders' names, or as you say: `LoRA=runs/lora`.

    Example: `a3tune report runs/lora runs/mine --out report.html`
    """
    refuse_existing(out, force)
    given = load_settings(config, ()) if config else None
    quieten()
    from a3tune.report.write import Page, write_report

    page = Page("A3Tune report", " ".join(["a3tune report", *runs]))
    write_report(runs, out, page, given, data, lambda line: echo(line, err=True))
    echo(f"Report: {out}")


@app.command()
def compare(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table: .md, .tex or .csv says how.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="A table for each value of a field of meta: modality, organ, ..."),
    ] = None,
    data: Rows = None,
    force: Force = False,
) -> None:
    """Compare evaluated runs in a table like the paper's: intervals, significance, cost.

    Runs are called by their folders' names, or as you say: `LoRA=runs/lora`.

    Example: `a3tune compare runs/greedy runs/vcd runs/opera --out table.tex`
    """
    from a3tune.report.table import FORMATS

    form = out.suffix if out else SHOWN
    if form not in FORMATS:
        raise RunError(f"{out}: expected a name that ends in {', '.join(FORMATS)}")
    if out:
        refuse_existing(out, force)
    from a3tune.machine.files import write_atomic
    from a3tune.report.write import compare

    shown, written = compare(runs, [SHOWN, form], by, data)
    echo(shown)
    if out:
        write_atomic(out, written.encode())
        echo(f"Table: {out}")


def _score(score: "Estimate") -> str:
    """Mean and interval in columns; a dash where there is none."""
    mean, low, high = (f"{value:.3f}" if isfinite(value) else "-" for value in (score.mean, score.low, score.high))
    return f"{mean:>7}  {f'[{low}, {high}]' if isfinite(score.low) else '-':14}"


def adapter_titles(adapters: Sequence[Path | None]) -> list[str]:
    """What models are called beside each other: by their runs (`run.names.told_apart`), as parts of file names."""
    from a3tune.run.names import told_apart

    runs = [path.parent if path.name == "adapter" else path for one in adapters if one for path in [one.resolve()]]
    titles = iter(told_apart(runs))
    return ["base" if one is None else next(titles).replace("/", "-") for one in adapters]


def with_adapters(
    adapters: Sequence[str], config: Path | None, overrides: list[str], *, labels: bool = False
) -> "list[tuple[Path | None, RunConfig]]":
    """`commands.settings.model_settings`, imported here: the help needs no settings."""
    from a3tune.commands.settings import model_settings

    folders = [None if adapter == NO_ADAPTER else Path(adapter) for adapter in adapters]
    return model_settings(folders, config, overrides, lambda text: echo(text, err=True), labels=labels)
