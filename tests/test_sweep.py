"""`a3tune sweep`: what it compares, that it never reads the test, that it goes on, and what it says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3tune.cli import main
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows, write_rows
from a3tune.errors import ConfigError
from a3tune.reproduce.variations import BASELINE, check_sweep, settings_of, variations
from a3tune.run.folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_phantom(folder, {"train": 3, "validation": 3, "test": 2})
    for split in ("train", "validation", "test"):
        rows = [row for row in read_rows(folder / f"{split}.jsonl") if row.regions]
        write_rows(folder / f"{split}.jsonl", rows[::4])
    return folder


def given(data: Path) -> list[str]:
    return [f"data.{split}={data / split}.jsonl" for split in ("train", "validation")] + [
        "labels.source=truth",
        "training.max_steps=2",
        "evaluation.max_new_tokens=2",
    ]


def test_all_combinations_beside_the_baseline():
    rows = variations(["alignment.weight=0.1, 0.3,0.1", "labels.top_k=2,4"])
    assert [row.title for row in rows] == [
        BASELINE,
        "alignment.weight=0.1, labels.top_k=2",
        "alignment.weight=0.1, labels.top_k=4",
        "alignment.weight=0.3, labels.top_k=2",
        "alignment.weight=0.3, labels.top_k=4",
    ]


@pytest.mark.parametrize("text", ["alignment.weight", "=1,2", "alignment.weight=", "alignment.weight=1,,2"])
def test_what_is_no_variation(text: str):
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        variations([text])


@pytest.mark.parametrize("text", ["data.train=a,b", "output=a,b", "labels.store=a,b", "evaluation.heads=1,2"])
def test_what_no_sweep_varies(text: str):
    with pytest.raises(ConfigError, match="is not varied"):
        variations([text])


def test_all_rows_are_measured_over_the_same_heads(data: Path):
    rows = variations(["alignment.heads=12.5%,50%"])
    measured = [settings_of(row, None, given(data), 0, data / "out").evaluation for row in rows]
    assert measured == measured[:1] * 3


def test_rows_that_a_training_is_measured_on_stay(data: Path):
    row = variations(["alignment.weight=1,2"])[1]
    plain = settings_of(row, None, given(data), 0, data / "out").data
    watched = settings_of(row, None, [*given(data), "training.eval_steps=1"], 0, data / "out").data
    assert (plain.validation, plain.test) == (None, data / "validation.jsonl")
    assert (watched.validation, watched.test) == (data / "validation.jsonl",) * 2


@pytest.mark.parametrize(
    ("vary", "own", "told"),
    [
        (["labels.top_k=1,2"], [], "labels.source is truth, so no labels are used"),
        (["alignment.heads=1,2"], ["labels.source=none"], "labels.source is none, so nothing is aligned"),
        (["alignment.weight=1,2", "adapter.key_experts=4,8"], ["adapter.kind=lora"], "key_experts: changes nothing"),
        (["training.load_balance=0,1"], ["adapter.kind=lora"], "which has no experts"),
        (["alignment.until=.5,1"], ["alignment.weight=0"], "until: changes nothing, because alignment.weight is 0"),
        (["alignment.until=.5,0.50,1"], [], r"alignment.until=0.50 is the same as alignment.until=.5; leave one out"),
    ],
)
def test_rows_that_would_learn_the_same_are_refused(data: Path, vary: list[str], own: list[str], told: str):
    """They would look like a setting that does not matter."""
    with pytest.raises(ConfigError, match=told):
        check_sweep(variations(vary), None, [*given(data), *own], data / "out", ["answer"])


def test_a_setting_that_counts_in_one_row_is_varied(data: Path):
    check_sweep(variations(["adapter.kind=lora,a3moe", "adapter.key_experts=4,8"]), None, given(data), data / "o", [])


def test_a_copy_of_the_test_rows_is_no_validation(data: Path, tmp_path: Path):
    copy = tmp_path / "validation.jsonl"
    copy.write_bytes((data / "test.jsonl").read_bytes())
    settings = [*given(data), f"data.validation={copy}", f"data.test={data / 'test.jsonl'}"]
    with pytest.raises(ConfigError, match=r"holds the rows of data\.test"):
        check_sweep(variations(["alignment.weight=1,2"]), None, settings, tmp_path / "out", ["answer"])


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["a3tune", "sweep", "--vary", "alignment.weight=0.1,9", "--seed", "0", "--out", str(out)]
        patch.setattr("sys.argv", [*arguments, *given(data)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        yield out


def test_a_table_a_picture_and_a_choice(swept: Path):
    text = (swept / "sweep.md").read_text()
    assert BASELINE in text
    assert re.search(r"alignment.weight=9 \|.*; [+-]\S+ \[", text)
    assert "Best by right answers: " in text
    assert "One seed is not a finding" in text
    assert "<svg" in (swept / "sweep.svg").read_text()
    cells = json.loads((swept / "sweep.json").read_text())["cells"]
    assert [len(row) for row in cells] == [2, 2, 2]
    assert cells[0][0]["change"] is None


def test_it_asks_validation_questions_only(swept: Path, data: Path):
    asked = {row.id for row in read_rows(data / "validation.jsonl")}
    for folder in (swept / "answers").iterdir():
        assert {json.loads(line)["id"] for line in RunFolder(folder).predictions.read_text().splitlines()} == asked


def test_it_goes_on_and_does_nothing_twice(
    swept: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("*") if path.is_file()}
    arguments = ["a3tune", "sweep", "--vary", "alignment.weight=9", "--out", str(swept), "--score", "attention_mass"]
    monkeypatch.setattr("sys.argv", [*arguments, *given(data)])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "2 of 2 runs were done earlier" in shown
    assert "Best by attention mass: " in shown
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("*") if path.is_file()}
