"""Work on a list by the machines of a Ray cluster, with the results in the list's order. Knows no labels."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from a3tune.errors import ConfigError, LabelError
from a3tune.machine.signals import keeping

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4
"""Tasks per worker that are handed out before the oldest result is taken: results do not pile up in memory."""
_QUEUED = 2
"""Tasks at a worker: the next one is there when one is done."""
_RETRIES = 3
"""Times that a task is begun anew because its worker died."""
_OBJECT_STORE = 100_000_000
"""Bytes for what travels within a local cluster: images travel as paths, and what is seen in one has some 100 kB."""


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task | None], workers: int
) -> Generator[Result | None, None, None]:
    """`work(task)` for each task, in order; None for a task that is None, which costs nothing.

    Every worker is a Ray actor with one processor (Ray sets OMP_NUM_THREADS) and, where the cluster has any, one GPU of
    its own; it unpickles `work` once. Workers that find no room yet get no tasks, and begin when there is room. When a
    worker or its machine dies, another takes its place and its tasks are begun anew. The cluster is the one at
    RAY_ADDRESS, or of this machine alone and ended with the work.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
        LabelError: workers died again and again at the same task.
    """
    ray, ours = connect(workers)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
    pickled = ray.cloudpickle.dumps(work)
    actors = [kind.remote(pickled) for _ in range(workers)]
    busy = {actor.__ray_ready__.remote(): actor for _ in range(_QUEUED) for actor in actors}
    waiting: deque = deque()
    try:
        for task in tasks:
            if task is None:
                waiting.append(None)
            else:
                (free,), _ = ray.wait(list(busy), fetch_local=False)
                actor = busy.pop(free)
                waiting.append(actor.run.remote(task))
                busy[waiting[-1]] = actor
            if len(waiting) > _AHEAD * workers:
                yield _result(ray, waiting.popleft())
        while waiting:
            yield _result(ray, waiting.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def connect(workers: int) -> tuple[Any, bool]:
    """The package `ray`, connected, and whether it was not before.

    Without RAY_ADDRESS a cluster of this machine alone is started, with `workers` processors.

    Raises:
        ConfigError: it is not installed, or there is no cluster at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at the import; otherwise Ray sends usage statistics
    try:
        import ray
    except ImportError as error:
        raise ConfigError("labels.backend: ray is not installed; use pip install 'a3tune[ray]'") from error
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not (address := os.environ.get("RAY_ADDRESS")):
        with keeping():  # Ray takes SIGTERM for itself
            ray.init(
                address="local",
                num_cpus=workers,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                **quiet,
            )
        return ray, True
    try:
        with keeping():
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS: expected a Ray cluster at {address}: {error}; start it with `ray start --head`"
        ) from error
    return ray, True


class _Worker:
    def __init__(self, pickled: bytes):
        self._pickled = pickled
        self._work: Any = None

    def run(self, task: Any) -> Any:
        # Not when it starts: only what goes wrong in a task reaches the caller as it was raised.
        if self._work is None:
            from ray import cloudpickle

            self._work = cloudpickle.loads(self._pickled)
        return self._work(task)


def _result(ray: Any, reference: Any) -> Any:
    if reference is None:
        return None
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise LabelError(
            f"workers died {_RETRIES + 1} times at the same task, perhaps for lack of memory: "
            f"{str(error).splitlines()[0]}; run again with more memory for each, what was made is kept"
        ) from error
