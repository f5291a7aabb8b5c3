"""The page as it is read: on a screen and on a phone."""

from collections.abc import Iterator

import pytest

pytest.importorskip("websocket", reason="needs websocket-client")

from a3tune.report.html import render
from browser import CHROMIUM, Browser, chromium
from test_html import _data, _result

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

BROKEN = """[...document.querySelectorAll('thead th')].flatMap(head => {
  const text = head.firstChild, words = [...text.data.matchAll(/\\S+/g)];
  return words.filter(word => {
    const range = document.createRange();
    range.setStart(text, word.index);
    range.setEnd(text, word.index + word[0].length);
    const left = (own) => own.getBoundingClientRect().left;
    return range.getClientRects().length !== 1 || left(range) < left(head);
  }).map(word => word[0]);
})"""
"""Words of table heads that are cut in two, or do not fit."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With every metric that there is."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    results = tuple(_result(name, level) for name, level in (("lora", 0.5), ("a3tune", 0.6)))
    file.write_text(render(_data(results=results)), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("width", [1060, 1400])
def test_heads_of_tables_are_not_cut_in_words(browser: Browser, page: str, width: int):
    browser.open(page, width, 900)
    assert browser.wait("document.querySelectorAll('thead th').length") > 20
    browser.run("document.querySelectorAll('details').forEach(own => { own.open = true; })")
    assert browser.run(BROKEN) == []
    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_the_first_screen_is_a_sentence_and_a_picture(browser: Browser, page: str, width: int, height: int):
    browser.open(page, width, height)
    browser.wait("document.querySelector('.lead')")
    bottom = "document.querySelector({!r}).getBoundingClientRect().bottom"
    assert browser.run(bottom.format(".lead")) < browser.run(bottom.format("#first-case figure svg")) <= height
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_what_is_folded_opens_when_it_is_asked_for(browser: Browser, page: str):
    browser.open(page, 390, 844)
    browser.wait("document.querySelector('#glossary')")
    folded = browser.run("document.documentElement.scrollHeight")
    browser.click("nav a[href='#glossary']")
    browser.wait("document.querySelector('#glossary').closest('details').open")
    browser.run("document.querySelectorAll('details').forEach(own => { own.open = true; })")
    assert folded < 0.75 * browser.run("document.documentElement.scrollHeight")
