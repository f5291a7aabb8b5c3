from types import SimpleNamespace

import pytest
import torch

from a3tune.errors import ConfigError
from a3tune.machine import threads
from a3tune.machine.threads import choose_threads


@pytest.fixture(autouse=True)
def _restore():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def clock(monkeypatch: pytest.MonkeyPatch, now) -> None:
    """`now` tells the time to what measures."""
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=now))


def test_asked_for_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(2) == torch.get_num_threads() == 2


def test_the_environment_wins_and_nothing_is_measured(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # read by PyTorch at its start, hence set by hand here
    torch.set_num_threads(2)
    clock(monkeypatch, lambda: pytest.fail("measured"))
    assert choose_threads() == torch.get_num_threads() == 2


@pytest.mark.parametrize("faster", [1, 4])
def test_the_faster_number_is_taken(monkeypatch, faster):
    """On a clock by which a look at it, one for each pass, takes less time with this number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    passed = [0.0]

    def now() -> float:
        passed[0] += 0.03 if torch.get_num_threads() == faster else 0.04
        return passed[0]

    clock(monkeypatch, now)
    assert choose_threads() == torch.get_num_threads() == faster


def test_the_probe_runs(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "PROBE_SECONDS", 0.1)
    assert choose_threads() in (1, 2)


@pytest.mark.parametrize("asked", [0, -1])
def test_no_threads_at_all_is_an_error(asked):
    with pytest.raises(ConfigError, match=f"threads: expected an integer >= 1, got {asked}"):
        choose_threads(asked)
