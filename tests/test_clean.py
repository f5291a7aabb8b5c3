"""`a3tune clean`: only what a finished run does not need goes, and only after a yes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.commands.clean import clean, leftovers
from a3tune.errors import RunError
from a3tune.run.folder import RunFolder

KEPT = ("adapter/adapter_model.safetensors", "best/best.json", "metrics.jsonl", "results.json", "labels/a.parquet")
GONE = ("checkpoints/checkpoint-4/optimizer.pt", ".results.json.tmp", ".best.unfinished/new/adapter_config.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder.create(tmp_path / "run").path
    for name in (*KEPT, *GONE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(2_000_000))
    return folder


def there(run: Path) -> list[str]:
    return [name for name in (*KEPT, *GONE) if (run / name).exists()]


def invoke(*arguments: object, answer: str | None = None) -> str:
    result = CliRunner().invoke(app, ["clean", *map(str, arguments)], input=answer)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_shows_sizes_and_asks(run: Path):
    said = invoke(run, answer="n\n")
    assert said.count("2.0 MB") == 3 and "Nothing was deleted" in said
    assert there(run) == [*KEPT, *GONE]
    assert "6.0 MB deleted" in invoke(run, answer="y\n")
    assert there(run) == [*KEPT]
    assert "nothing to delete" in invoke(run)


def test_yes_needs_no_answer(run: Path):
    invoke(run, "--yes")
    assert there(run) == [*KEPT]


def test_an_unfinished_run_keeps_its_checkpoints(run: Path):
    (run / "adapter").rename(run / "elsewhere")
    with pytest.raises(RunError, match="is not finished"):
        leftovers(run)


def test_a_best_adapter_that_was_moved_away_is_put_back(run: Path):
    """A kill between two renames leaves it where `clean` deletes."""
    (run / ".best.unfinished" / "old").parent.mkdir(exist_ok=True)
    (run / "best").rename(run / ".best.unfinished" / "old")
    clean(run, leftovers(run))
    assert (run / "best" / "best.json").is_file()


def test_a_run_at_work_is_left_alone(run: Path):
    found = leftovers(run)
    with RunFolder(run).lock(), pytest.raises(RunError, match="in use by another run"):
        clean(run, found)
    assert there(run) == [*KEPT, *GONE]


def test_a_link_is_removed_not_followed(run: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    (run / ".elsewhere.tmp").symlink_to(precious)
    clean(run, leftovers(run))
    assert (precious / "thesis.txt").is_file() and not (run / ".elsewhere.tmp").is_symlink()
