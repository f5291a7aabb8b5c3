"""`a3tune env`: versions and devices, for who reports a problem."""

from a3tune.cli.app import app, echo
from a3tune.cli.options import quieten


@app.command("env")
def show_environment() -> None:
    """Print versions, devices and extras, for a report of a problem. No paths, and no names of users or hosts.

    Example: `a3tune env`
    """
    quieten()
    from a3tune.commands.env import describe_environment

    for line in describe_environment():
        echo(line)
