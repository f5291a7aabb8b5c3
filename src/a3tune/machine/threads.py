"""How many threads this machine really gives. Knows no model: a fixed workload stands in for one."""

import os
import time

import torch

from a3tune.errors import ConfigError

PROBE_SECONDS = 1.0


def choose_threads(asked: int | None = None) -> int:
    """Set PyTorch's number of threads and return it: `asked`, else OMP_NUM_THREADS, else the faster of one and all.

    On shared virtual machines all threads can be several times slower than one, so a probe of about one second decides.
    Raises ConfigError when `asked` is below 1.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"threads: expected an integer >= 1, got {asked}")
    if asked is None:
        asked = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else _faster(torch.get_num_threads())
    torch.set_num_threads(asked)
    return asked


def _faster(everything: int) -> int:
    """One thread or `everything`. The two take turns, so that a neighbour's load hits both."""
    if everything == 1:
        return 1
    done = {1: 0, everything: 0}
    for _ in range(2):
        for threads in done:
            done[threads] += _passes(threads, PROBE_SECONDS / 4)
    return max(done, key=lambda threads: done[threads])


def _passes(threads: int, seconds: float) -> int:
    """How many forward and backward passes of a small feed-forward block fit into this time."""
    torch.set_num_threads(threads)
    states = torch.ones(2048, 128)
    up, down = (torch.full(shape, 0.01, requires_grad=True) for shape in ((128, 384), (384, 128)))
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        torch.nn.functional.gelu(states @ up).matmul(down).sum().backward()
        count += 1
    return count
