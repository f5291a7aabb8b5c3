"""Being asked to stop: Ctrl-C, a cluster's SIGTERM, a terminal that goes. Light; knows no work and what is kept of it.

A signal that this process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any

from a3tune.machine import processes
from a3tune.text import visible

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ASKED = 128
"""Exit codes of signals start here."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop. The message, if any, says what is kept and how to go on."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number
        """Of the signal."""


def told(stop: KeyboardInterrupt) -> int:
    """Say that this command was asked to stop, once for all its processes. Returns the exit code, by the signal's
    number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    if processes.index() == 0:
        how = str(stop) or "interrupted; the same command goes on from what is finished"
        print(f"\na3tune: {visible(how)}", file=sys.stderr)
    return _ASKED + getattr(stop, "number", signal.SIGINT)


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """While this is open, `handler` takes what asks to stop. Elsewhere than in the main thread nothing changes."""
    with keeping() as before:
        for number, old in before.items():
            if old is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield


@contextmanager
def keeping() -> Iterator[dict[int, Any]]:
    """Signal -> its handler, which is back when this ends, whoever takes the signal meanwhile.

    Without those that are no function of Python's; in another thread than the main one, which may take none, empty.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: old for number in SIGNALS if (old := signal.getsignal(number)) is not None} if main else {}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stopping(then: Any = signal.SIG_DFL) -> Iterator[None]:
    """While this is open, the first signal raises `Stopped`; later ones have `then` as their handler, by default a
    second one ends the process at once."""

    def stop(number: int, _: Any) -> None:
        for each in SIGNALS:
            if signal.getsignal(each) is stop:
                signal.signal(each, then)
        raise Stopped(number=number)

    with handling(stop):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Signals wait while this is open, and in processes that are started meanwhile, until `leave_to_parent`.

    Without it, Ctrl-C ends a process with a traceback while it still imports what it needs. SIGTERM does not wait: by
    that a parent ends its processes.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS} - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*, terminable: bool) -> None:
    """In a process that works for another: who asks a whole group to stop asks the parent, which ends its workers.

    `terminable`: SIGTERM ends this process whoever sends it; else only its parent's does, where the system tells who
    sent it (not on macOS).
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if not terminable and (parent := parent_process()) is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(parent.pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    """End this process, well, when its parent terminates it: Python does so with what is left when the parent ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
