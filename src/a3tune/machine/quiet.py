"""Warnings of other libraries, silenced by one thread at a time: Python keeps what is silenced for the whole process.

Two threads that did so at once could leave all warnings silenced, or one of them heard.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_ONE = RLock()


@contextmanager
def ignoring(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Warnings of a kind whose text begins with `message` (a regular expression) are not heard while this is open."""
    with _ONE, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield
