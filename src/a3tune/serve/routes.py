"""The addresses of the server, and who may ask them. Knows HTTP; what is asked and answered is the worker's."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Iterator
from secrets import token_hex
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from a3tune.machine.listening import LOOPBACK
from a3tune.serve import reply
from a3tune.serve.metrics import Metrics
from a3tune.serve.refusal import Refusal
from a3tune.serve.request import read_question
from a3tune.serve.worker import Answered, Job, Message, Worker

MOST_BYTES = 28 * 2**20
"""Of a request: an image of 20 MiB in base 64, and its question."""
READING_SECONDS = 60.0
"""For a request to arrive."""
GONE = 499
"""How a request is counted whose client went away."""


def make_app(worker: Worker, metrics: Metrics, limit: int, token: str | None, *, loopback: bool) -> Starlette:
    """The application.

    Args:
        limit: most chat completions at once, read, waiting and answered ones together.
        token: what a bearer must show; None lets everyone in who reaches the server.
        loopback: only this machine reaches it, so other names of it are a trick (DNS rebinding).
    """
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "a3tune"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in worker.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in worker.models:
            raise Refusal(
                404, f"model: expected one of {', '.join(worker.models)}", param="model", code="model_not_found"
            )
        return JSONResponse(described(name))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "ending"}, 200 if worker.alive else 503)

    async def numbers(request: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _refused(error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}"))

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Chat(worker, metrics, limit), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", numbers),
        ],
        middleware=[Middleware(_Guard, token=token, loopback=loopback)],
        exception_handlers={Refusal: refused, HTTPException: unknown},
    )


class _Guard:
    """Lets in who may ask: with the token if there is one, and no page of a browser."""

    def __init__(self, app: Any, token: str | None, *, loopback: bool) -> None:
        self._app, self._loopback = app, loopback
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))) is not None:
            await _refused(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Refusal | None:
        headers = request.headers
        if self._loopback and _name(headers.get("host", "")) not in (LOOPBACK, "localhost", "[::1]"):
            return Refusal(403, "only this machine may ask, by its own name: http://127.0.0.1 or http://localhost")
        if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Refusal(403, "pages of a browser may not ask; ask from a program")
        if self._expected is None or request.url.path == "/health":
            return None
        said = headers.get("authorization", "").encode("latin-1", "replace")
        if hmac.compare_digest(said, self._expected):
            return None
        return Refusal(
            401, "expected the header 'Authorization: Bearer TOKEN' with this server's token", code="invalid_api_key"
        )


class _Chat:
    """`POST /v1/chat/completions`. An ASGI application: it sees a client go away, streaming or not."""

    def __init__(self, worker: Worker, metrics: Metrics, limit: int) -> None:
        self._worker, self._metrics, self._limit = worker, metrics, limit
        self._open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start = time.perf_counter()
        status = GONE
        try:
            with self._place():
                status = await self._answer(scope, receive, send)
        except Refusal as refusal:
            status = refusal.status
            await _refused(refusal)(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._metrics.request(status, time.perf_counter() - start)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of those that may be open at once: taken before anything is read, so that memory is bounded."""
        if self._open >= self._limit:
            raise Refusal(429, f"{self._limit} requests are open already; ask again in a moment", code="queue_full")
        self._open += 1
        self._metrics.opened(1)
        try:
            yield
        finally:
            self._open -= 1
            self._metrics.opened(-1)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> int:
        body = await _body(Request(scope, receive))
        name = f"chatcmpl-{token_hex(12)}"
        # Decodes base 64 and checks: tens of milliseconds for a large image.
        question = await asyncio.to_thread(read_question, body, name, self._worker.models, self._worker.settings)
        del body
        told: asyncio.Queue[Message] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(told.put_nowait, message)

        job = Job(question, tell)
        self._worker.submit(job)
        gone = asyncio.create_task(_gone(receive))
        try:
            if question.stream:
                return await _stream(job, told, gone, send)
            answered = await _next(told, gone)
            assert isinstance(answered, Answered)
            content = await asyncio.to_thread(reply.completion, question, int(time.time()), answered)
            await JSONResponse(content)(scope, receive, send)
            return 200
        finally:
            job.cancelled = True
            gone.cancel()


async def _body(request: Request) -> bytes:
    """Raises Refusal for what is no JSON or too large, or takes too long to arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page elsewhere may send unasked is of another kind
        raise Refusal(400, "expected the header 'Content-Type: application/json'")
    too_large = Refusal(413, f"expected a request of at most {MOST_BYTES:,} bytes, got more; send a smaller image")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READING_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"expected the whole request within {READING_SECONDS:g} seconds") from None
    return bytes(body)


async def _gone(receive: Any) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(told: asyncio.Queue[Message], gone: asyncio.Task[None]) -> str | Answered:
    """What the worker tells next. Raises Refusal if there is no answer, ClientDisconnect if nobody waits for it."""
    message = asyncio.create_task(told.get())
    try:
        await asyncio.wait({message, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            raise ClientDisconnect
    finally:
        message.cancel()
    if isinstance(found := message.result(), Refusal):
        raise found
    return found


async def _stream(job: Job, told: asyncio.Queue[Message], gone: asyncio.Task[None], send: Any) -> int:
    """Server-sent events; an error before the first of them is an ordinary one."""
    question, created = job.question, int(time.time())
    message = await _next(told, gone)
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(data: bytes, *, last: bool = False) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": not last})

    await event(reply.begin(question, created))
    status = 200
    try:
        while isinstance(message, str):
            await event(reply.more(question, created, message))
            message = await _next(told, gone)
        for data in await asyncio.to_thread(lambda: list(reply.end(question, created, message))):
            await event(data)
    except Refusal as refusal:
        status = refusal.status
        await event(reply.failed(refusal.body()))
    await event(b"", last=True)
    return status


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, dict(refusal.headers()))


def _name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
