"""`a3tune label`: make region labels, look at them, take them elsewhere."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from a3tune.cli.app import app, echo
from a3tune.cli.options import (
    ConfigFile,
    Data,
    DryRun,
    Force,
    Overrides,
    echo_left_out,
    load_settings,
    quieten,
    refuse_existing,
    show_dry_run,
)
from a3tune.cli.progress import bar

MAKE = "make"
Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the labels.")]


class _Labels(TyperGroup):
    """`a3tune label DATA ...` without the name of a subcommand makes labels."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else [MAKE, *args])


labels = typer.Typer(
    cls=_Labels,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    # Options before the data belong to `make`, not to the group.
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
app.add_typer(labels, name="label")


@labels.callback()
def _about() -> None:
    """Find the regions that each question may be about (weak labels, section 4.1 of the paper).

    Example: `a3tune label train.jsonl --out labels`, then `a3tune label status labels`
    """


@labels.command(MAKE)
def make(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="STORE", help="Folder of the labels.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Make labels; the name `make` may be left out.

    Every image is cut into segments, and these are ranked by the question. Nothing is made twice.

    Example: `a3tune label train.jsonl --out labels labels.proposer=sam labels.weights=sam-vit-base`
    """
    settings = load_settings(config, [*(overrides or ()), f"data.train={data}", f"labels.store={out}"])
    if dry_run:
        if data.exists():
            from a3tune.commands.checks import check_query

            check_query(settings)
        show_dry_run(settings, f"label the images of {data} into {out}, as far as they are not in there")
        return
    from a3tune.commands.checks import check_label

    check_label(settings)
    quieten()
    from a3tune.commands.label import label

    with bar("Finding regions") as progress:
        run, quality = label(settings, progress, lambda line: echo(line, err=True))
    echo(f"{run.images} images, {run.proposed} of them cut into segments now; {run.ranked} rankings made now")
    if "all" in quality:
        total = quality["all"]
        echo(
            f"The true region is among the best {settings.labels.top_k} for {100 * total.recall:.0f} % of the regions "
            f"(at most {100 * total.ceiling_recall:.0f} % with all segments); mean best overlap {total.best_iou:.2f}"
        )
    for name, group in quality.items():
        if name != "all":
            echo(f"  {name:24}{100 * group.recall:4.0f} % (at most {100 * group.ceiling_recall:.0f} %)")
    for image, reason in run.failures.items():
        echo(f"failed: {image}: {reason}", err=True)
    if run.failures:
        raise typer.Exit(1)


@labels.command()
def status(store: Store) -> None:
    """Show what a label store holds and how it was made.

    Example: `a3tune label status labels`
    """
    from a3tune.labels.status import store_status

    content = store_status(store)
    if not content.finished:
        echo("not finished: the same `a3tune label` command goes on from here")
    for labels in content.finished:
        for name, value in labels.settings.items():
            echo(f"{name:16}{value}")
        for name in ("images", "segments", "rankings"):
            echo(f"{name:16}{getattr(labels, name):,}")
        for top_k, quality in labels.quality.items():
            found = f"{100 * quality.recall:.0f} % of the regions, at most {100 * quality.ceiling_recall:.0f} %"
            echo(f"{f'found in {top_k}':16}{found} with all segments; mean best overlap {quality.best_iou:.2f}")
        echo("")
    echo(f"{'size':16}{content.bytes / 1e6:,.1f} MB in {content.shards:,} files")
    for shard in content.damaged:
        echo(f"damaged: {shard}; delete it and label again", err=True)
    if content.damaged:
        raise typer.Exit(1)


@labels.command()
def show(
    store: Store,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page.")] = Path("labels.html"),
    count: Annotated[int, typer.Option(min=1, max=500, help="Questions on it, spread over the data.")] = 48,
    overrides: Overrides = None,
    config: ConfigFile = None,
    force: Force = False,
) -> None:
    """Show images, the regions kept and what ranked them, on one page: look at it before you train.

    Example: `a3tune label show labels train.jsonl --out labels.html`
    """
    from a3tune.commands.settings import label_settings

    run, said = label_settings(config, overrides or ())
    settings = run.labels
    refuse_existing(out, force)
    from a3tune.data.rows import read_rows
    from a3tune.labels.fitting import fitting_settings
    from a3tune.labels.sheet import write_sheet
    from a3tune.labels.store import LabelStore

    chosen = fitting_settings(store, settings, said)
    labels = LabelStore(store, chosen.name)
    done = write_sheet(labels, read_rows(data), out, count, top_k=settings.top_k, threshold=settings.threshold)
    echo(f"{done.segments:,} regions of {done.images:,} questions: {out}")
    echo_left_out("questions left out", [f"{sample}: {reason}" for sample, reason in done.skipped.items()])


@labels.command()
def export(
    store: Store,
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FILE|DIR", help="coco: a JSON file; overlays: a folder of PNGs.")],
    form: Annotated[
        Literal["coco", "overlays"], typer.Option("--format", help="COCO annotations, or the segments drawn on images.")
    ] = "coco",
    overrides: Overrides = None,
    config: ConfigFile = None,
    force: Force = False,
) -> None:
    """Write the labels of a data set for other tools, or to look at.

    Example: `a3tune label export labels train.jsonl --format overlays --out overlays`
    """
    from a3tune.commands.settings import label_settings

    run, said = label_settings(config, overrides or ())
    settings = run.labels
    refuse_existing(out, force)
    from a3tune.data.rows import read_rows
    from a3tune.labels.export import export_coco, export_overlays
    from a3tune.labels.fitting import fitting_settings
    from a3tune.labels.store import LabelStore

    write = {"coco": export_coco, "overlays": export_overlays}[form]
    chosen = fitting_settings(store, settings, said)
    done = write(
        LabelStore(store, chosen.name), read_rows(data), out, top_k=settings.top_k, threshold=settings.threshold
    )
    echo(f"{done.segments:,} segments on {done.images:,} images: {out}")
    for sample, reason in done.skipped.items():
        echo(f"left out: {sample}: {reason}", err=True)
