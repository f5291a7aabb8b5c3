"""Thin commands: options in, one function of `commands.py` or `demo.py`, a line out. No logic.

Whatever needs PyTorch is imported inside the commands, so that help is there at once.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from a3tune import __version__
from a3tune.config import RunConfig, dump_config, load_config
from a3tune.errors import A3TuneError, RunError

if TYPE_CHECKING:
    from a3tune.commands import Progress as Callback

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: of what a user can mend, and of Ctrl-C. A bug of ours ends with a traceback and 1."""
NO_ADAPTER = "none"


class _Commands(TyperGroup):
    """Turns the errors of `a3tune.errors`, and Ctrl-C, into a message without traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except A3TuneError as error:
            typer.echo(f"a3tune: {error}", err=True)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt as stop:
            how = str(stop) or "interrupted; what is finished is kept, and the same command goes on from there"
            typer.echo(f"\na3tune: {how}", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as labels.top_k=2.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings as YAML; --dry-run prints all of them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and what would happen; touch nothing.")]
Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Questions about images, one JSON object per line.")]
Adapter = Annotated[str, typer.Option(metavar="DIR|none", help="Folder of a trained adapter; none: the base model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def main() -> None:
    """Entry point of the command `a3tune`."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"a3tune {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Fine-tune a vision-language model that looks at the region the question asks about.

    New here? `a3tune demo` shows everything on synthetic scans in about twelve minutes, without any download.

    Your own data: `label` finds where to look, `train` fine-tunes, `eval` measures, `report` compares, `ask` tries it.
    """


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
    _quieten()
    from a3tune.demo import plan_demo, run_demo
    from a3tune.threads import choose_threads

    plan = plan_demo(out, overrides or ())
    if dry_run:
        _dry_run(plan.configs["a3tune"], f"run {', '.join(plan.stages())} in {out}, as far as they are not finished")
        return
    typer.echo(f"Threads: {choose_threads(threads)}")
    report = run_demo(plan, typer.echo, _bar)
    typer.echo(f"Report: {report}")


@app.command()
def label(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="STORE", help="Folder of the labels.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Find the regions that each question may be about (weak labels, section 4.1 of the paper).

    Every image is cut into segments, and these are ranked by the question. Nothing is made twice.

    Example: `a3tune label train.jsonl --out labels`
    """
    settings = load_config(config, [*(overrides or ()), f"data.train={data}", f"labels.store={out}"])
    if dry_run:
        _dry_run(settings, f"label the images of {data} into {out}, as far as they are not in there")
        return
    _quieten()
    from a3tune.commands import label

    with _bar("Finding regions") as progress:
        run, quality = label(settings, progress)
    typer.echo(f"{run.images} images, {run.proposed} of them cut into segments now; {run.ranked} rankings made now")
    if "all" in quality:
        found = quality["all"]
        typer.echo(
            f"The true region is among the best {settings.labels.top_k} for {100 * found.recall:.0f} % of the regions "
            f"(at most {100 * found.ceiling_recall:.0f} % with all segments); mean best overlap {found.best_iou:.2f}"
        )
    for image, reason in run.failures.items():
        typer.echo(f"failed: {image}: {reason}", err=True)
    if run.failures:
        raise typer.Exit(1)


@app.command()
def train(overrides: Overrides = None, config: ConfigFile = None, dry_run: DryRun = False) -> None:
    """Fine-tune an adapter; a run that was stopped goes on.

    Needs data.train and, unless labels.source is truth or none, the labels of `a3tune label`.

    Example: `a3tune train data.train=train.jsonl labels.store=labels output=runs/mine`
    """
    settings = load_config(config, overrides or ())
    if dry_run:
        _dry_run(settings, f"train an adapter ({settings.adapter.kind}) on {settings.data.train} in {settings.output}")
        return
    _quieten()
    from a3tune.commands import fine_tune

    with _bar("Training") as progress:
        folder = fine_tune(settings, progress)
    typer.echo(f"Adapter: {folder / 'adapter'}")


@app.command("eval")
def evaluate(
    data: Data,
    adapter: Adapter,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Run folder of the answers and scores.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Answer questions and measure the answers, and the attention where true regions are known.

    Without --config, an adapter brings the settings it was trained with.

    Example: `a3tune eval test.jsonl --adapter runs/mine/adapter --out runs/mine`
    """
    folder, settings = _with_adapter(adapter, config, [*(overrides or ()), f"data.test={data}", f"output={out}"])
    if dry_run:
        _dry_run(settings, f"answer {data} with {folder or settings.model.path} in {out}")
        return
    _quieten()
    from a3tune.commands import measure

    with _bar("Answering") as progress:
        results = measure(settings, folder, progress)
    for name, found in results.metrics.items():
        typer.echo(f"{name:32} {found.mean:7.3f}  [{found.low:.3f}, {found.high:.3f}]  n = {found.count}")


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
    folder, settings = _with_adapter(adapter, config, overrides or [])
    _refuse_existing(out, force)
    if dry_run:
        _dry_run(settings, f"ask {folder or settings.model.path} about {image}, answer here, picture in {out}")
        return
    _quieten()
    from a3tune.commands import ask

    typer.echo(ask(settings, folder, image, question, out))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Evaluated runs; the others are compared with the first.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page.")] = Path("report.html"),
    force: Force = False,
) -> None:
    """Compare evaluated runs on one self-contained page.

    Example: `a3tune report runs/lora runs/mine --out report.html`
    """
    _refuse_existing(out, force)
    _quieten()
    from a3tune.commands import Page, write_report

    write_report(runs, out, Page("A3Tune report", " ".join(["a3tune report", *map(str, runs)])))
    typer.echo(f"Report: {out}")


def _with_adapter(adapter: str, config: Path | None, overrides: list[str]) -> tuple[Path | None, RunConfig]:
    """The adapter's folder, and the settings: of `config`, else those it was trained with, else the defaults."""
    folder = None if adapter == NO_ADAPTER else Path(adapter)
    beside = Path(adapter).parent / "config.yaml"
    trained_with = beside if folder is not None and beside.is_file() else None
    return folder, load_config(config or trained_with, overrides)


def _refuse_existing(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise RunError(f"{out}: is there already; choose another --out, or replace it with --force")


def _dry_run(settings: RunConfig, what: str) -> None:
    typer.echo(dump_config(settings) + f"\n# Would {what}.")


@contextmanager
def _bar(title: str) -> Iterator["Callback"]:
    """A progress bar on standard error while this is open; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _quieten() -> None:
    """Keep transformers' own bars and notices off the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
