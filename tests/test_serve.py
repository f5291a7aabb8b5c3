"""The server as its clients see it: over HTTP, many at once, wrong, gone in the middle; and how it ends."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("httpx", reason="asks over HTTP")

import httpx

import a3tune
from a3tune.commands.subject import load_models
from a3tune.config import AlignmentConfig, EvaluationConfig, ModelConfig
from a3tune.data.images import load_image
from a3tune.data.phantom import write_phantom
from a3tune.machine.listening import LOOPBACK, bound
from a3tune.serve import routes
from a3tune.serve.metrics import Metrics
from a3tune.serve.routes import make_app
from a3tune.serve.server import listening
from a3tune.serve.worker import Worker, _certain, cut_at
from a3tune.vlm.load import Vlm
from random_adapter import save_random_adapter

QUESTION = "Is there a lesion in the liver?"
QUESTIONS = [QUESTION, "Which imaging modality is this?", "Where is the lesion?", "What is the number of lesions?"]
TOKEN = "correct-horse-battery-staple"
PATIENCE = 60.0
REPORT = "Write a report of this scan."
"""The tiny model writes some fifty tokens, where it answers a question in one or two."""
LONG = 800
"""Tokens of an answer that is still growing when its client goes away."""
SETTINGS = EvaluationConfig(max_new_tokens=6).over(AlignmentConfig())


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    write_phantom(folder, {"test": 3}, seed=5)
    return sorted((folder / "images").glob("*.png"))[:3]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with which the model says much, and nothing that means anything."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    save_random_adapter(a3tune.load("tiny", device="cpu"), folder)
    return folder


@pytest.fixture(scope="module")
def models(adapter: Path) -> dict[str, Vlm]:
    return load_models(ModelConfig(device="cpu"), {"base": None, "mine": adapter})


@contextmanager
def served(models: dict[str, Vlm], limit: int = 64, token: str | None = None) -> Iterator[Any]:
    """A client of a server of these models."""
    metrics, listener = Metrics(limit), bound(LOOPBACK, 0)
    worker = Worker(models, dict.fromkeys(models, SETTINGS), 8, metrics)
    with listening(make_app(worker, metrics, limit, token, loopback=True), listener):
        url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
            yield client
        worker.close(PATIENCE)


@pytest.fixture(scope="module")
def client(models: dict[str, Vlm]) -> Iterator[Any]:
    with served(models) as client:
        yield client


def asking(image: Path | bytes, question: str = QUESTION, model: str = "base", **more: Any) -> dict[str, Any]:
    data = base64.b64encode(image if isinstance(image, bytes) else image.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def ask(client: Any, *arguments: Any, **more: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json=asking(*arguments, **more))
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


def stream(client: Any, *arguments: Any, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream, which ends as OpenAI's do."""
    with client.stream("POST", "/v1/chat/completions", json=asking(*arguments, stream=True, **more)) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def pieces(events: list[dict[str, Any]]) -> list[str]:
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def counted(client: Any, series: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines.get(series, 0))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_models_are_listed(client: Any):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "mine"]
    assert client.get("/v1/models/mine").json()["object"] == "model"
    assert client.get("/v1/models/nosuch").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("model", ["base", "mine"])
def test_an_answer_is_what_a_question_in_python_gets(model: str, client: Any, adapter: Path, scans: list[Path]):
    vlm = a3tune.load("tiny", adapter if model == "mine" else None, device="cpu")
    box = (20.0, 20.0, 90.0, 80.0)
    expected = vlm.ask(scans[0], QUESTION, max_new_tokens=6)
    reply = ask(client, scans[0], model=model, attention=True, region=list(box))
    assert text_of(reply) == expected.text
    found = reply["attention"]
    assert found["tokens"] == list(expected.tokens)
    np.testing.assert_allclose(found["values"], expected.values, rtol=1e-3)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.01)
    scores = expected.scores(box)
    assert found["scores"] == {name: pytest.approx(scores[name], abs=1e-3) for name in scores}
    picture = load_image(base64.b64decode(found["image"].partition(",")[2]))
    assert picture.size == (found["width"], found["height"]) == expected.image.size
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected.picture()).astype(int)).max() <= 2
    usage = reply["usage"]
    assert usage["completion_tokens"] == len(expected.tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "attention" not in ask(client, scans[0], model=model)


def test_the_models_say_different_things(client: Any, scans: list[Path]):
    assert text_of(ask(client, scans[0])) != text_of(ask(client, scans[0], model="mine"))


@pytest.mark.parametrize("decode", ["greedy", "vcd", "beam", "opera"])
def test_a_stream_is_the_answer_in_pieces(decode: str, client: Any, scans: list[Path]):
    more = {"model": "mine", "decode": decode, "seed": 1, "max_tokens": 8}
    whole = ask(client, scans[0], **more)
    events = stream(client, scans[0], stream_options={"include_usage": True}, attention=True, **more)
    assert "".join(pieces(events)) == text_of(whole)
    assert (len(pieces(events)) > 2) == (decode in ("greedy", "vcd"))
    *_, last, usage = events
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] and last["attention"]["values"]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1


def test_many_clients_at_once_get_their_own_answers(client: Any, scans: list[Path]):
    cases = [(scan, question, model) for scan in scans for question in QUESTIONS for model in ("base", "mine")]
    alone = [ask(client, *case, attention=True) for case in cases]
    looks = [np.array(reply["attention"]["values"]) for reply in alone]
    assert len({look.tobytes() for look in looks}) == len(cases)  # no two could be taken for each other
    before = [counted(client, f"a3tune_{name}_total") for name in ("batches", "batched")]

    def visit(number: int) -> tuple[int, str, list[float]]:
        case = number % len(cases)
        if number % 3:
            reply = ask(client, *cases[case], attention=True)
            return case, text_of(reply), reply["attention"]["values"]
        events = stream(client, *cases[case], attention=True)
        return case, "".join(pieces(events)), events[-1]["attention"]["values"]

    with ThreadPoolExecutor(50) as pool:
        for case, text, values in pool.map(visit, range(50)):
            assert text == text_of(alone[case])
            np.testing.assert_allclose(values, looks[case], rtol=1e-3, atol=1e-6)
    batches, batched = (
        counted(client, f"a3tune_{name}_total") - was for name, was in zip(("batches", "batched"), before, strict=True)
    )
    assert batched == 50 and batches < 50  # what waited was asked together


def test_an_answer_ends_at_a_stop(client: Any, scans: list[Path]):
    more = {"model": "mine", "max_tokens": 24}
    whole = ask(client, scans[0], **more)
    stop = next(word for word in text_of(whole).split() if word != text_of(whole).split()[0])
    cut = text_of(whole)[: text_of(whole).index(stop)].rstrip()
    reply = ask(client, scans[0], stop=stop, **more)
    assert text_of(reply) == cut and reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    assert "".join(pieces(stream(client, scans[0], stop=["no such text", stop], **more))) == cut


def test_what_may_yet_change_is_not_told():
    assert _certain("left lung wi", ["window"]) == "left lung"
    assert _certain("left lung", ["window"]) == "left lung"
    assert _certain("caf\ufffd", []) == "caf"
    assert cut_at("a b c", ["c", "b"]) == ("a", True) and cut_at("a", ["b"]) == ("a", False)


def test_an_answer_of_the_most_tokens_says_so(client: Any, scans: list[Path]):
    reply = ask(client, scans[0], model="mine", max_tokens=2)
    assert reply["usage"]["completion_tokens"] == 2 and reply["choices"][0]["finish_reason"] == "length"
    assert ask(client, scans[0], model="mine", max_completion_tokens=2, max_tokens=5)["usage"]["completion_tokens"] == 2


def test_a_seed_repeats_an_answer(client: Any, scans: list[Path]):
    def draw(seed: int | None, **more: Any) -> str:
        return text_of(ask(client, scans[0], model="mine", seed=seed, **more))

    drawn = [draw(seed, temperature=1.5) for seed in (1, 1, 2, 3, -4, -4)]
    assert drawn[0] == drawn[1] and drawn[4] == drawn[5] and len(set(drawn)) == 4
    assert len({draw(None, temperature=1.5) for _ in range(3)}) > 1
    with ThreadPoolExecutor(4) as pool:  # whoever else asks
        assert set(pool.map(lambda _: draw(1, temperature=1.5), range(4))) == {drawn[0]}
    assert draw(1, temperature=0) == draw(2, top_p=0.001) == draw(None) == draw(3, temperature=1e-300)
    assert draw(4, temperature=2e-4) == draw(None)


GOOD = "data:image/png;base64,aGVsbG8="
WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], int, str | None, str]] = {
    "no JSON": (lambda body: b"{", 400, None, "Invalid JSON"),
    "no object": (lambda body: b"[]", 400, None, "object"),
    "no model": (lambda body: body.pop("model"), 400, "model", "required"),
    "another model": (lambda body: body.update(model="gpt"), 404, "model", "expected one of base, mine"),
    "no messages": (lambda body: body.update(messages=[]), 400, "messages", "expected one message"),
    "system": (
        lambda body: body["messages"].insert(0, {"role": "system", "content": "Be kind."}),
        400,
        "messages",
        "without a system message",
    ),
    "no image": (lambda body: body["messages"][0].update(content="Hello"), 400, "messages.0.content", "one image"),
    "two images": (
        lambda body: body["messages"][0]["content"].append(body["messages"][0]["content"][0]),
        400,
        None,
        "2",
    ),
    "no text": (lambda body: body["messages"][0]["content"].pop(), 400, "messages.0.content", "text"),
    "part": (lambda body: body["messages"][0]["content"][0].update(type="audio"), 400, None, "image_url"),
    "address": (
        lambda body: body["messages"][0]["content"][0]["image_url"].update(url="http://127.0.0.1/a.png"),
        400,
        "messages.0.content.0.image_url.url",
        "not fetched",
    ),
    "file": (
        lambda body: body["messages"][0]["content"][0]["image_url"].update(url="file:///etc/passwd"),
        400,
        "messages.0.content.0.image_url.url",
        "not fetched",
    ),
    **{
        f"base 64: {url}": (
            lambda body, url=url: body["messages"][0]["content"][0]["image_url"].update(url=url),
            400,
            "messages.0.content.0.image_url.url",
            "expected an image in base 64",
        )
        for url in ("data:image/png;base64,%%%", "data:image/png;base64,größe", "data:image/png,abcd", "data:")
    },
    "no picture": (
        lambda body: body["messages"][0]["content"][0]["image_url"].update(url=GOOD),
        400,
        None,
        "its format is not recognised",
    ),
    "control token": (lambda body: body["messages"][0]["content"][1].update(text="</s>"), 400, None, "control token"),
    "unknown": (lambda body: body.update(tools=[]), 400, "tools", "not supported"),
    "several answers": (lambda body: body.update(n=2), 400, "n", "1"),
    "penalty": (lambda body: body.update(frequency_penalty=0.5), 400, "frequency_penalty", "0"),
    "temperature": (lambda body: body.update(temperature=3), 400, "temperature", "less than or equal to 2"),
    "temperature as text": (lambda body: body.update(temperature="1"), 400, "temperature", "number"),
    "tokens": (lambda body: body.update(max_tokens=10**9), 400, "max_tokens", "4096"),
    "stop": (lambda body: body.update(stop=["a"] * 5), 400, "stop", "at most 4"),
    "method": (lambda body: body.update(decode="vcdd"), 400, "decode", "vcd, dola"),
    "its settings": (
        lambda body: body.update(decode="vcd", decoding={"nosuch": 1}),
        400,
        "decoding",
        "no setting 'nosuch'",
    ),
    "beams and a temperature": (
        lambda body: body.update(decode="beam", temperature=1),
        400,
        "temperature",
        "by itself",
    ),
    "beams that sample": (lambda body: body.update(decode="opera", temperature=1), 400, None, "cannot sample"),
    "not told where": (lambda body: body.update(decode="controlmllm"), 400, None, "true regions"),
    "region": (lambda body: body.update(region=[5, 5, 1, 1]), 400, "region", "x0 < x1"),
    "region without end": (lambda body: body.update(region=[0, 0, float("inf"), 5]), 400, "region", "finite"),
    "region in shares": (lambda body: body.update(region=[0.1, 0.2, 0.5, 0.6]), 400, "region", "pixels"),
    "region outside": (lambda body: body.update(region=[900, 900, 950, 950]), 400, None, "box"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_request_is_told_in_openais_form(wrong: str, client: Any, scans: list[Path]):
    change, status, param, message = WRONG[wrong]
    body = asking(scans[0])
    changed = change(body)
    sent = changed if isinstance(changed, bytes) and changed[:1] in b"{[" else json.dumps(body).encode()
    for content in (sent, sent if changed is sent else json.dumps(body | {"stream": True}).encode()):
        reply = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error"
        assert {*error} == {"message", "type", "param", "code"}
        assert param is None or error["param"] == param


def test_other_ways_to_be_wrong(client: Any, scans: list[Path], monkeypatch: pytest.MonkeyPatch):
    url = "/v1/chat/completions"
    assert client.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
    for refused in (client.get(url), client.get("/v1/nosuch"), client.get("/docs")):
        assert refused.status_code in (404, 405) and refused.json()["error"]["message"]
    monkeypatch.setattr(routes, "MOST_BYTES", 2000)
    large = client.post(url, json=asking(bytes(4000)))
    assert large.status_code == 413 and large.json()["error"]["type"] == "invalid_request_error"
    chunked = client.post(url, content=iter([b" " * 1500] * 3), headers={"content-type": "application/json"})
    assert chunked.status_code == 413
    monkeypatch.undo()
    assert text_of(ask(client, scans[0]))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:80"},
    ],
)
def test_pages_of_a_browser_may_not_ask(headers: dict[str, str], client: Any, scans: list[Path]):
    for reply in (
        client.post("/v1/chat/completions", json=asking(scans[0]), headers=headers),
        client.get("/v1/models", headers=headers),
    ):
        assert reply.status_code == 403 and reply.json()["error"]["type"] == "permission_error"


def test_a_token_is_asked_for(models: dict[str, Vlm], scans: list[Path]):
    with served(models, token=TOKEN) as client:
        for headers in (
            {},
            {"authorization": "Bearer no"},
            {"authorization": TOKEN},
            {"authorization": b"Bearer \xff"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
                reply = client.get(path, headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert text_of(ask(client, scans[0]))


@contextmanager
def half_sent(client: Any) -> Iterator[socket.socket]:
    """A request of which the body does not come."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=PATIENCE) as sender:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {LOOPBACK}\r\nContent-Type: application/json\r\n"
        sender.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        yield sender


def test_more_than_may_be_open_are_told_to_come_back(models: dict[str, Vlm], scans: list[Path]):
    with served(models, limit=2) as client:
        with half_sent(client), half_sent(client):
            until(lambda: counted(client, "a3tune_open_requests") == 2)
            reply = client.post("/v1/chat/completions", json=asking(scans[0]))
            assert reply.status_code == 429 and reply.headers["retry-after"]
            assert reply.json()["error"]["type"] == "rate_limit_error" and reply.json()["error"]["code"] == "queue_full"
        until(lambda: counted(client, "a3tune_open_requests") == 0)
        assert text_of(ask(client, scans[0]))
        assert counted(client, 'a3tune_requests_total{status="429"}') == 1


@pytest.mark.parametrize("decode", ["greedy", "beam"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_its_place(
    streaming: bool, decode: str, models: dict[str, Vlm], scans: list[Path]
):
    with served(models, limit=1) as client:
        body = asking(scans[0], REPORT, model="mine", max_tokens=LONG, stream=streaming, decode=decode)
        if streaming and decode == "greedy":
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(10, read=0.1))
        until(lambda: counted(client, "a3tune_open_requests") == 0)
        assert counted(client, 'a3tune_requests_total{status="499"}') == 1
        assert text_of(ask(client, scans[0]))
        assert counted(client, 'a3tune_tokens_total{kind="answer"}') < LONG  # the long answer was not gone on with


def test_who_stays_gets_the_whole_answer(client: Any, scans: list[Path]):
    more = {"model": "mine", "max_tokens": 60}
    alone = text_of(ask(client, scans[1], **more))
    gone = [threading.Thread(target=_leave, args=(client, asking(scan, stream=True, **more))) for scan in scans]
    for thread in gone:
        thread.start()
    assert "".join(pieces(stream(client, scans[1], **more))) == alone
    for thread in gone:
        thread.join()


def _leave(client: Any, body: dict[str, Any]) -> None:
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())


SECRET = "Zweitmeinung Muster Erika"


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The command in a process of its own, and a client of it."""
    command = [sys.executable, "-m", "a3tune", "serve", "--port", "0", "model.device=cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "A3TUNE_TOKEN": TOKEN, "TMPDIR": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as server:  # type: ignore[call-overload]
        try:
            line = next(line for line in server.stdout if line.startswith("Serving"))
            url, headers = line.split()[-1].removesuffix("/v1"), {"authorization": f"Bearer {TOKEN}"}
            with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
                yield server, client
        finally:
            server.kill()


def test_the_command_serves_keeps_nothing_and_ends_well(adapter: Path, scans: list[Path], tmp_path: Path):
    with process(tmp_path, "--adapter", f"mine={adapter}", "model.path=tiny") as (server, client):
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "mine"]
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
        ask(client, scans[0], SECRET, attention=True)
        for body in (asking(b"no image", SECRET), asking(scans[0], f"{SECRET} </s>"), asking(scans[0], tools=[SECRET])):
            assert client.post("/v1/chat/completions", json=body).status_code == 400
        body = asking(scans[0], SECRET, "mine", max_tokens=100, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"  # what is being answered may end
        assert server.stdout is not None
        said = server.stdout.read()
        assert server.wait(PATIENCE) == 0
    assert said == "Ended.\n" and list(tmp_path.iterdir()) == []


def test_openais_own_client(client: Any, scans: list[Path]):
    openai = pytest.importorskip(
        "openai", reason="the official client is not installed; docs/howto/serving.md has its transcript"
    )
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    messages = asking(scans[0])["messages"]
    assert [model.id for model in official.models.list()] == ["base", "mine"]
    whole = official.chat.completions.create(model="mine", messages=messages, max_tokens=6)
    assert whole.choices[0].message.content == text_of(ask(client, scans[0], model="mine"))
    parts = official.chat.completions.create(model="mine", messages=messages, max_tokens=6, stream=True)
    said = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(said) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="vcd, dola"):
        official.chat.completions.create(model="base", messages=messages, extra_body={"decode": "vcdd"})
    with pytest.raises(openai.NotFoundError):
        official.chat.completions.create(model="gpt", messages=messages)
