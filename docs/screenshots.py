"""Makes the pictures of explorer and report in `docs/images/`: python docs/screenshots.py ADAPTER...

The adapters are those of `a3tune demo` (runs/demo/lora/adapter runs/demo/a3tune/adapter), where it ran. Needs Chromium,
the extra `app` and the dependency group `test`.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from a3tune.demo.run import COMMAND, REFERENCE, TESTS, TITLES  # noqa: E402
from a3tune.report.write import Page, write_report  # noqa: E402
from browser import Browser, chromium, served  # noqa: E402

IMAGES = ROOT / "docs" / "images"
STATUS = "document.querySelector('#status').innerText"


def main(adapters: list[str]) -> None:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        chromium(Path(folder) / "browser") as browser,
    ):
        report(browser, [Path(adapter).parent for adapter in adapters], Path(folder) / "report.html")
        explorer(browser, adapters, Path(folder))


def report(browser: Browser, runs: list[Path], page: Path) -> None:
    """The first screen of the demo's report."""
    write_report(runs, page, Page("A3Tune demo", COMMAND, TITLES, TESTS, REFERENCE, "a3tune", synthetic=True))
    browser.send("Emulation.setScrollbarsHidden", hidden=True)
    browser.open(page.as_uri(), 1200, 860)
    browser.wait("document.querySelector('#glossary')")
    save(browser, "report.png", full=False)


def explorer(browser: Browser, adapters: list[str], folder: Path) -> None:
    arguments = [argument for adapter in adapters for argument in ("--adapter", str(Path(adapter).resolve()))]
    with served(folder, *arguments) as server:
        browser.open(server.url, 1400, 900)
        ask(browser)
        word(browser)
        browser.click("#find")
        browser.wait("document.querySelector('#picks li')")
        save(browser, "explorer.png")
        browser.forget()
        browser.open(server.url, 390, 844, touch=True)
        ask(browser)
        word(browser)
        browser.run("document.querySelector('#pane-0').scrollIntoView({behavior: 'instant'})")
        save(browser, "explorer-phone.png", full=False)


def ask(browser: Browser) -> None:
    """The second suggested question, whether there is a lesion in an organ."""
    browser.click("#suggestion label:nth-of-type(2) input")
    browser.wait(f"{STATUS}.includes('true answer')")
    browser.click("#ask")
    browser.wait(f"{STATUS}.includes('Answered')")


def word(browser: Browser) -> None:
    browser.click("#pane-0 .words label:nth-of-type(2) span")
    browser.wait("document.querySelector('#pane-0 figcaption').innerText.includes('the word')")


def save(browser: Browser, name: str, *, full: bool = True) -> None:
    IMAGES.mkdir(exist_ok=True)
    shown = Image.open(io.BytesIO(browser.screenshot(full=full))).convert("RGB")
    shown.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
