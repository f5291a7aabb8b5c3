"""Work on a list by several processes, with the results in the list's order. Knows no labels."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

from a3tune.errors import LabelError
from a3tune.machine.signals import Stopped, held, leave_to_parent, stopping

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 2
"""Tasks per worker that are handed out before the oldest result is taken: results do not pile up in memory."""
_GRACE = 0.5
"""Seconds: a signal that ends a whole group of processes may reach a worker before it stops this one."""
_stopped = False
_state: dict[str, Callable[[Any], Any]] = {}
"""The work of this process, if it is a worker."""


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task | None], workers: int
) -> Generator[Result | None, None, None]:
    """`work(task)` for each task, in order; None for a task that is None, which costs nothing.

    With one worker everything happens in this process. More are fresh processes of one thread each: `work` and the
    tasks must travel to them (pickle), and a script must start them under `if __name__ == "__main__"`. They end with
    this process, even if it is killed.

    Raises:
        LabelError: a worker died.
    """
    if workers == 1:
        yield from (None if task is None else work(task) for task in tasks)
        return
    waiting: deque[Future] = deque()
    with held():  # this starts the process of Python's that keeps its semaphores: SIGHUP is not for that one, either
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _take_up, (work,))
    try:
        with ending(pool):
            for task in tasks:
                with held():  # this may start a worker
                    waiting.append(_done() if task is None else pool.submit(_run, task))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        time.sleep(_GRACE)
        raise LabelError(
            f"one of {workers} worker processes died, perhaps for lack of memory: {error}; run again with fewer, "
            "what was made is kept"
        ) from error


@contextmanager
def ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """What ends this early, an error or a signal, ends the processes that were started in it (SIGTERM), and waits."""
    before = {*active_children()}
    try:
        yield
    except BaseException:
        for process in {*active_children()} - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def become_worker() -> None:
    """In a process that works for another: it ends with that one, and by SIGTERM; other signals are for the parent."""
    leave_to_parent(terminable=True)
    Thread(target=_end_with_parent, daemon=True).start()


def _done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def until_stopped(work: Callable[[Task], Result], task: Task) -> Result:
    """In such a process: `work(task)`, which a SIGTERM stops (`signals.Stopped`); no task follows then."""
    global _stopped
    if _stopped:
        raise Stopped(number=signal.SIGTERM)
    try:
        # Asked with its whole group, it is asked again by its parent while it saves.
        with stopping(signal.SIG_IGN):
            return work(task)
    except Stopped:
        _stopped = True
        raise


def _take_up(work: Callable[[Any], Any]) -> None:
    become_worker()
    os.environ["OMP_NUM_THREADS"] = "1"  # what computes reads it when it is imported
    if "torch" in sys.modules:  # it came with the work
        sys.modules["torch"].set_num_threads(1)
    _state["work"] = work


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Any) -> Any:
    return _state["work"](task)
