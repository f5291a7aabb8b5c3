import os
import signal
import sys
import time
from pathlib import Path

import pytest

from a3tune.errors import ConfigError, DataError, LabelError
from a3tune.machine import cluster

pytest.importorskip("ray", reason="needs the extra ray")


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A Ray cluster with two processors, which finds what is defined in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps a token there
        patch.delenv("RAY_ADDRESS", raising=False)
        ray, ours = cluster.connect(2)
        assert ours and cluster.connect(2) == (ray, False)
        yield ray
        ray.shutdown()


def make_work():
    """Some work whose class travels by value: the workers need not import this file."""

    class Work:
        def __init__(self):
            self.loaded = time.monotonic_ns()

        def __reduce__(self):
            return Work, ()

        def __call__(self, task):
            if task == "wrong":
                raise DataError("the third")
            if task == "deadly":
                os._exit(3)
            time.sleep(task)
            return task, os.getpid(), self.loaded

    return Work()


def test_results_come_in_the_order_of_the_tasks_from_workers_that_load_once(two_workers):
    tasks = [0.2, None, 0.01, 0.02, None, *[0.01] * 20]
    taken = []
    results = cluster.in_order(make_work(), (taken.append(task) or task for task in tasks), 2)
    found = [next(results)]
    assert len(taken) < 12  # results and tasks do not pile up in memory
    found += results
    assert [result and result[0] for result in found] == tasks
    assert len({result[1:] for result in found if result}) == 2
    assert os.getpid() not in {result[1] for result in found if result}


def test_an_error_arrives_as_it_was_raised_and_a_deadly_task_ends_the_run(two_workers):
    results = cluster.in_order(make_work(), [0, "wrong", "deadly", 0], 1)
    assert next(results)[0] == 0
    with pytest.raises(DataError, match="the third"):
        next(results)
    with pytest.raises(LabelError, match=r"died 4 times at the same task.*what was made is kept"):
        list(cluster.in_order(make_work(), ["deadly"], 1))


def test_a_killed_worker_changes_nothing_in_the_store(two_workers, tmp_path, monkeypatch):
    from a3tune.labels import store
    from a3tune.labels.make import LabelMaker
    from test_store import Brightness, Quarters, SlowQuarters, content, make_samples

    monkeypatch.setattr(store, "SHARD_IMAGES", 4)
    samples = make_samples(tmp_path, 24)
    processes = tmp_path / "processes"
    processes.mkdir()
    killed = []

    def load():
        (processes / str(os.getpid())).touch()
        return Brightness()

    class Loaded(Brightness):
        """Notes the processes that it is loaded in."""

        def __reduce__(self):
            return load, ()

    def kill(done, total):
        if done == 11:
            killed.append(int(max(processes.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    def interrupt(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "ray", progress=interrupt)
    run = store.label_images(
        samples, LabelMaker(SlowQuarters(), Loaded()), tmp_path / "ray", workers=2, backend="ray", progress=kill
    )
    assert killed and run.proposed == 16
    assert len(list(processes.iterdir())) == 3  # one took the place of the killed one
    store.label_images(samples, LabelMaker(Quarters(), Brightness()), tmp_path / "alone")
    assert content(tmp_path / "ray") == content(tmp_path / "alone")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"labels\.backend: ray is not installed.*a3tune\[ray\]"):
        cluster.connect(1)
