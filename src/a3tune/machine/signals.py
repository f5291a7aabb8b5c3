"""Being asked to stop: Ctrl-C, a cluster's SIGTERM, a terminal that goes. Light; knows no work and what is kept of it.

A signal that this process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop. The message, if any, says what is kept and how to go on."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number
        """Of the signal."""


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
def stopping() -> Iterator[None]:
    """While this is open, the first signal raises `Stopped`; a second one ends the process at once."""

    def stop(number: int, _: Any) -> None:
        for each in SIGNALS:
            if signal.getsignal(each) is stop:
                signal.signal(each, signal.SIG_DFL)
        raise Stopped(number=number)

    with handling(stop):
        yield


@contextmanager
def held() -> Iterator[None]:
    """Signals wait while this is open, and in processes that are started meanwhile, until `leave_to_parent`.

    Without it, Ctrl-C ends a process with a traceback while it still imports what it needs. SIGTERM does not wait: by
    that a parent ends its processes.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS} - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*, terminable: bool) -> None:
    """In a process that works for another: who asks a whole group to stop asks the parent, which ends its workers.

    `terminable`: SIGTERM ends this process still, as whoever started it may want.
    """
    for number in SIGNALS:
        ignored = not (terminable and number == signal.SIGTERM)
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
