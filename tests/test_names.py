from pathlib import Path

import pytest

from a3tune.errors import RunError
from a3tune.run.folder import RunFolder
from a3tune.run.names import named_runs, told_apart


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/ev", "b/ev", "x/b/ev", "c", "lr=1", "lr"):
        RunFolder.create(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/ev"], ["ev"]),
        (["a/ev", "c"], ["ev", "c"]),
        (["a/ev", "b/ev", "c"], ["a/ev", "b/ev", "c"]),
        (["x/b/ev", "x/../a/ev"], ["b/ev", "a/ev"]),
        (["a", "x/b/ev"], ["a", "ev"]),
        (["c", "c"], ["c", "c"]),
    ],
)
def test_folders_are_told_apart_by_what_differs_in_their_paths(folders: list[str], names: list[str]):
    assert told_apart([Path(folder) for folder in folders]) == names


def test_a_path_that_ends_another_is_told_apart_too(here: Path):
    inner, outer = told_apart([Path("b/ev"), Path("x/b/ev")])
    assert (inner, outer) == (f"{here.name}/b/ev", "x/b/ev")


def test_a_user_names_runs():
    found = named_runs(["Base model=a/ev", "b/ev", "ours=x/b/ev"])
    assert {name: folder.path for name, folder in found.items()} == {
        "Base model": Path("a/ev"),
        "ev": Path("b/ev"),
        "ours": Path("x/b/ev"),
    }


def test_a_folder_that_is_there_is_no_name():
    assert list(named_runs(["lr=1", "lr=c"])) == ["lr=1", "lr"]
    assert list(named_runs([Path("lr=1")])) == ["lr=1"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["a/ev", "a/ev"], "got ev twice.*NAME=FOLDER"),
        (["ev=b/ev", "a/ev"], "got ev twice"),
        (["x=a/ev", "x=b/ev"], "got x twice"),
        (["=a/ev"], "expected NAME=FOLDER"),
        (["x="], "expected NAME=FOLDER"),
        (["x=nowhere"], "^nowhere: expected the folder of a run"),
        (["runs/lr=2"], "^runs/lr=2: expected the folder of a run"),
    ],
)
def test_runs_that_cannot_be_named_are_refused(runs: list[str], message: str):
    with pytest.raises(RunError, match=message):
        named_runs(runs)
