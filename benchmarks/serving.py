"""Answers per second of the server with 1, 8 and 32 clients, beside a loop of `ask` in one process.

    python benchmarks/serving.py [--model tiny] [--tokens 24] [--questions 64] [--repetitions 5] [--out FILE]

The server is the command `a3tune serve` in a process of its own; clients are threads here that ask one question after
the other. `ask` looks where the model looked, too, so the server is also asked with the attention.
"""

import argparse
import base64
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from measure import Spread, about, listed, table, take_turns, write

import a3tune
from a3tune.data.phantom import write_phantom

QUESTION = "Describe the image."
"""Has long answers."""
CLIENTS = (1, 8, 32)


@contextmanager
def serving(model: str, device: str) -> Iterator[str]:
    """Address of a server."""
    command = [sys.executable, "-m", "a3tune", "serve", "--port", "0", f"model.path={model}", f"model.device={device}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = next((line for line in server.stdout if line.startswith("Serving")), None)
            assert line is not None, "the server did not start"
            yield line.split()[-1]
        finally:
            server.terminate()


def ask_all(url: str, images: Sequence[bytes], clients: int, tokens: int, *, attention: bool) -> None:
    """One question about each image, from so many clients at once."""

    def visit(image: bytes) -> None:
        data = "data:image/png;base64," + base64.b64encode(image).decode()
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTION}]
        body = {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
        client.post("/chat/completions", json=body | {"attention": attention}).raise_for_status()

    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        list(pool.map(visit, images))


def loop(vlm: a3tune.Model, images: Sequence[bytes], tokens: int) -> None:
    for image in images:
        vlm.ask(image, QUESTION, max_new_tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as model.path")
    parser.add_argument("--device", default="cpu", help="as model.device")
    parser.add_argument("--tokens", type=int, default=24, help="most of an answer")
    parser.add_argument("--questions", type=int, default=64, help="answered per measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small round: only to see that it runs")
    parser.add_argument("--out", type=Path, help="path without suffix for a .json and a .md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.questions, arguments.repetitions, arguments.tokens = 4, 1, 2
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder), {"test": (arguments.questions + 1) // 2}, seed=0)
        files = sorted((Path(folder) / "images").glob("*.png"))
        images = [file.read_bytes() for file in (files * arguments.questions)[: arguments.questions]]
    vlm = a3tune.load(arguments.model, device=arguments.device)
    sides: dict[str, Callable[[], Any]] = {"loop of `ask`": partial(loop, vlm, images, arguments.tokens)}
    with serving(arguments.model, arguments.device) as url:
        for attention in (False, True):
            for clients in CLIENTS:
                name = f"server, {clients} client{'s'[: clients > 1]}{', attention' * attention}"
                sides[name] = partial(ask_all, url, images, clients, arguments.tokens, attention=attention)
        costs = take_turns(sides, arguments.repetitions)
    rates = {name: _rate(own["wall"], arguments.questions) for name, own in costs.items()}
    base = rates["loop of `ask`"].median
    rows = [[name, rate, f"{rate.median / base:.2f}"] for name, rate in rates.items()]
    made = about() | {"model": arguments.model, "device": arguments.device}
    header = ["Who asks", "Answers per second: median (least to most)", "Of the loop"]
    text = ["# Serving", "", *listed(made)]
    text += [f"- {arguments.questions} questions of at most {arguments.tokens} tokens, {arguments.repetitions} rounds"]
    record = {"about": made, "questions": arguments.questions, "tokens": arguments.tokens, "answers_per_second": rates}
    write(arguments.out, record, "\n".join([*text, "", table(header, rows)]))


def _rate(seconds: Spread, questions: int) -> Spread:
    return Spread(questions / seconds.median, questions / seconds.most, questions / seconds.least)


if __name__ == "__main__":
    main()
