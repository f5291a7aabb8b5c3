"""`a3tune reproduce`: the paper's tables and figures."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import quieten


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="table1, fig5, ..., or all.")] = None,
    on: Annotated[
        str, typer.Option(metavar="phantom|FILE.yaml", help="Synthetic scans, or where models and data sets are.")
    ] = "phantom",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Runs, labels and outcomes.")] = Path("runs/paper"),
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Of training. Repeatable.")] = None,
    jobs: Annotated[
        int,
        typer.Option(min=0, help="Runs at a time, each on a CUDA device of its own; 0: only write what is there."),
    ] = 1,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="On the phantom: a setting. Repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of those in FILE.yaml, in place of the one that the paper asks.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few scans and steps: to see that everything runs.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the tables and figures.")] = False,
) -> None:
    """Reproduce the paper's tables and figures, each beside its published numbers.

    A run that several of them need is made once. Stop it when you like: the same command, with the same --out, goes on.

    Example: `a3tune reproduce fig8 table2`, or with the real models and data: `a3tune reproduce all --on places.yaml`
    """
    if show or not names:
        from a3tune.reproduce.experiments import experiments

        for name, experiment in experiments().items():
            echo(f"{name:8} {experiment.title}")
        return
    from a3tune.machine.files import check_place
    from a3tune.reproduce.experiments import choose
    from a3tune.reproduce.places import check_places

    check_place(out)
    check_places(on, setting or (), choose(names, model), runs=jobs > 0)
    quieten()
    from a3tune.reproduce.run import reproduce

    for outcome in reproduce(names, on, out, seed or [0], jobs, echo, quick=quick, settings=setting or (), model=model):
        echo(outcome.text)
        if outcome.picture:
            echo(f"Picture: {outcome.picture}\n")
