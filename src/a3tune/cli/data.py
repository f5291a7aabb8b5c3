"""`a3tune data`: published data sets and users' masks, checked and brought into the public format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import Data, Force, Overrides, echo_left_out, quieten, refuse_existing
from a3tune.cli.progress import bar
from a3tune.errors import RunError, shown

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(data, name="data")

_SPLITS = ("train", "validation", "test", "rows")
"""Files of rows that an import or a preparation may write; `rows` where nothing is split."""
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The data set as its authors publish it.")]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="Of the data set; found out if left out.")]
Variant = Annotated[str | None, typer.Option(metavar="NAME", help="Of its splits, where it has several.")]


@data.callback()
def _about() -> None:
    """Check published data sets and bring them, or your own tables and masks, into the format that everything reads.

    Example: `a3tune data import questions.csv --out mine`, or `a3tune data prepare Slake1.0 --out slake`
    """


@data.command()
def check(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="A data set as its authors publish it, or a file of your own rows."),
    ],
    overrides: Overrides = None,
    name: Name = None,
    variant: Variant = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Of your own rows: count those that have labels there.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of your own rows: count tokens, and rows too long for it.")
    ] = None,
) -> None:
    """Count a data set beside the paper's Table 6, or your own rows, and list what is wrong.

    Example: `a3tune data check Slake1.0`, or `a3tune data check train.jsonl --labels labels --model tiny`
    """
    if (source.is_file() or (source / "state.json").is_file()) and name is None:
        from a3tune.commands.check_rows import look_through

        problems = 0
        if model is not None:
            quieten()
        for text, what, lines in look_through(source, labels, model, overrides or (), bar):
            echo(text)
            echo_left_out(what, lines)
            problems += len(lines)
        if problems:
            raise typer.Exit(1)
        return
    if labels or model or overrides:
        raise RunError(f"{source}: expected a file of your own rows with --labels, --model or settings")
    from a3tune.data.sets import check, format_check

    with bar("Reading") as progress:
        checked = check(source, name, variant=variant, progress=progress)
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
    for split in _SPLITS:
        refuse_existing(out / f"{split}.jsonl", force)
    with bar("Reading") as progress:
        files = prepare(folder, out, name, variant=variant, progress=progress)
    _remove_others(out, files)
    for file in files.values():
        echo(file)
    echo(f"Label with: labels.query={DATA_SETS[name].query!r}")


@data.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="CSV, TSV, Excel, JSON, JSONL, parquet, a folder of such, or OWNER/NAME[@REVISION] of the Hub.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of train.jsonl, validation.jsonl and test.jsonl.")],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="FIELD=COLUMN,...", help="Which column is which field: image, prompt, answer, ..."
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the images are, if not beside.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question, where no column has one.")] = None,
    split: Annotated[
        str, typer.Option(metavar="A/B/C", help="Shares of training, validation and test; 1: one file.")
    ] = ".8/.1/.1",
    by: Annotated[
        str | None, typer.Option(metavar="FIELD", help="What no two splits share: patient, else image, or a column.")
    ] = None,
    force: Force = False,
) -> None:
    """Make rows of a table or of a Hugging Face data set; columns are guessed, and shown.

    Example: `a3tune data import questions.csv --out mine --images scans --map prompt=Frage,answer=Antwort`
    """
    from a3tune.data.importing import find_source, format_import, import_rows

    said, shares = _columns(columns or []), _shares(split)
    for name in _SPLITS:
        refuse_existing(out / f"{name}.jsonl", force)
    find_source(source)  # a download has a bar of its own
    with bar("Opening images") as progress:
        done = import_rows(
            source, out, columns=said, images=images, prompt=prompt, shares=shares, by=by, progress=progress
        )
    _remove_others(out, done.files)
    echo(format_import(done))
    for file in done.files.values():
        echo(file)
    echo_left_out("rows left out", done.left_out)


def _remove_others(out: Path, files: Mapping[str, Path]) -> None:
    """With --force: splits of an earlier run beside those of this one would be taken for its own."""
    for name in _SPLITS:
        if name not in files:
            (out / f"{name}.jsonl").unlink(missing_ok=True)


def _columns(said: list[str]) -> dict[str, str]:
    pairs = [part.partition("=") for text in said for part in text.split(",")]
    if bad := [name for name, mark, column in pairs if not (name and mark and column)]:
        raise RunError(f"--map: expected FIELD=COLUMN,FIELD=COLUMN, got {shown(bad[0])} without a column")
    return {name.strip(): column for name, _, column in pairs}


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise RunError(f"--split: expected one to three shares that sum to 1, as .8/.1/.1, got {shown(text)}")
    return shares


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
    echo_left_out("annotations left out, or noted", left_out)
    echo(f"{sum(bool(sample.regions) for sample in samples):,} of {len(samples):,} questions have regions: {out}")
