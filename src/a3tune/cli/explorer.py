"""`a3tune app`: ask in the browser, and see where the model looks."""

from typing import Annotated

import typer

from a3tune.app.host import check_host
from a3tune.cli.app import app, echo
from a3tune.cli.options import ConfigFile, DryRun, Overrides, quieten, show_dry_run
from a3tune.cli.runs import NO_ADAPTER, adapter_titles, with_adapters
from a3tune.errors import RunError
from a3tune.machine.listening import LOOPBACK, is_loopback

MOST = 2
"""Adapters beside the base model: more do not fit on a screen."""


@app.command("app")
def explore(
    overrides: Overrides = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Folder of a trained adapter. Twice at most."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is for this machine alone.")] = LOOPBACK,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on.")] = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Ask in the browser and see where the model looks: word by word, head by head, base beside adapter.

    Without anything it opens the shipped tiny model and synthetic scans. Needs the extra `app`.

    Example: `a3tune app --adapter runs/mine/adapter`
    """
    chosen = with_adapters(adapter or [NO_ADAPTER], config, overrides or [], labels=True)
    settings = chosen[0][1]
    folders = [folder for folder, _ in chosen if folder is not None]
    adapters = dict(zip(adapter_titles(folders), folders, strict=True))
    if len(adapters) < len(adapter or ()) or len(adapters) > MOST:
        got = ", ".join(adapter or ())
        raise RunError(f"--adapter: expected at most {MOST}, each once, got {got}")
    if dry_run:
        show_dry_run(settings, f"serve {' and '.join([settings.model.path, *adapters])} on {host}")
        return
    from a3tune.commands.checks import check_label_maker, check_methods, check_models

    check_host(host, port)
    check_models(settings, adapters.values())
    check_methods(settings.evaluation, [settings.evaluation.decode])
    check_label_maker(settings.labels)
    quieten()
    from a3tune.app.server import serve

    if not is_loopback(host):
        echo(
            f"Warning: {host} can be reached from other machines. Whoever reaches it can use the page without a "
            "password, and what is sent is not encrypted. Put a server that has both in front of it.",
            err=True,
        )
    serve(settings, adapters, host, port, echo)
