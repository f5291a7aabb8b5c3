"""Loads the models, serves them until it is told to end, and ends well. Knows processes; no question."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from a3tune.commands.subject import load_models
from a3tune.config import EvaluationConfig, ModelConfig
from a3tune.errors import RunError
from a3tune.machine.listening import bound, is_loopback
from a3tune.machine.signals import handling
from a3tune.serve.metrics import Metrics
from a3tune.serve.routes import make_app
from a3tune.serve.worker import Worker

GRACE_SECONDS = 20.0
"""For answers that are being made when the server is told to end."""


def serve(
    config: ModelConfig,
    adapters: Mapping[str, Path | None],
    settings: Mapping[str, EvaluationConfig],
    host: str,
    port: int,
    *,
    token: str | None,
    limit: int,
    batch_size: int,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C; then what waits is refused and what is being answered may end.

    Args:
        adapters: by the name of the model, None for the base alone; `settings`: how each answers and is looked at.
        port: 0 is any that is free.
        limit: most requests at once; `batch_size`: most questions that are answered together.

    Raises RunError for a port that is taken, and what loading models raises.
    """
    listener = bound(host, port)
    metrics = Metrics(limit)
    told = threading.Event()
    with handling(lambda number, frame: told.set()):
        worker = Worker(load_models(config, adapters), settings, batch_size, metrics)
        app = make_app(worker, metrics, limit, token, loopback=is_loopback(host))
        with listening(app, listener) as thread:
            say(f"Serving {', '.join(adapters)} at http://{_address(listener.getsockname())}/v1")
            while thread.is_alive() and not told.wait(0.5):
                pass
            worker.close(GRACE_SECONDS)
    if not told.is_set():
        raise RunError("the server ended by itself; its log says why")
    say("Ended.")


@contextmanager
def listening(app: Starlette, listener: socket.socket) -> Iterator[threading.Thread]:
    """Serve in a thread while this is open: elsewhere than in the main one uvicorn leaves signals alone."""
    server = uvicorn.Server(uvicorn.Config(app, **_SETTINGS))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


_SETTINGS: dict[str, Any] = {
    "log_config": None,
    "log_level": logging.WARNING,
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,
    "lifespan": "off",
    "ws": "none",
    "timeout_keep_alive": 30,
    "timeout_graceful_shutdown": 5,
}
"""All that matter are stated: uvicorn takes some from environment variables."""


def _address(name: tuple[Any, ...]) -> str:
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
