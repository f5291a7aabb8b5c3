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


def test_asked_for_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(2) == torch.get_num_threads() == 2


def test_the_environment_wins_over_the_probe(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # read by PyTorch at its start, hence set by hand here
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_passes", lambda *_: pytest.fail("probed"))
    assert choose_threads() == torch.get_num_threads() == 2


@pytest.mark.parametrize("faster", [1, 4])
def test_the_probe_takes_the_faster_one(monkeypatch, faster):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_passes", lambda count, seconds: 10 if count == faster else 9)
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
