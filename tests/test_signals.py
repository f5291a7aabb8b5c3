"""Being asked to stop: one true line, the code of the signal, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("needs forks, process groups and /proc", allow_module_level=True)

import torch

from a3tune.cli import main
from a3tune.machine.signals import SIGNALS, Stopped, handling, held, leave_to_parent, stopping
from injection import MAIN, Fault, World, context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("signals") / "world")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_and_the_next_one_is_the_systems(number: int) -> None:
    with stopping(), pytest.raises(Stopped) as told:
        signal.raise_signal(number)
    assert told.value.number == number
    with stopping():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_DFL}


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(), handling(lambda *_: pytest.fail("nohup was undone")):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_held_signal_comes_when_it_is_let_go() -> None:
    reached = False
    with stopping(), pytest.raises(Stopped), held():
        signal.raise_signal(signal.SIGHUP)
        reached = True
    assert reached


IMPORTING = """
import os, signal, sys
from a3tune.cli import app, main
@app.command()
def wait() -> None:
    print("here", flush=True)
    signal.pause()
sys.argv = ["a3tune", "wait"]
main()
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_that_has_nothing_to_save_ends_with_one_line(number: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(getattr(signal, number))
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    told = [line for line in said.splitlines() if line and not line.startswith("warning: the shipped ranker")]
    assert told == ["a3tune: interrupted; the same command goes on from what is finished"]


STARTING = """
import signal, sys
def ask(*_, **__):
    signal.raise_signal(signal.{number})
class Importing:
    def find_spec(self, name, *_):
        if name == "a3tune.cli":
            ask()
if "{stage}" == "imports":
    sys.meta_path.insert(0, Importing())
else:
    import typer.core, typer.main
    if "{stage}" == "knows its commands":
        typer.main.get_command = ask
    else:
        typer.core.TyperGroup.parse_args = ask
sys.argv = ["a3tune", "train"]
from a3tune.__main__ import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("stage", ["imports", "knows its commands", "reads its options"])
def test_a_command_that_starts_ends_with_one_line(stage: str, number: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING.format(stage=stage, number=number)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.strip() == "a3tune: interrupted; the same command goes on from what is finished"


class Running:
    """A command in a process group of its own, in the folder `work`."""

    def __init__(self, arguments: list[str], world: World) -> None:
        world._clear()
        self.log = world.folder / "said.txt"
        self.process = context.Process(target=_in_a_group, args=(arguments, str(world.work), str(self.log)))
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the main process, and of the group."""
        assert self.process.pid is not None
        return self.process.pid

    def when(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not ready():
            assert self.process.exitcode is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it said, when nobody of its group is left."""
        self.process.join(180)
        assert self.process.exitcode is not None
        deadline = time.monotonic() + 20
        while _living(self.pid):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
        return self.process.exitcode, self.log.read_text()


def _in_a_group(arguments: list[str], folder: str, log: str) -> None:
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["a3tune", *arguments]
    main()


def _living(group: int) -> list[int]:
    """Processes of a group that are no zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(status.parent.name))
    return found


LONG = ["training.max_steps=500", "training.save_steps=3"]


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize(
    ("number", "code", "workers"), [("SIGTERM", 143, 2), ("SIGHUP", 129, 0), ("SIGINT", 130, 2), ("SIGTERM", 143, 0)]
)
def test_a_training_keeps_its_step(world: World, number: str, code: int, workers: int, whole_group: bool) -> None:
    running = Running([*MAIN["train"], *LONG, f"training.workers={workers}"], world)
    checkpoints = world.work / "run" / "checkpoints"
    running.when((checkpoints / "checkpoint-3" / "trainer_state.json").is_file)
    if whole_group:  # it may reach the others first
        loading = {pid for pid in _living(running.pid) if "pt_data_worker" in Path(f"/proc/{pid}/comm").read_text()}
        assert len(loading) == workers
        for pid in loading:
            os.kill(pid, getattr(signal, number))
        time.sleep(0.3)
        assert {*_living(running.pid)} >= loading
    os.kill(running.pid, getattr(signal, number))
    ended, said = running.ended()
    assert ended == code, said
    assert "Traceback" not in said and "memory" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("a3tune: ")]
    step = int(line.removeprefix("a3tune: stopped after step ").split()[0])
    assert [path.name for path in checkpoints.iterdir()] == [f"checkpoint-{step}"]
    assert line.endswith("the same command goes on from there")


def test_a_second_signal_ends_a_training_at_once(world: World) -> None:
    running = Running([*MAIN["train"], *LONG, "training.workers=1"], world)
    running.when((world.work / "run" / "checkpoints" / "checkpoint-3").is_dir)
    os.kill(running.pid, signal.SIGTERM)
    running.when(lambda: "interrupted" in running.log.read_text() or running.process.exitcode is not None)
    if running.process.exitcode is None:
        os.kill(running.pid, signal.SIGTERM)
    ended, said = running.ended()
    assert ended == 143 and "Traceback" not in said


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_labelling_workers_end_with_their_parent_and_say_nothing(world: World, number: str) -> None:
    """Also while they still import what they need."""
    running = Running([*MAIN["label"], "labels.workers=2"], world)
    running.when(lambda: len(_living(running.pid)) > 2)
    os.killpg(running.pid, getattr(signal, number))
    ended, said = running.ended()
    assert ended == 128 + getattr(signal, number), said
    told = [line for line in said.splitlines() if line and not line.startswith("warning: the shipped ranker")]
    assert told == ["a3tune: interrupted; the same command goes on from what is finished"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("label", "os.rename labels/similarities"),
        # Later, in a training of two steps, the last one is done before a stop is seen.
        ("train", "os.rename run/.config.yaml"),
        ("eval", "open run/predictions.jsonl"),
        ("convert", "os.rename .model.unfinished/new"),
        ("label export", "os.rename overlays/.00003"),
        ("data prepare", "os.rename rad/.test.jsonl"),
        ("report", "os.rename .report.html"),
    ],
)
def test_what_an_interrupted_command_says_is_what_works(world: World, name: str, change: str) -> None:
    changes = world.reference(name)[1]
    trial = world.after(name, [Fault("stop", max(at for at, found in enumerate(changes) if found.startswith(change)))])
    assert trial.struck
    assert "the same command goes on from" in trial.broken[0].said
    assert not trial.wrong


def test_a_training_stopped_before_its_first_step_goes_on(world: World) -> None:
    fixed = ["alignment.head_selection=fixed", "training.workers=2"]
    running = Running([*MAIN["train"], *fixed], world)
    running.when((world.work / "run" / "config.yaml").is_file)
    os.killpg(running.pid, signal.SIGTERM)
    ended, said = running.ended()
    assert ended == 143, said
    assert "goes on from" in said and "Traceback" not in said


def _deaf(ready: Any) -> None:
    leave_to_parent(terminable=False)
    ready.set()
    time.sleep(20)


def test_a_process_that_loads_data_ends_by_its_parents_sigterm_alone() -> None:
    ready = context.Event()
    process = context.Process(target=_deaf, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(20)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0  # else torch, which watches its processes, raises an error somewhere
