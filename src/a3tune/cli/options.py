"""What several commands share: options, a dry run, quiet libraries, and the refusal to replace a file."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from a3tune.cli.app import echo
from a3tune.errors import RunError
from a3tune.machine import processes
from a3tune.text import visible

if TYPE_CHECKING:
    from a3tune.config import RunConfig

LISTED = 20
"""Most lines of one kind on the screen."""


def _settings(incomplete: str) -> list[str]:
    """Names of settings for the shell's Tab."""
    from a3tune.config.reading import keys

    return [f"{key}=" for key in keys() if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as labels.top_k=2.", autocompletion=_settings),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings as YAML; --dry-run prints all of them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the settings and what would happen; touch nothing.")]
Data = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Questions about images, one JSON object per line.")]
Adapter = Annotated[str, typer.Option(metavar="DIR|none", help="Folder of a trained adapter; none: the base model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def refuse_existing(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise RunError(f"{out}: is there already; choose another --out, or replace it with --force")


def echo_left_out(what: str, lines: Sequence[str]) -> None:
    """How many things were left out, and why the first of them, on standard error."""
    if lines:
        echo(f"{len(lines):,} {what}:", err=True)
    for line in lines[:LISTED]:
        echo(f"  {line}", err=True)
    if len(lines) > LISTED:
        echo(f"  and {len(lines) - LISTED:,} more", err=True)


def load_settings(config: Path | None, overrides: Sequence[str]) -> "RunConfig":
    """`config.load_config`, imported here: pydantic is as slow to import as all the rest of the help."""
    from a3tune.config import load_config

    return load_config(config, overrides)


def show_dry_run(settings: "RunConfig", what: str) -> None:
    from a3tune.config import dump_config

    echo(dump_config(settings) + f"\n# Would {what}.")


class _Visible(logging.Formatter):
    """Warnings name files and quote values: they are shown as `echo` shows a line."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def quieten() -> None:
    """Keep the bars and notices of the libraries below off the screen, and all but the first of several processes."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # read at the import
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()
    shown = logging.StreamHandler()
    shown.setFormatter(_Visible())
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if processes.index() > 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
