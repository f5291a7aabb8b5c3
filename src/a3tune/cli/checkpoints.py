"""`a3tune convert`: medical checkpoints in their own layouts."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import Force, bar, quieten


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint as downloaded.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new model folder.")],
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="LLaMA-7B, where the checkpoint is a delta.")] = None,
    tower: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CLIP vision tower, where the checkpoint has none.")
    ] = None,
    force: Force = False,
) -> None:
    """Convert LLaVA-Med, LLaVA-Med-1.5 or HuatuoGPT-Vision into the format that `model.path` takes.

    Example: `a3tune convert llava-med-v1.5-mistral-7b --out models/llava-med-1.5`
    """
    quieten()
    from a3tune.convert import convert

    with bar("Converting") as progress:
        done = convert(source, out, base=base, tower=tower, force=force, progress=progress)
    echo(f"{done.kind}: {done.tensors:,} tensors, {done.nbytes / 1e9:.1f} GB in {done.folder}")
