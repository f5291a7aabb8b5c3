"""Where the page listens, and to whom. Knows addresses; no page and no model."""

from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from a3tune.errors import ModelError, RunError
from a3tune.machine.listening import LOOPBACK, bound

_PORTS = {"http": 80, "https": 443}


def is_own(kind: str, method: str, headers: Mapping[str, str]) -> bool:
    """Whether a request may come from the page of this server itself, by what the browser says of it.

    Args:
        kind: `http` or `websocket`.
        headers: by name in small letters. A browser sends `Origin` with all that changes something, and with whatever
            a page elsewhere could read the answer of; `Sec-Fetch-Site`, to this machine or over https, with all else.
    """
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None:
        return _same_place(origin, host)
    if kind == "websocket" or method not in ("GET", "HEAD"):
        return False
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return followed or headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def _same_place(origin: str, host: str) -> bool:
    """Whether an origin, as `http://name:port`, is the server that a request names as its host."""
    try:
        theirs, ours = urlsplit(origin), urlsplit(f"//{host}")
        default = _PORTS.get(theirs.scheme)
        alike = theirs.hostname == ours.hostname and (theirs.port or default) == (ours.port or default)
    except ValueError:
        return False
    return alike and default is not None and theirs.hostname is not None


def check_host(host: str, port: int | None) -> None:
    """Whether the page can be served there: told before models are loaded. `port`: None is any that is free.

    Raises ModelError without the extra `app`, RunError for a port that is taken, an address that is not ours, or one of
    IPv6, which Gradio does not serve on.
    """
    if find_spec("gradio") is None:
        raise ModelError("the explorer needs gradio, which is not installed: pip install 'a3tune[app]'")
    if ":" in host:
        raise RunError(f"--host {host:.80}: expected a name or an address of IPv4, such as {LOOPBACK}")
    if port is not None:
        bound(host, port).close()
