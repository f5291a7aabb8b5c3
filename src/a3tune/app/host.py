"""Where the page listens. Knows addresses; no page and no model."""

import ipaddress
import socket
from importlib.util import find_spec

from a3tune.errors import ModelError, RunError

LOOPBACK = "127.0.0.1"
"""Address that only this machine can reach."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, port: int | None) -> None:
    """Whether the page can be served there: told before models are loaded. `port`: None is any that is free.

    Raises ModelError without the extra `app`, RunError for a port that is taken or an address that is not ours.
    """
    if find_spec("gradio") is None:
        raise ModelError("the explorer needs gradio, which is not installed: pip install 'a3tune[app]'")
    if port is None:
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, for one that just ended
            listener.bind(address)
    except OSError as error:
        raise port_taken(host, port, error) from error


def port_taken(host: str, port: int | None, error: OSError) -> RunError:
    return RunError(f"port {port}: cannot listen on {host} there ({error}); choose another --port")
