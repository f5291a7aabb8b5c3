"""Who may speak to the explorer: its own page and no other, whatever the browser of a visitor is made to send."""

import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs the extra app")

from a3tune.app.host import is_own
from browser import PATIENCE, Server, served

OWN = {"host": "127.0.0.1:7860"}
ELSEWHERE = ["http://evil.example", "http://127.0.0.1:9", "https://127.0.0.1:7860.evil.example", "null", "", "http://["]


@pytest.mark.parametrize("origin", ELSEWHERE)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_foreign_origin_is_refused(kind: str, method: str, origin: str):
    assert not is_own(kind, method, OWN | {"origin": origin})
    assert is_own(kind, method, OWN | {"origin": "http://127.0.0.1:7860"})


def test_what_a_browser_says_of_a_request_decides():
    get = lambda **said: is_own("http", "GET", OWN | {f"sec-fetch-{name}": value for name, value in said.items()})  # noqa: E731
    assert get() and get(site="none", mode="navigate", dest="document") and get(site="same-origin", mode="cors")
    assert get(site="cross-site", mode="navigate", dest="document")  # a link to the page
    assert not get(site="cross-site", mode="no-cors", dest="image")
    assert not get(site="cross-site", mode="navigate", dest="iframe")
    assert not get(site="same-site", mode="no-cors", dest="script")  # another port of this machine
    assert not is_own("http", "POST", OWN)
    assert not is_own("websocket", "GET", OWN)


def test_behind_a_server_that_has_the_default_port():
    assert is_own("http", "POST", {"host": "scans.example", "origin": "https://scans.example"})
    assert is_own("http", "POST", {"host": "scans.example:443", "origin": "https://scans.example"})
    assert not is_own("http", "POST", {"host": "scans.example", "origin": "https://scans.example:8443"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


def ask(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--b--\r\n'
FORM = {"Content_Type": "multipart/form-data; boundary=b"}
JOIN = b'{"data": [], "fn_index": 0, "session_hash": "a"}'


def test_uploads_and_questions_from_elsewhere_are_refused(server: Server):
    own = f"http://127.0.0.1:{server.port}"
    before = {str(path) for path in server.folder.rglob("*")}
    foreign = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {}, {"Sec_Fetch_Site": "cross-site"}]
    for headers in foreign:
        assert ask(server, "POST", "/gradio_api/upload", PART, **FORM, **headers)[0] == 403
        assert ask(server, "POST", "/gradio_api/queue/join", JOIN, Content_Type="application/json", **headers)[0] == 403
    for path in ("/gradio_api/queue/data?session_hash=a", "/config", "/gradio_api/file=a.png", "/"):
        assert ask(server, "GET", path, Origin="http://evil.example")[0] == 403
        assert ask(server, "GET", path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert {str(path) for path in server.folder.rglob("*")} == before
    assert ask(server, "POST", "/gradio_api/upload", PART, **FORM, Origin=own)[0] == 200
    assert ask(server, "GET", "/config")[0] == 200
    assert (
        ask(server, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document")[0]
        == 200
    )


def test_another_name_is_refused(server: Server):
    """A page elsewhere whose name was made to point here sends its own name as host and as origin."""
    evil = f"evil.example:{server.port}"
    assert ask(server, "POST", "/gradio_api/upload", PART, **FORM, Host=evil, Origin=f"http://{evil}")[0] == 400


def test_files_of_this_machine_are_not_served(server: Server, tmp_path: Path):
    secret = tmp_path / "secret.txt"
    secret.write_text("what only the user may read")
    for path in (secret, "/etc/passwd", "../../../../etc/passwd"):
        status, content = ask(server, "GET", f"/gradio_api/file={path}")
        assert status >= 400 and b"what only" not in content and b"root:" not in content
