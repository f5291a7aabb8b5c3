"""The next batch is read by a thread while this one is asked. Knows no image and no model.

Decoding and scaling an image mostly run without Python's lock, so that a thread is enough, and shares what it reads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from a3tune.types import Sample

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Ahead(Generic[R]):
    """A sample, and what is read of it."""

    sample: Sample
    _reading: Future[R]

    @property
    def id(self) -> str:
        return self.sample.id

    def read(self) -> R:
        """Waits for it where it is not read yet; raises what reading raised, as often as it is asked for."""
        return self._reading.result()


@contextmanager
def read_ahead(
    read: Callable[[Sample], R], batches: Sequence[Sequence[Sample]]
) -> Iterator[Iterator[Sequence[Ahead[R]]]]:
    """The batches in their order, each while the one after it is read: at most two are in memory.

    What cannot be read is told by `Ahead.read`, when its batch comes. However this ends, no thread is left: the image
    that is being read is waited for.
    """
    pool = ThreadPoolExecutor(1, "reading")

    def begun(batch: Sequence[Sample]) -> Sequence[Ahead[R]]:
        return [Ahead(sample, pool.submit(read, sample)) for sample in batch]

    def in_turn() -> Iterator[Sequence[Ahead[R]]]:
        waiting: deque[Sequence[Ahead[R]]] = deque()
        for batch in batches:
            waiting.append(begun(batch))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting

    try:
        yield in_turn()
    finally:
        pool.shutdown(cancel_futures=True)
