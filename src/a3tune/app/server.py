"""Serves the page, on this machine alone unless told otherwise, and lets nothing in or out that is not needed.

Gradio by itself asks its makers for newer versions and counts its users; all of that is off here.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from a3tune.app.host import check_host, is_own
from a3tune.app.model import BASE, Asker
from a3tune.app.regions import Segmenter
from a3tune.commands.subject import load_models
from a3tune.config import RunConfig
from a3tune.machine.listening import LOOPBACK, is_loopback, port_taken

UPLOAD_LIMIT = "50mb"
SESSIONS = 32
"""Visitors whose image and answers are kept; of more, the oldest are forgotten."""
WAITING = 32
"""Questions that may wait; further ones are turned away."""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
HEADERS = {
    # Gradio's own templates are compiled in the browser, hence 'unsafe-eval'. Nothing may come from or go elsewhere.
    "content-security-policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def serve(
    config: RunConfig, adapters: Mapping[str, Path], host: str, port: int | None, say: Callable[[str], None]
) -> None:
    """Load the models and serve the page until Ctrl-C. `port`: None takes the first free one from 7860 on.

    Raises ModelError without the extra `app`, RunError for a port that is taken, and what loading models raises.
    """
    # A service manager's way to stop it; the folder below would stay otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="a3tune-app-") as uploads:
        # Read by Gradio when it is imported: uploads lie here for the moment between arriving and being read.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        check_host(host, port)
        import gradio

        from a3tune.app.page import Page

        asker = Asker(load_models(config.model, {BASE: None, **adapters}), config.active_evaluation)
        page = Page(asker, Segmenter(config.labels, config.model.device))
        try:
            _, url, _ = page.blocks.queue(max_size=WAITING).launch(**_settings(gradio, host, port))
        except OSError as error:
            raise port_taken(host, port, error) from error
        say(f"Explorer: {url}")
        page.blocks.block_thread()


def _settings(gradio: Any, host: str, port: int | None) -> dict[str, Any]:
    """All settings are stated: Gradio takes those that are not from environment variables."""
    from a3tune.app.layout import script

    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "inbrowser": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "show_error": False,
        "max_file_size": UPLOAD_LIMIT,
        "state_session_capacity": SESSIONS,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "theme": gradio.themes.Base(font=FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"]),
        "css_paths": Path(__file__).parent / "page.css",
        "js": script("page.js"),
        "app_kwargs": {"middleware": _middleware(host)},
    }


def _middleware(host: str) -> list[Any]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    guards = [Middleware(_Headers), Middleware(_OwnPage)]
    if is_loopback(host):
        # A page elsewhere whose name was made to point here cannot speak to us.
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[host, LOOPBACK, "localhost"]))
    return guards


class _OwnPage:
    """Refuses what a web page elsewhere sends: every browser says where a request comes from.

    Following a link to the page is left: it changes nothing, and shows nothing to where the link was.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or is_own(scope["type"], scope.get("method", "GET"), _named(scope["headers"])):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refused = {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
            await send(refused)
            await send({"type": "http.response.body", "body": b"only the page of this server may ask this"})


def _named(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


class _Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
