"""The explorer as people use it: a server of its own process, and Chromium."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra app")
websocket = pytest.importorskip("websocket", reason="needs websocket-client")

from a3tune.adapters import add_adapter  # noqa: E402
from a3tune.config import AdapterConfig  # noqa: E402
from a3tune.vlm.load import load_vlm  # noqa: E402
from browser import CHROMIUM, PATIENCE, Browser, Server, chromium, served  # noqa: E402

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> ${7*7} {{7*7}}"
NAME = "<img src=x onerror=alert(3)>"
STATUS = "document.querySelector('#status').innerText"
TOASTS = "[...document.querySelectorAll('[data-testid=toast-body]')].map(toast => toast.innerText).join()"
PICTURE = "document.querySelector('#pane-0 .look svg.panel image')?.getAttribute('href')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With an adapter whose name is as hostile as a folder's can be."""
    folder = tmp_path_factory.mktemp("server")
    adapter = tmp_path_factory.mktemp("adapters") / NAME
    add_adapter(load_vlm("tiny", device="cpu").model, AdapterConfig("lora", rank=1)).save_pretrained(adapter)
    with served(folder, "--adapter", str(adapter), "evaluation.max_new_tokens=12") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def page(server: Server, browser: Browser) -> Browser:
    """A new visitor."""
    return visit(browser, server)


def visit(browser: Browser, server: Server, width: int = 1200, height: int = 900, *, touch: bool = False) -> Browser:
    browser.forget()
    browser.open(server.url, width, height, touch=touch)
    browser.wait("document.querySelector('.stage svg.panel')")
    return browser


def answer(page: Browser) -> str:
    page.click("#ask")
    page.wait("document.querySelector('#status').innerText.includes('Answered')")
    return page.wait("document.querySelector('#pane-0 .said').innerText")


def get(server: Server, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and content of the page."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", "/", headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def dicom(file: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    from test_medical import dicom as encode

    assert pydicom
    rows, columns = np.mgrid[:80, :100]
    file.write_bytes(encode((rows + columns).astype(np.uint16) * 10))


def test_a_word_of_the_answer_shows_its_own_attention(page: Browser):
    said = answer(page)
    whole = page.wait(PICTURE)
    words = page.run("[...document.querySelectorAll('#pane-0 .words span')].map(word => word.textContent)")
    assert words[0] == "whole answer" and all(word in said for word in words[1:-1])
    page.click("#pane-0 .words label:nth-of-type(2) span")
    one = page.wait(f"{PICTURE} !== {whole!r} && {PICTURE}")
    assert f"“{words[1]}”" in page.run("document.querySelector('#pane-0 .look figcaption').innerText")
    # Words can be walked through with the arrow keys.
    page.key("ArrowRight", 39)
    page.wait(f"document.querySelector('#pane-0 .look figcaption').innerText.includes('“{words[2]}”')")
    assert page.run(PICTURE) not in (whole, one)
    page.click("#mode label:nth-of-type(3) input")
    page.wait("document.querySelector('#pane-0 .look figcaption').innerText.includes('layer 1, head 1')")
    assert page.console == []


def test_an_uploaded_dicom_is_asked_about_without_its_names(page: Browser, server: Server, tmp_path: Path):
    file = tmp_path / "Mustermann_Erika.dcm"
    dicom(file)
    page.choose_file("input[type=file]", file)
    page.wait(f"{STATUS}.includes('100 by 80 pixels')")
    before = page.run("document.querySelector('.stage image').getAttribute('href')")
    answer(page)
    page.drag(".stage", (0.25, 0.25), (0.75, 0.75))
    page.wait("document.querySelector('#region').innerText.includes('left 25, top 20, right 75, bottom 60')")
    page.wait("document.querySelector('#pane-0 .facts')?.innerText.includes('Coverage')")
    html = page.run("document.documentElement.outerHTML")
    assert "Mustermann" not in html and "Erika" not in html
    assert not [kept for kept in server.folder.rglob("*") if kept.is_file() and kept.stat().st_size]
    visit(page, server)  # another one
    page.wait("document.querySelector('.stage')?.dataset.width === '120'")
    assert page.run("document.querySelector('.stage image').getAttribute('href')") != before


def test_text_stays_text(page: Browser):
    page.type("#question textarea", HOSTILE)
    answer(page)
    page.click("#find")
    page.wait("document.querySelector('#picks li')")
    assert HOSTILE in page.run("document.querySelector('#picks').innerText")
    assert NAME in page.run("document.querySelector('#pane-1 .who').innerText")
    page.click("#pane-1 input[role=combobox]")
    page.wait(f"document.querySelector('[role=listbox]').innerText.includes({NAME!r})")
    assert page.run("document.querySelectorAll('img[src=x]').length") == 0
    assert page.console == []


def test_segments_become_regions_and_numbers_are_saved(page: Browser, tmp_path_factory: pytest.TempPathFactory):
    page.click("#suggestion label:nth-of-type(2) input")
    page.wait(f"{STATUS}.includes('true answer')")
    answer(page)
    first = page.wait("document.querySelector('#pane-0 .facts').innerText")
    page.click("#find")
    page.click("#rank label:nth-of-type(1) input")
    page.wait("document.querySelector('#region').innerText.includes('segment 1')")
    assert page.wait("document.querySelector('#pane-0 .facts').innerText") != first
    page.run(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href]); }"
    )
    page.click("#save-json")
    name, href = page.wait("window.saved[0]")
    found = json.loads(page.run(f"fetch({href!r}).then(answer => answer.text())"))
    assert name == "answers.json" and found["region"]["name"] == "segment 1" and len(found["answers"]) == 2


def test_the_same_question_with_the_region_hidden(page: Browser):
    page.click("#hide input")
    page.click("#no-region")
    page.wait("document.querySelector('#region').innerText.includes('No region')")
    assert "no region to hide" in (answer(page) and page.run(STATUS))
    page.drag(".stage", (0.25, 0.25), (0.5, 0.5))
    page.wait("document.querySelector('#region').innerText.includes('box')")
    answer(page)
    page.wait("document.querySelectorAll('#pane-0 .pictures figure').length === 3")
    said = page.run("document.querySelector('#pane-0 .pictures').innerText")
    assert "All but the region hidden" in said and ("the same answer" in said or "another answer" in said)
    shown = page.run("[...document.querySelectorAll('#pane-0 .pictures image')].map(one => one.getAttribute('href'))")
    assert len(set(shown)) == 3
    page.drag(".stage", (0.5, 0.5), (0.75, 0.75))  # another region: what was hidden is not this one
    page.wait("!document.querySelector('#pane-0 .pictures')")
    assert page.console == []


def choose(page: Browser, number: int) -> None:
    """One of the suggested questions; its region is set then."""
    page.click(f"#suggestion label:nth-of-type({number}) input")
    page.wait(f"{STATUS}.includes('true answer')")


PANE = "document.querySelector('#pane-0').innerText"
OUTLINED = "Boolean(document.querySelector('#pane-0 .look path.region'))"
FIRST, SECOND = "What is the abnormality in the stomach?", "Does the spleen contain a lesion?"


def test_an_answer_is_never_scored_against_the_region_of_another_question(page: Browser):
    assert "No answer yet." in page.run(PANE)
    answer(page)  # the question that stands there at the beginning is the one that is chosen: it has a region
    assert f"“{FIRST}”" in page.run(PANE) and "base model · greedy · at most 12 tokens · seed 0" in page.run(PANE)
    page.wait(f"{PANE}.includes('Against the region: stomach') && {PANE}.includes('Coverage') && {OUTLINED}")
    choose(page, 2)
    page.wait(f"{PANE}.includes('Not scored: the region (spleen) is that of “{SECOND}”.') && !({OUTLINED})")
    assert f"“{FIRST}”" in page.run(PANE) and not page.run("document.querySelector('#pane-0 .facts')")
    choose(page, 1)
    page.wait(f"{PANE}.includes('Against the region: stomach') && {OUTLINED}")
    page.type("#question textarea", "Is there a fracture?")
    page.wait("!document.querySelector('#suggestion input:checked')")
    answer(page)
    page.wait(f"{PANE}.includes('“Is there a fracture?”') && {PANE}.includes('Not scored: the region (stomach)')")
    assert page.console == []


def test_who_asks_again_meanwhile_gets_the_answer_to_the_last_question(tmp_path: Path):
    slow = ("evaluation.decode=opera", "evaluation.max_new_tokens=64")
    with served(tmp_path, *slow) as server, chromium(tmp_path / "browser") as page:
        visit(page, server)
        page.click("#ask")
        page.wait(f"{STATUS}.includes('is answering')")
        choose(page, 2)
        page.click("#ask")
        page.wait(f"{STATUS}.includes('Answered') && {PANE}.includes('“{SECOND}”')")
        page.wait(f"{PANE}.includes('Against the region: spleen')")
        assert FIRST not in page.run(PANE)


def test_passing_by_layer_and_head_changes_nothing(page: Browser):
    disabled = "[...document.querySelectorAll('#layer input, #head input')].map(own => own.disabled).join()"
    chosen = "document.querySelector('#mode input:checked').value"
    answer(page)
    assert page.run(disabled) == "true,true"
    page.run("document.querySelector('#mode input').focus()")
    for _ in range(5):
        page.key("Tab", 9)
    page.click("#mode label:nth-of-type(2) input")
    page.wait("document.querySelector('#pane-0 .look figcaption').innerText.includes('all heads')")
    assert page.run(chosen) == "all" and page.run(disabled) == "true,true"
    page.click("#mode label:nth-of-type(3) input")
    page.wait(f"{disabled} === 'false,false'")


@pytest.mark.parametrize(("width", "height", "touch"), [(1400, 900, False), (390, 844, True)])
def test_an_answer_comes_into_sight(page: Browser, server: Server, width: int, height: int, touch: bool):
    visit(page, server, width, height, touch=touch)
    page.run("document.querySelector('#ask').click()")
    page.wait(f"{STATUS}.includes('Answered')")
    inside = "(own => own.top >= 0 && own.bottom <= innerHeight)(document.querySelector({!r}).getBoundingClientRect())"
    page.wait(inside.format("#pane-0 .said"))
    if width > height:
        assert page.run(inside.format(".stage")) and page.run("scrollY") == 0  # beside the image


def test_loading_the_page_again_forgets_nothing(page: Browser, server: Server):
    choose(page, 2)
    answer(page)
    page.click("#mode label:nth-of-type(3) input")
    page.wait("document.querySelector('#pane-0 .look figcaption').innerText.includes('layer 1, head 1')")
    before = page.run(PANE)
    page.run("window.old = true")
    page.send("Page.reload")
    page.wait("!window.old && document.querySelector('#pane-0 .said')")
    assert page.wait(PANE) == before
    assert page.run("document.querySelector('#question textarea').value") == SECOND
    assert page.run("document.querySelector('#suggestion input:checked').value") == SECOND
    assert "spleen" in page.run("document.querySelector('#region').innerText")
    answer(page)
    visit(page, server)  # another one
    assert "No answer yet." in page.run(PANE)


def test_an_answer_that_cannot_be_given_says_so_in_its_pane(page: Browser):
    page.click("#no-region")
    page.click("#pane-0 .who-asks [aria-label='Decoding A']")
    page.click("[role=option][aria-label='controlmllm']")
    page.click("#ask")
    page.wait(f"{STATUS}.includes('needs the true regions')")
    assert "Error: controlmllm: needs the true regions" in page.run(PANE) and f"“{FIRST}”" in page.run(PANE)
    assert not page.run("document.querySelector('#pane-0 .look, #pane-0 .typing')")
    page.wait("document.querySelector('#pane-1 .said')?.innerText")  # the other one is answered
    page.click("#save-json")
    assert page.console == []


def test_a_visit_that_is_forgotten_is_told_and_not_another_one_shown(page: Browser):
    answer(page)
    others = """(async () => {
      for (let number = 0; number < 40; number++) {
        const visit = `visit${number}`;
        await fetch('gradio_api/queue/join', {
          method: 'POST', headers: { 'content-type': 'application/json' },
          body: JSON.stringify({ data: [null], fn_index: 0, session_hash: visit }),
        });
        await (await fetch(`gradio_api/queue/data?session_hash=${visit}`)).text();
      }
    })()"""
    page.run(others)
    page.click("#no-region")
    page.wait(f"{STATUS}.includes('load the page again')")
    assert "No region" not in page.run("document.querySelector('#region').innerText")


STEPS = """
import inspect
import gradio
from a3tune.app.model import BASE, Asker
from a3tune.app.page import Page
from a3tune.app.regions import Segmenter
from a3tune.commands.subject import load_models
from a3tune.config import EvaluationConfig, LabelsConfig, ModelConfig

asker = Asker(load_models(ModelConfig(device="cpu"), {BASE: None}), EvaluationConfig())
for step in Page(asker, Segmenter(LabelsConfig())).blocks.fns.values():
    if inspect.isgeneratorfunction(step.fn):
        *_, mistake, last = step.fn(*[None] * len(step.inputs))
        assert "forgotten" in str(mistake)
        print(step.fn.__name__, list(last.values()) == [gradio.skip()])
"""


def test_no_reply_is_shown_a_second_time_over_what_was_typed_meanwhile():
    """Gradio shows what a generator gives last once more when it has ended, which may be late."""
    said = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=PATIENCE)
    assert sorted(said.stdout.splitlines()) == ["_answer True", "_answer True", "_find True"], said.stderr


def test_nothing_can_be_typed_before_the_first_question_stands_there(page: Browser, server: Server):
    """It would be filled in over what was typed."""
    ways = "[...document.querySelectorAll('#question textarea, #ask')].map(own => own.disabled)"
    assert page.run(ways) == [False, False]
    _, _, content = get(server)
    for name in ("question", "ask"):
        about = re.search(
            rb'"elem_id":\s*"%s"[^{}]*"interactive":\s*(\w+)|"interactive":\s*(\w+)[^{}]*"elem_id":\s*"%s"'
            % ((name.encode(),) * 2),
            content,
        )
        assert about and b"false" in about.groups(), name


def test_mistakes_are_said_on_the_page(page: Browser, tmp_path: Path):
    page.type("#question textarea", " ")
    page.click("#ask")
    page.wait(f"{STATUS}.includes('expected a text that is not empty')")
    page.run("""(() => {
      const field = document.querySelector("#question textarea");
      field.value = "\\ud800";
      field.dispatchEvent(new Event("input", { bubbles: true }));
    })()""")
    page.click("#ask")
    page.wait(f"{STATUS}.includes('half of a letter')")
    page.click("#take-box")
    page.wait(f"{STATUS}.includes('left < right')")
    broken = tmp_path / "Erika.png"
    broken.write_bytes(b"no image at all")
    page.choose_file("input[type=file]", broken)
    page.wait(f"{STATUS}.includes('image of 15 bytes')")
    assert "Erika" not in page.run("document.documentElement.outerHTML")


def test_a_file_of_200_megabytes_is_refused(page: Browser, server: Server, tmp_path: Path):
    large = tmp_path / "Erika.png"
    large.touch()
    os.truncate(large, 200 * 2**20)
    page.choose_file("input[type=file]", large)
    said = page.wait(f"{TOASTS}.includes('exceed') && {TOASTS}")
    assert "50" in said and "Erika" not in said
    # Who sends it without the page is refused as well.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    size = len(part) + 60 * 2**20
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(size))
    connection.putheader("Origin", server.url)
    connection.endheaders()
    try:
        connection.send(part + bytes(60 * 2**20))
    except OSError:
        pass  # it may hang up before it has read everything
    else:
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_the_page_fits_a_phone_and_has_a_name_for_every_control(page: Browser, server: Server):
    visit(page, server, 390, 844, touch=True)
    assert page.run("document.documentElement.scrollWidth") <= 390
    nameless = page.run(
        "[...document.querySelectorAll('input:not([type=file]):not([hidden]), textarea, button, [role=img]')]"
        ".filter(own => own.offsetParent !== null || own.getAttribute('role') === 'img')"
        ".filter(own => !own.getAttribute('aria-label') && !(own.innerText || own.labels?.[0]?.innerText || '').trim())"
        ".map(own => own.outerHTML.slice(0, 200))"
    )
    assert nameless == []
    assert page.run("[...document.querySelectorAll('fieldset')].every(own => own.getAttribute('aria-label'))")


def test_nothing_is_loaded_from_elsewhere(page: Browser, server: Server):
    own = (server.url, "data:", "blob:", "chrome", "about:")
    assert len(page.requests) > 10
    assert [address for address in page.requests if not address.startswith(own)] == []
    status, headers, content = get(server)
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert not re.search(rb"<(?:script|link|img)[^>]+(?:src|href)=.https?:", content)


def test_a_page_elsewhere_cannot_speak_to_the_server_by_another_name(server: Server):
    status, _, _ = get(server, Host="elsewhere.example")
    assert status == 400


def test_a_killed_server_is_missed(page: Browser, server: Server):
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    page.click("#ask")
    page.wait(f"{TOASTS}.includes('Connection to the server was lost')")
