"""`a3tune serve`: a model and its adapters behind OpenAI's interface."""

from pathlib import Path
from typing import Annotated

import typer

from a3tune.cli.app import app, echo
from a3tune.cli.options import ConfigFile, DryRun, Overrides, quieten, show_dry_run
from a3tune.cli.runs import NO_ADAPTER, with_adapters
from a3tune.errors import RunError
from a3tune.machine.listening import LOOPBACK

BASE = "base"


@app.command()
def serve(
    overrides: Overrides = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A model's name and the folder of its adapter. As often as you like."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than the default needs a token.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the token that requests must bring; else A3TUNE_TOKEN does."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most requests at once; further ones get 429.")] = 64,
    config: ConfigFile = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a model and its adapters to OpenAI's clients, with the attention of an answer on request.

    The base is the model `base`, adapters are called as you say. Questions that wait are answered together, up to
    evaluation.batch_size. Needs the extra `serve`.

    Example: `a3tune serve --adapter mine=runs/mine/adapter`
    """
    named = _named(adapter or [])
    chosen = with_adapters([NO_ADAPTER, *named.values()], config, overrides or [])
    settings = dict(zip([BASE, *named], [one for _, one in chosen], strict=True))
    base = _one_base({name: one.model.path for name, one in settings.items() if name in named or not named})
    model = next(one.model for one in settings.values() if one.model.path == base)
    if dry_run:
        show_dry_run(chosen[-1][1], f"serve {', '.join(settings)} of {base} on {host}")
        return
    from a3tune.commands.checks import check_methods, check_models
    from a3tune.serve.checks import check_serve, read_token

    token = read_token(token_file)
    check_serve(host, port, token)
    for name, one in settings.items():
        check_models(one, [Path(named[name])] if name in named else [])
        check_methods(one.evaluation, [one.evaluation.decode])
    quieten()
    from a3tune.serve.server import serve

    serve(
        model,
        {BASE: None, **{name: Path(folder) for name, folder in named.items()}},
        {name: one.active_evaluation for name, one in settings.items()},
        host,
        port,
        token=token,
        limit=limit,
        batch_size=chosen[0][1].evaluation.batch_size,
        say=echo,
    )


def _named(adapters: list[str]) -> dict[str, str]:
    """Folder of each adapter by its name."""
    named: dict[str, str] = {}
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder) or name == BASE or name in named or not name.isprintable():
            raise RunError(
                f"--adapter {text:.200}: expected NAME=DIR, each name once and none of them {BASE!r}, such as "
                "mine=runs/mine/adapter"
            )
        named[name] = folder
    return named


def _one_base(paths: dict[str, str]) -> str:
    """The base that all adapters were trained on."""
    if len(set(paths.values())) > 1:
        found = ", ".join(f"{name} on {path}" for name, path in paths.items())
        raise RunError(f"--adapter: expected adapters of one base, got {found}; give model.path, or serve them apart")
    return next(iter(paths.values()))
