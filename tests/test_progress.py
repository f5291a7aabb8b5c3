"""Progress where there is no terminal: a line a minute, with what a person waits for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from a3tune.cli.progress import Lines, bar


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_a_minute() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines("Training", said.append, clock)
    for done in range(1, 241):
        clock.now += 2.5
        if done == 30:
            lines.note("loss_llm 1.23")
        lines(done, 1000)
    assert len(said) == 10
    first, last = said[0], said[-1]
    assert first.startswith("Training: 24 of 1,000 (2 %), 41 min left, ")
    assert last.startswith("Training: 240 of 1,000 (24 %), 32 min left, loss_llm 1.23, ")
    assert last.endswith("GB of memory")


def test_short_work_says_nothing() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines("Answering", said.append, clock)
    for done in range(1, 50):
        clock.now += 1
        lines(done, 49)
    assert said == []


@pytest.mark.parametrize(
    ("seconds", "left"), [(61, "left,"), (70, "1 min left"), (3600, "1 h 00 min left"), (100_000, "27 h 47 min left")]
)
def test_what_is_left_counts_from_where_this_process_began(seconds: float, left: str) -> None:
    """A run that goes on at step 500 has not made 500 steps in its first minute."""
    said: list[str] = []
    clock = Clock()
    lines = Lines("Training", said.append, clock)
    lines(500, 502)
    clock.now += seconds
    lines(501, 502)
    assert left in said[0]


def test_each_slow_step_has_its_line() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines("Training", said.append, clock)
    for done in (1, 2, 3):
        clock.now += 300
        lines(done, 3)
    assert [line.split(",")[0] for line in said] == [f"Training: {n} of 3 ({100 * n // 3} %)" for n in (1, 2, 3)]
    assert "left" not in said[0]  # nobody knows yet how long a step takes


def test_only_the_first_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with bar("Training") as progress:
        progress.note("nothing")
        progress(1, 2)


def test_a_log_that_is_a_file_gets_lines(tmp_path: Path) -> None:
    """As `nohup a3tune ... > log 2>&1` does."""
    code = (
        "from a3tune.cli import progress\n"
        "progress.EVERY = 0.0\n"
        "with progress.bar('Finding regions') as told:\n"
        "    for done in range(1, 4):\n"
        "        told(done, 3)\n"
    )
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, check=True, env=dict(os.environ))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"Finding regions: {n} of 3 ({100 * n // 3} %)" for n in (1, 2, 3)
    ]
