"""Thin commands: options in, one function of `commands.py` or `demo.py`, a line out. No logic.

Whatever needs PyTorch is imported inside the commands, so that help is there at once.
"""

from a3tune.cli import checkpoints, data, explorer, labels, paper, runs  # each adds its commands to `app`
from a3tune.cli.app import app
from a3tune.machine.signals import stopping

__all__ = ["app", "checkpoints", "data", "explorer", "labels", "main", "paper", "runs"]


def main() -> None:
    """Entry point of the command `a3tune`."""
    with stopping():
        app()
