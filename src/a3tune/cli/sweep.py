"""`a3tune sweep`: settings compared on validation questions."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import ConfigFile, DryRun, Overrides, quieten, show_dry_run


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Runs, and sweep.md, sweep.json, sweep.svg.")],
    vary: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE,VALUE,...", help="A setting and its values. Repeatable: all pairs.")
    ],
    overrides: Overrides = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Of training. Repeatable; 0 if none is given.")] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC", help="Column of the table; the first one chooses. Repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on a CUDA device of its own.")] = 1,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Compare settings on validation questions, beside LoRA without alignment; never on the test.

    Needs data.train, data.validation and, unless labels.source is truth, the labels of `a3tune label`. Stop it when you
    like: the same command goes on.

    Example: `a3tune sweep -c settings.yaml --vary alignment.weight=0.1,0.3,1 --seed 0 --seed 1 --out runs/sweep`
    """
    from a3tune.machine.files import check_place
    from a3tune.reproduce.variations import DEFAULT_SCORES, check_sweep, settings_of, variations

    check_place(out)
    rows, given, scores = variations(vary), overrides or (), list(dict.fromkeys(score or DEFAULT_SCORES))
    seeds = list(dict.fromkeys(seed or [0]))
    check_sweep(rows, config, given, out, scores)
    if dry_run:
        named = "; ".join(row.title for row in rows)
        show_dry_run(
            settings_of(rows[0], config, given, seeds[0], out),
            f"train {len(rows) * len(seeds)} adapters in {out}, {len(seeds)} for each of: {named}",
        )
        return
    quieten()
    from a3tune.reproduce.sweep import Sweep
    from a3tune.reproduce.sweep import sweep as run

    echo(run(Sweep(rows, config, given, seeds, scores, out), jobs, echo))
    echo(f"Table and picture: {out}")
