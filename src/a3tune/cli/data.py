"""`a3tune data`: published data sets and users' masks, checked and brought into the public format."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import Data, Force, bar, echo_left_out, refuse_existing

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(data, name="data")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The data set as its authors publish it.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Of the data set; found out if left out.")]
Variant = Annotated[str | None, typer.Option(metavar="NAME", help="Of its splits, where it has several.")]


@data.callback()
def _about() -> None:
    """Check published data sets and bring them, or your own masks, into the format that everything here reads.

    Example: `a3tune data check Slake1.0`, then `a3tune data prepare Slake1.0 --out slake`
    """


@data.command()
def check(folder: Folder, name: Name = None, variant: Variant = None) -> None:
    """Say which data set a folder holds, count it beside the paper's Table 6, and list what is wrong by file.

    Example: `a3tune data check Slake1.0`
    """
    from a3tune.data.sets import check, format_check

    with bar("Reading") as progress:
        checked = check(folder, name, variant=variant, progress=progress)
    echo(format_check(checked))
    if not checked.ok:
        raise typer.Exit(1)


@data.command()
def prepare(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of train.jsonl, validation.jsonl and test.jsonl.")],
    name: Name = None,
    variant: Variant = None,
    force: Force = False,
) -> None:
    """Write a published data set as JSONL; its images stay where they are.

    Example: `a3tune data prepare Slake1.0 --out slake`
    """
    from a3tune.data.sets import DATA_SETS, detect, prepare

    name = name or detect(folder)
    for split in ("train", "validation", "test"):
        refuse_existing(out / f"{split}.jsonl", force)
    with bar("Reading") as progress:
        files = prepare(folder, out, name, variant=variant, progress=progress)
    for file in files.values():
        echo(file)
    echo(f"Label with: labels.query={DATA_SETS[name].query!r}")


@data.command()
def regions(
    rows: Data,
    masks: Annotated[Path, typer.Option(metavar="PATH", help="COCO or Label Studio JSON, PNG masks or NIfTI labels.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The rows with their regions.")],
    force: Force = False,
) -> None:
    """Give questions the regions that you have masks of, for `labels.source=truth` and for measuring attention.

    Example: `a3tune data regions train.jsonl --masks annotations.json --out train_regions.jsonl`
    """
    refuse_existing(out, force)
    from a3tune.data.annotations import attach_regions
    from a3tune.data.rows import read_rows, write_rows

    left_out: list[str] = []
    with bar("Attaching") as progress:
        samples = attach_regions(read_rows(rows), masks, progress=progress, say=left_out.append)
    write_rows(out, samples)
    echo_left_out("annotations", left_out)
    echo(f"{sum(bool(sample.regions) for sample in samples):,} of {len(samples):,} questions have regions: {out}")
