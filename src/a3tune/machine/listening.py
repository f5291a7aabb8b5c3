"""Where a server listens. Knows addresses; neither pages nor models."""

import ipaddress
import socket

from a3tune.errors import RunError

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


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet; port 0 is any that is free.

    Raises RunError for a port that is taken, or an address that is not ours.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, for one that just ended
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise port_taken(host, port, error) from error
    return listener


def port_taken(host: str, port: int | None, error: OSError) -> RunError:
    return RunError(f"port {port}: cannot listen on {host} there ({error}); choose another --port")
