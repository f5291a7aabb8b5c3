"""Makes the pictures of the explorer in `docs/images/`: python docs/screenshots.py ADAPTER...

The adapters are those of `a3tune demo` (runs/demo/lora/adapter runs/demo/a3tune/adapter). Needs Chromium, the extra
`app` and the dependency group `test`.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, chromium, served  # noqa: E402

IMAGES = ROOT / "docs" / "images"
STATUS = "document.querySelector('#status').innerText"


def main(adapters: list[str]) -> None:
    arguments = [argument for folder in adapters for argument in ("--adapter", str(Path(folder).resolve()))]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        served(Path(folder), *arguments) as server,
        chromium(Path(folder) / "browser") as browser,
    ):
        browser.open(server.url, 1200, 900)
        ask(browser)
        word(browser)
        browser.click("#find")
        browser.wait("document.querySelector('#picks li')")
        save(browser, "explorer.png")
        browser.open(server.url, 390, 844, touch=True)
        ask(browser)
        word(browser)
        browser.run("document.querySelector('#pane-0').scrollIntoView({behavior: 'instant'})")
        save(browser, "explorer-phone.png", full=False)


def ask(browser: Browser) -> None:
    """The second suggested question, about the number of lesions in an organ."""
    browser.click("#suggestion label:nth-of-type(2) input")
    browser.wait(f"{STATUS}.includes('true answer')")
    browser.click("#ask")
    browser.wait(f"{STATUS}.includes('Answered')")


def word(browser: Browser) -> None:
    browser.click("#pane-0 .words label:nth-of-type(2) span")
    browser.wait("document.querySelector('#pane-0 figcaption').innerText.includes('the word')")


def save(browser: Browser, name: str, *, full: bool = True) -> None:
    IMAGES.mkdir(exist_ok=True)
    Image.open(io.BytesIO(browser.screenshot(full=full))).convert("RGB").save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
