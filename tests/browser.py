"""A headless Chromium over its DevTools protocol, just enough to use a page as a person does; the explorer's server."""

import base64
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0
"""Seconds after which what is waited for will not come."""


_SETTLED = """async (selector) => {
  const frame = () => new Promise(requestAnimationFrame);
  let before = '';
  for (;;) {
    const element = document.querySelector(selector);
    element.scrollIntoView({ block: 'center', behavior: 'instant' });
    const box = element.getBoundingClientRect();
    const now = [box.left + box.width / 2, box.top + box.height / 2];
    if (String(now) === before) return now;
    before = String(now);
    for (let i = 0; i < 6; i++) await frame();
  }
}"""
"""Middle of an element that has stood still for some frames."""


class Browser:
    """One tab. Every wait polls the page, so that no test depends on how fast the machine is."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self._number = itertools.count(1)
        self.requests: list[str] = []
        """Address of everything that the page asked for."""
        self.console: list[str] = []
        """Exceptions and dialogs of the page."""
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = next(self._number)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def open(self, address: str, width: int = 1200, height: int = 900, *, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def forget(self) -> None:
        """What the page keeps in this tab: who opens it next is another visitor."""
        self.run("location.origin === 'null' || sessionStorage.clear()")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE) -> Any:
        """Value of an expression as soon as it is truthy."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"(found => found instanceof Node ? true : found)({script})"):
                return value
            time.sleep(0.1)
        shown = self.run("[...document.querySelectorAll('textarea, #status')].map(own => own.outerHTML).join()")
        shown += "\n" + self.run("document.body.innerText")[:3000]
        raise AssertionError(f"after {seconds:.0f} s still not: {script[:300]}\n{self.requests[-5:]}\n{shown}")

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of the first such element."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, selector: str, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, between two places of an element, given as shares of its width and height."""
        self.place(selector)
        left, top, width, height = self.run(
            f"(r => [r.left, r.top, r.width, r.height])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        steps = [("mousePressed", begin), ("mouseMoved", begin), ("mouseMoved", end), ("mouseReleased", end)]
        for kind, (x, y) in steps:
            place = {"x": left + x * width, "y": top + y * height}
            self.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)

    def place(self, selector: str) -> tuple[float, float]:
        """Middle of an element, once it is there, scrolled to, and has stopped moving."""
        self.wait(f"document.querySelector({selector!r})")
        x, y = self.run(f"({_SETTLED})({selector!r})")
        return x, y

    def type(self, selector: str, text: str) -> None:
        """Replace what stands in a field."""
        self.click(selector)
        self.run(f"document.querySelector({selector!r}).select()")
        self.send("Input.insertText", text=text)

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def choose_file(self, selector: str, file: Path) -> None:
        """What a person chooses in the dialog of an `<input type=file>`."""
        self.wait(f"document.querySelector({selector!r})")
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, *, full: bool = True) -> bytes:
        """PNG of the page."""
        clip = {}
        if full:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", **clip)["data"])

    def close(self) -> None:
        self._socket.close()

    def _note(self, message: dict[str, Any]) -> None:
        kind, about = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.console.append(json.dumps(about["exceptionDetails"]))
        elif kind == "Page.javascriptDialogOpening":
            self.console.append(f"dialog: {about['message']}")


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A fresh browser whose profile and downloads lie in `folder`."""
    assert CHROMIUM
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio"]
    flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--remote-allow-origins=*"]
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(_address(folder / "DevToolsActivePort", process))
        browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(PATIENCE)


@dataclass(frozen=True)
class Server:
    """The explorer in a process of its own."""

    port: int
    folder: Path
    """Where it runs, with its temporary files."""
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Server]:
    """`a3tune app` with these arguments, as soon as it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "a3tune", "app", "--port", str(port), *arguments],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Explorer:"):
                break
        else:
            raise AssertionError("".join(said))
        yield Server(port, folder, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _address(file: Path, process: subprocess.Popen) -> str:
    """Of the first tab."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if file.is_file() and (port := file.read_text().partition("\n")[0]):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise AssertionError("Chromium did not start")
