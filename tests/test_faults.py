"""A few of the faults of `benchmarks/faults.py`, which tries them all: killed, disk full, in use, damaged files."""

import shutil
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("needs forks and the file system of Linux", allow_module_level=True)

from a3tune.machine.files import locked
from injection import MAIN, Fault, Kind, World, run, writes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults") / "world")


def last(world: World, name: str, change: str) -> int:
    """The last change of a command that begins like this."""
    return max(at for at, found in enumerate(world.reference(name)[1]) if found.startswith(change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("label", "os.rename labels/similarities"),
        ("train", "save run/checkpoints/checkpoint-2/optimizer.pt"),
        ("eval", "open run/predictions.jsonl"),
        ("eval", "open run/reliance.jsonl"),
        ("convert", "os.rename .model.unfinished/new"),
    ],
)
def test_a_killed_command_ends_as_an_undisturbed_one(world: World, name: str, change: str) -> None:
    trial = world.after(name, [Fault("kill", last(world, name, change))])
    assert trial.struck
    assert not trial.wrong


@pytest.mark.parametrize("kind", ["tear", "short"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("eval", "open run/predictions.jsonl"),
        ("eval", "open run/reliance.jsonl"),
        ("convert", "save .model.unfinished/new/model-00003"),
    ],
)
def test_a_write_that_ends_in_the_middle_leaves_nothing_that_is_in_the_way(
    world: World, name: str, change: str, kind: Kind
) -> None:
    at = last(world, name, change)
    assert at in writes(world.reference(name)[1])
    trial = world.after(name, [Fault(kind, at)])
    assert trial.struck
    assert not trial.wrong


def test_a_full_disk_while_a_checkpoint_is_saved_is_told(world: World) -> None:
    trial = world.after("train", [Fault("short", last(world, "train", "save run/checkpoints/checkpoint-1/rng_state"))])
    assert trial.struck
    assert "run: cannot be written" in trial.broken[0].said
    assert not trial.wrong


@pytest.mark.parametrize("name", [*MAIN, "label export", "data prepare"])
def test_a_read_only_folder_is_told(world: World, name: str) -> None:
    ended = world.after(name, [Fault("read-only", 0)]).broken[0]
    assert ended.code == 2
    assert "Read-only file system" in ended.said


@pytest.mark.parametrize(("name", "folder"), [("label", "labels"), ("eval", "run"), ("convert", ".model.unfinished")])
def test_the_second_of_two_is_refused(world: World, name: str, folder: str) -> None:
    world.after(name, [])
    shutil.rmtree(world.work / "model", ignore_errors=True)  # what is there already is refused before anything else
    with locked(world.work / folder):
        ended = run(MAIN[name], world.work)
    assert ended.code == 2
    assert "in use by another run" in ended.said
