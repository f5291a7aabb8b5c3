import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a3tune.errors import DataError, LabelError
from a3tune.machine.workers import in_order


def double(value):
    time.sleep(0.05 / value)
    return 2 * value, os.getpid()


def fail(value):
    if value == 3:
        raise DataError("three")
    return value


def die(value):
    os._exit(3)


def threads(value):
    import torch  # here: the other workers need not wait for it

    return torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    results = list(in_order(double, [1, None, 50, 2, None, 30], workers))
    assert [result and result[0] for result in results] == [2, None, 100, 4, None, 60]
    assert (os.getpid() in {result[1] for result in results if result}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers):
    taken = []
    results = in_order(fail, (taken.append(task) or task for task in range(1000) if task != 3), workers)
    next(results)
    assert len(taken) < 10
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_as_it_was_raised(workers):
    results = in_order(fail, [1, 2, 3, 4], workers)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(DataError, match="three"):
        next(results)


def test_workers_run_on_one_thread_and_a_dead_one_is_named():
    assert list(in_order(threads, [0], 2)) == [1]
    with pytest.raises(LabelError, match=r"one of 2 worker processes died.*run again with fewer"):
        list(in_order(die, [1], 2))


KILLED = """
import os, signal, sys
from a3tune.machine.workers import in_order
def name(task):
    return os.getpid()
if __name__ == "__main__":
    results = in_order(name, range(100), 2)
    print(next(results), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    found = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, timeout=60)
    status = Path("/proc") / found.stdout.strip() / "status"
    deadline = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


HUNG_UP = """
import sys, time
from a3tune.machine.signals import Stopped, stopping
from a3tune.machine.workers import in_order
def work(task):
    print("begun", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    try:
        with stopping():
            list(in_order(work, [1, 2], 2))
    except Stopped as stop:
        print("stopped by", stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_whole_group_is_asked_to_stop_and_one_answers(tmp_path, number):
    script = tmp_path / "hung_up.py"
    script.write_text(HUNG_UP)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, number)
    assert process.communicate(timeout=40) == (f"stopped by {int(number)}\n", "")


ASKED = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from a3tune.machine.signals import Stopped, held, stopping
from a3tune.machine.workers import become_worker, ending, until_stopped
def work(path):
    try:
        path.touch()
        time.sleep(60)
    except Stopped:
        path.with_suffix(".saved").touch()
        raise
if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, get_context("spawn"), become_worker)
    try:
        with stopping(), ending(pool):
            with held():
                begun = [pool.submit(until_stopped, work, Path(sys.argv[1]) / str(number)) for number in range(5)]
            for future in begun:
                future.result()
    except Stopped as stop:
        print("stopped by", stop.number)
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_stop_is_handed_on_and_nothing_more_is_begun(tmp_path, send):
    script, work = tmp_path / "asked.py", tmp_path / "work"
    script.write_text(ASKED)
    work.mkdir()
    command = [sys.executable, str(script), str(work)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(work.iterdir())) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    send(process.pid, signal.SIGTERM)
    said, complained = process.communicate(timeout=40)
    assert said == "stopped by 15\n"
    assert complained == ""
    assert sorted(path.name for path in work.iterdir()) == ["0", "0.saved", "1", "1.saved"]
