"""Thin commands: options in, one function of `commands.py` or `demo.py`, a line out. No logic.

Whatever needs PyTorch is imported inside the commands, so that help is there at once.
"""

import sys

from a3tune.cli import (  # each adds its commands to `app`
    checkpoints,
    data,
    env,
    explorer,
    labels,
    paper,
    runs,
    serve,
    sweep,
    upkeep,
)
from a3tune.cli.app import app
from a3tune.machine.signals import stopping, told

__all__ = [
    "app",
    "checkpoints",
    "data",
    "env",
    "explorer",
    "labels",
    "main",
    "paper",
    "runs",
    "serve",
    "sweep",
    "upkeep",
]


def main() -> None:
    """The command `a3tune`, as programs with parts of their own start it (docs/howto)."""
    try:
        with stopping():
            app()
    except KeyboardInterrupt as stop:  # before the command was found
        sys.exit(told(stop))
