"""How far long work is: a bar on a terminal, a line a minute where there is none (nohup, SLURM, a pipe)."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from a3tune.cli.app import echo
from a3tune.machine import processes
from a3tune.machine.memory import in_use

EVERY = 60.0
"""Seconds between lines."""


class Progress(Protocol):
    """What long work tells."""

    def __call__(self, done: int, total: int) -> None:
        """So many of so many are done."""
        ...

    def note(self, text: str) -> None:
        """What else is known now, such as losses; shown with what is done."""
        ...


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """Shows progress on standard error while this is open; only the first of several processes does."""
    if processes.index() > 0:
        yield _Nothing()
    elif not sys.stderr.isatty():
        yield Lines(title, lambda line: echo(line, err=True))
    else:
        yield from _on_terminal(title)


class Lines:
    """A line for what is done, at most one a minute: work of less than that writes none.

    Args:
        title: what is done.
        say: takes a line.
        clock: seconds.
    """

    def __init__(self, title: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._say, self._clock = title, say, clock
        self._note = ""
        self._said = clock()
        self._first: tuple[float, int] | None = None
        """When it was first told how much is done, and how much: a run that goes on does not start at 0."""

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        self._first = self._first or (now, done)
        if now - self._said < EVERY:
            return
        self._said = now
        begun, before = self._first
        left = f"{_duration((now - begun) * (total - done) / (done - before))} left" if done > before else ""
        parts = [f"{done:,} of {total:,} ({100 * done // max(1, total)} %)", left, self._note, in_use()]
        self._say(f"{self._title}: {', '.join(part for part in parts if part)}")

    def note(self, text: str) -> None:
        self._note = text


class _Nothing:
    def __call__(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def _on_terminal(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, note="")

        class Bar:
            def __call__(self, done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            def note(self, text: str) -> None:
                bars.update(task, note=text)

        yield Bar()


def _duration(seconds: float) -> str:
    """In the two largest units, as `1 h 05 min`, or in one."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
