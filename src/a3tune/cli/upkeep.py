"""What a run leaves on the disk."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo


@app.command()
def clean(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete the checkpoints of a finished run, and what killed commands left half made; asks first.

    Adapters, answers, scores, labels, settings and the log stay.

    Example: `a3tune clean runs/mine`
    """
    from a3tune.commands.clean import clean as delete
    from a3tune.commands.clean import leftovers

    found = leftovers(run)
    if not found:
        echo(f"{run}: nothing to delete")
        return
    for one in found:
        echo(f"{one.nbytes / 1e6:10,.1f} MB  {one.path}")
    if not yes and not typer.confirm("Delete?"):
        echo("Nothing was deleted")
        return
    delete(run, found)
    echo(f"{sum(one.nbytes for one in found) / 1e6:,.1f} MB deleted")
