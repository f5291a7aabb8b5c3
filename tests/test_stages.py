import json
from pathlib import Path

import pytest

from a3tune.errors import RunError
from a3tune.run.stages import Stages, digest


class Work:
    """Writes its output and counts its runs; fails while `broken`."""

    def __init__(self, output: Path) -> None:
        self.output, self.runs, self.broken = output, 0, False
        self.found: list[bool] = []

    def __call__(self) -> None:
        self.runs += 1
        self.found.append(self.output.exists())
        self.output.mkdir(exist_ok=True)
        if self.broken:
            raise KeyboardInterrupt
        (self.output / "file").write_text("made")


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "output")


def run(tmp_path: Path, work: Work, inputs: dict, name: str = "stage") -> tuple[Stages, list[str]]:
    said: list[str] = []
    stages = Stages(tmp_path / "stamps", said.append)
    stages.run(name, inputs, [work.output], work)
    return stages, said


def test_a_finished_stage_is_not_run_again_and_keeps_its_time(tmp_path, work):
    first, _ = run(tmp_path, work, {"a": 1})
    again, said = run(tmp_path, work, {"a": 1})
    assert work.runs == 1
    assert again.seconds == {"stage": pytest.approx(first.seconds["stage"], abs=0.06)}
    assert said == ["stage: done earlier (0 s)"]
    assert again.finished("stage")


def test_other_inputs_delete_what_was_made_and_run_again(tmp_path, work):
    run(tmp_path, work, {"a": 1})
    run(tmp_path, work, {"a": 2})
    assert work.found == [False, False]


def test_a_missing_output_is_made_again(tmp_path, work):
    run(tmp_path, work, {"a": 1})
    (work.output / "file").unlink()
    work.output.rmdir()
    run(tmp_path, work, {"a": 1})
    assert work.runs == 2


def test_an_output_that_someone_changed_is_not_taken_for_the_stages_own(tmp_path, work):
    run(tmp_path, work, {"a": 1})
    stamp = json.loads((tmp_path / "stamps" / "stage.json").read_text())
    assert list(stamp["made"]) == ["output/file"]
    (work.output / "file").write_text("mine")  # as long as what was there
    with pytest.raises(RunError, match="file: is not what the stage 'stage' wrote"):
        run(tmp_path, work, {"a": 1})
    assert (work.output / "file").read_text() == "mine"
    (work.output / "file").unlink()
    run(tmp_path, work, {"a": 1})
    assert work.runs == 2
    assert (work.output / "file").read_text() == "made"
    (work.output / "notes").write_text("beside it")
    run(tmp_path, work, {"a": 1})
    assert work.runs == 2


def test_what_later_stages_may_change_does_not_count(tmp_path, work):
    for _ in range(2):
        Stages(tmp_path / "stamps", print).run("stage", {}, [work.output], work, kept=[work.output / "none"])
        (work.output / "file").write_text("by a later stage")
    assert work.runs == 1


def test_a_stage_that_an_earlier_version_finished_is_taken_as_it_is(tmp_path, work):
    run(tmp_path, work, {"a": 1})
    path = tmp_path / "stamps" / "stage.json"
    stamp = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in stamp.items() if name != "made"}))
    run(tmp_path, work, {"a": 1})
    assert work.runs == 1
    assert json.loads(path.read_text()) == stamp


def test_an_interrupted_stage_goes_on_from_what_it_left(tmp_path, work):
    work.broken = True
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, work, {"a": 1})
    work.broken = False
    stages, _ = run(tmp_path, work, {"a": 1})
    assert work.found == [False, True]
    assert stages.finished("stage")


def test_a_damaged_stamp_runs_the_stage_anew(tmp_path, work):
    run(tmp_path, work, {"a": 1})
    (tmp_path / "stamps" / "stage.json").write_text("{")
    run(tmp_path, work, {"a": 1})
    assert work.found == [False, False]


def test_keys_tell_stages_and_inputs_apart(tmp_path, work):
    stages = Stages(tmp_path / "stamps", lambda _: None)
    keys = [stages.run(name, {"a": a}, [], work) for name in ("one", "two") for a in (1, 2)]
    assert len(set(keys)) == 4
    assert stages.run("one", {"a": 1}, [], work) == keys[0]


def test_digest_sees_contents_and_names(tmp_path):
    (tmp_path / "a").write_text("1")
    before = digest(tmp_path), digest(tmp_path / "a")
    (tmp_path / "a").write_text("2")
    assert digest(tmp_path) != before[0]
    assert digest(tmp_path / "a") != before[1]
    (tmp_path / "a").write_text("1")
    assert digest(tmp_path) == before[0]
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path) != before[0]
