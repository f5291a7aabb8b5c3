"""Model folders: medical checkpoints in their own layouts, and adapters merged into their base."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import Force, quieten
from a3tune.cli.progress import bar


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR|NAME", help="The checkpoint: its folder, or owner/name[@revision] of the Hub."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new model folder.")],
    base: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="LLaMA-7B, where the checkpoint is a delta.")
    ] = None,
    tower: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="CLIP vision tower, where the checkpoint has none.")
    ] = None,
    force: Force = False,
) -> None:
    """Convert LLaVA-Med, LLaVA-Med-1.5 or HuatuoGPT-Vision into the format that `model.path` takes.

    Example: `a3tune convert microsoft/llava-med-v1.5-mistral-7b --out models/llava-med-1.5`
    """
    from a3tune.convert import convert
    from a3tune.convert.fetch import fetch

    folder, base_folder, tower_folder = fetch(source, out, base=base, tower=tower, force=force)
    quieten()

    with bar("Converting") as progress:
        done = convert(folder, out, base=base_folder, tower=tower_folder, force=force, progress=progress)
    echo(f"{done.kind}: {done.tensors:,} tensors, {_size(done.nbytes)} in {done.folder}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter of plain LoRA.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new model folder.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR|NAME", help="The base model, where the adapter does not tell or it moved."),
    ] = None,
    force: Force = False,
) -> None:
    """Merge a plain LoRA adapter into its base: a model that any server of transformers' models loads.

    For adapters of `adapter.kind=lora`, trained with or without the alignment loss. Routed adapters (A3MoE) cannot be
    merged.

    Example: `a3tune merge runs/lora/adapter --out models/merged`
    """
    from a3tune.convert.merge import check

    check(adapter, out, base=model, force=force)
    quieten()
    from a3tune.commands.merge import merge_adapter

    done = merge_adapter(adapter, out, base=model, force=force)
    echo(f"{done.base} with {adapter}: {_size(done.nbytes)} in {done.folder}")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
