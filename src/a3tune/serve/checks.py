"""What can be told of a server before anything slow is imported."""

import os
from importlib.util import find_spec
from pathlib import Path

from a3tune.errors import ConfigError, ModelError
from a3tune.machine.listening import bound, is_loopback

TOKEN = "A3TUNE_TOKEN"
"""Environment variable of the token that is asked for."""
SHORTEST_TOKEN = 16
"""Letters."""


def check_serve(host: str, port: int, token: str | None) -> None:
    """Raises ModelError without the extra, ConfigError about the token, RunError for a port that is taken."""
    if any(find_spec(package) is None for package in ("starlette", "uvicorn")):
        raise ModelError("serving needs starlette and uvicorn, which are not installed: pip install 'a3tune[serve]'")
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(
            f"token: expected at least {SHORTEST_TOKEN} ASCII letters, such as `openssl rand -hex 32` makes"
        )
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host:.80}: other machines can reach it, so a token is needed: --token-file FILE, or {TOKEN}"
        )
    bound(host, port).close()


def read_token(file: Path | None) -> str | None:
    """The token in a file, or in the environment; None if there is none. Raises ConfigError for a file without one."""
    if file is None:
        return os.environ.get(TOKEN)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: expected a text file with the token: {error}") from None
