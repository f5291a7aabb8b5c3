"""The application that the commands are added to: errors, exit codes, version."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from a3tune import __version__
from a3tune.errors import A3TuneError
from a3tune.machine.signals import told
from a3tune.text import visible

MISTAKE = 2
"""Exit code for what a user can mend. That of a signal is the one of `told`; a bug of ours ends with a traceback and
code 1."""


ORDER = (
    *("demo", "data", "convert", "label", "train", "eval", "compare", "ask", "app", "serve"),
    *("report", "merge", "clean", "sweep", "reproduce"),
)
"""Order of the commands in the help: as a user comes to need them. All others come after these."""


def echo(text: object, *, err: bool = False) -> None:
    """Print a line, on standard error if `err`; every command prints with this.

    Answers, names and paths may hold anything: what a terminal would obey instead of showing it is shown by its code.
    """
    typer.echo(visible(str(text)), err=err)


class _Commands(TyperGroup):
    """Turns the errors of `a3tune.errors`, and signals that ask to stop, into a message without traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _telling():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _telling():
            return super().invoke(ctx)


@contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except A3TuneError as error:
        echo(f"a3tune: {error}", err=True)
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt as stop:
        raise typer.Exit(told(stop)) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"a3tune {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Fine-tune a vision-language model that looks at the region the question asks about.

    New here? `a3tune demo` shows everything on synthetic scans in about six minutes, without any download.

    Your own data: `data` prepares it, `label` finds where to look, `train` fine-tunes, `eval` measures, `report`
    compares, `ask` tries it.
    """
