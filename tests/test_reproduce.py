import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from a3tune.config import DataConfig, load_config
from a3tune.data.rows import write_rows
from a3tune.decoding import DECODERS
from a3tune.errors import ConfigError, RunError
from a3tune.metrics.stats import Estimate
from a3tune.reproduce import places
from a3tune.reproduce.experiments import Column, choose, experiments
from a3tune.reproduce.grid import plan, run_all
from a3tune.reproduce.places import Places, phantom_places, read_places
from a3tune.reproduce.run import QUICK, reproduce
from a3tune.reproduce.tables import Cell, Table, as_markdown, results_table
from a3tune.types import Sample

SETTINGS = ("training.max_steps=1", "evaluation.max_new_tokens=2")


FEW = {"train": 2, "validation": 1, "test": 1}
"""Patients."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        shipped = places.read_recipe()
        patch.setattr(places, "read_recipe", lambda: replace(shipped, patients=FEW))
        yield tmp_path_factory.mktemp("paper") / "a" / "new folder"


@pytest.fixture(scope="module")
def phantom(out: Path) -> Places:
    return phantom_places(out, SETTINGS, lambda done, total: None, FEW)


def test_every_table_and_figure_is_well_formed():
    found = experiments()
    assert {f"table{number}" for number in range(1, 13)} <= set(found)
    assert {"fig4", "fig5a", "fig5b", "fig6", "fig7a", "fig7b", "fig8", "fig9", "fig10"} <= set(found)
    for experiment in found.values():
        assert {row.decode for row in experiment.rows} <= set(DECODERS)
        for row in experiment.rows:
            assert len(row.paper) in (0, len(experiment.columns)), experiment.name
            if experiment.kind == "results":
                load_config(None, list(row.change))
        swept = [row.x for row in experiment.rows if row.x is not None]
        assert len(swept) == (len(experiment.rows) if experiment.axis else 0), experiment.name
        assert swept == sorted(swept)
    assert [item.name for item in found.values() if item.drawn] == [
        "fig4",
        "fig5a",
        "fig5b",
        "fig7a",
        "fig7b",
        "fig8",
        "fig9",
    ]


def test_published_numbers_are_those_of_the_paper():
    found = experiments()
    a3tune = found["table1"].rows[-1]
    assert a3tune.title == "A3Tune" and a3tune.paper == (82.36, 86.76, 36.97, 70.87, 34.61, 92.19, 85.97, 91.98)
    opera = next(row for row in found["table9"].rows if row.decode == "opera" and row.adapter == "lora")
    assert opera.paper == (3.14, 15.52, 14.70, 84.75, 20.07, 7.74, 35.72)
    assert [row.paper[0] for row in found["table2"].rows] == [12.2, 13.2, 27.5]


def test_names():
    assert [item.name for item in choose(["fig5", "table2"])] == ["fig5a", "fig5b", "table2"]
    assert len(choose(["all"])) == len(experiments())
    with pytest.raises(ConfigError, match="fig11: expected a table or figure"):
        choose(["fig11"])


def test_runs_with_the_same_settings_are_one_run(phantom: Places, out: Path):
    table1 = plan(phantom, out, choose(["table1"]), [0])
    assert len(table1) == 3  # base, LoRA, A3Tune: the phantom stands for all data sets
    assert sorted(len(job.methods) for job in table1) == [1, 11, 11]
    both = plan(phantom, out, choose(["table1", "fig5a", "fig8"]), [0])
    # K = 4 and lambda x 1 are A3Tune itself.
    assert len(both) == 3 + 4 + 4
    assert len(plan(phantom, out, choose(["table1"]), [0, 1])) == 5  # the base has no seed


def test_the_papers_settings_apply_to_real_data(tmp_path: Path):
    file = tmp_path / "places.yaml"
    file.write_text(
        "models: {llava-med: models/llava-med}\ndata: {path-vqa: data/path}\n"
        "settings: [labels.ranker=models/biomedclip]"
    )
    config = read_places(file, tmp_path).config("llava-med", "path-vqa", ["adapter.kind=lora"])
    assert (config.training.epochs, config.alignment.weight, config.adapter.top_experts) == (3, 0.02, 3)
    assert (config.labels.proposer, config.labels.visual_prompt, config.labels.top_k) == ("sam", "crop", 4)
    assert (config.labels.ranker, config.adapter.kind, config.adapter.rank) == ("models/biomedclip", "lora", 64)
    assert config.data.test == Path("data/path/test.jsonl")
    jobs = plan(read_places(file, tmp_path), tmp_path, choose(["table1"]), [0])
    assert {job.run.config.data.test for job in jobs} == {Path("data/path/test.jsonl")}  # the others have no place
    with pytest.raises(ConfigError, match=r"models\.huatuogpt-vision: expected its place"):
        read_places(file, tmp_path).config("huatuogpt-vision", "path-vqa", [])


def test_a_table_is_asked_of_a_model_that_is_there(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "scan.png")
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [Sample("a", tmp_path / "scan.png", "Is it?", "yes", "closed")])
    file = tmp_path / "places.yaml"
    text = f"models: {{llava-med-1.5: tiny}}\ndata: {{path-vqa: {tmp_path}}}\nsettings: [labels.source=none]\n"
    file.write_text(text)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"models.llava-med: expected its place.*--model NAME, of llava-med-1.5"):
        places.check_places(str(file), [], choose(["table1"]))
    for names, model, left in ((["table1", "table6"], None, "table1"), (["table6", "table4"], None, "table4")):
        places.check_places(str(file), [], choose(names, model))
        outcomes = reproduce(names, str(file), tmp_path / "out", [0], 0, said.append, model=model)
        assert [outcome.file.stem for outcome in outcomes] == ["table6"]
        assert f"left out: {left}: models." in " ".join(said)
    (asked,) = choose(["table1"], "llava-med-1.5")
    assert (asked.name, asked.published) == ("table1-llava-med-1.5", "llava-med")
    assert asked.rows == choose(["table1"])[0].rows
    places.check_places(str(file), [], [asked])
    known = read_places(file, tmp_path)
    assert {job.run.config.model.path for job in plan(known, tmp_path, [asked], [0])} == {"tiny"}
    table = results_table(known, tmp_path / "out", asked, [0])
    assert not table.comparable and "Asked of llava-med-1.5" in as_markdown(table)
    assert choose(["table1"], "llava-med") == choose(["table1"])  # its own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping"),
        ("model: {}", "expected a mapping"),
        ("a: [", "expected YAML"),
        ("data: {slak: x}", "expected names of slake"),
    ],
)
def test_places_that_are_none(tmp_path: Path, text: str, message: str):
    (tmp_path / "places.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_places(tmp_path / "places.yaml", tmp_path)


def test_a_table_from_end_to_end_and_again(phantom: Places, out: Path):
    said: list[str] = []
    names = ["table2", "table6", "table7", "table10", "fig6"]
    found = reproduce(names, "phantom", out, [0], 1, said.append, settings=SETTINGS)
    assert [outcome.file.exists() for outcome in found] == [True] * 5
    table = json.loads((out / "table2.json").read_text())
    assert table["rows"] == ["LLaVA-Med", "LLaVA-Med + LoRA", "A3Tune"]
    assert all(0 <= cell["ours"]["mean"] <= 100 for row in table["cells"] for cell in row)
    assert table["cells"][2][0]["paper"] == 27.5 and not table["comparable"]
    assert "chest" in json.loads((out / "table10.json").read_text())["columns"][0]
    assert "<html" in (out / "fig6.html").read_text()
    before = (out / "table2.md").read_text()
    said.clear()
    reproduce(["table2"], "phantom", out, [0], 1, said.append, settings=SETTINGS)
    assert said == ["3 of 3 runs were done earlier"]
    assert (out / "table2.md").read_text() == before


def test_what_is_there_is_written_without_running_anything(phantom: Places, out: Path, monkeypatch: pytest.MonkeyPatch):
    reproduce(["table2"], "phantom", out, [0], 1, lambda line: None, settings=SETTINGS)
    monkeypatch.setattr("a3tune.reproduce.grid.work", lambda job: pytest.fail("ran"))
    said: list[str] = []
    found = reproduce(["fig4", "fig8", "fig9"], "phantom", out, [0], 0, said.append, settings=SETTINGS)
    assert [outcome.picture for outcome in found] == [out / "fig8.svg", out / "fig9.svg"]
    assert "](fig9.svg)" in (out / "fig9.md").read_text() and "<svg" in (out / "fig9.svg").read_text()
    # Of fig8 lambda x 1 is there: it is A3Tune itself.
    cells = json.loads((out / "fig8.json").read_text())["cells"]
    assert [row[0]["ours"] is not None for row in cells] == [False, False, True, False, False]
    assert said[-1] == "left out: fig4: nothing of it was measured" and not (out / "fig4.md").exists()


def test_answers_to_other_rows_are_not_written_as_the_outcome(phantom: Places, out: Path, tmp_path: Path):
    """What is found there is found by the names of its settings; the rows behind them may be others by now."""
    reproduce(["table2"], "phantom", out, [0], 1, lambda line: None, settings=SETTINGS)
    jobs = plan(phantom, out, choose(["table2"]), [0])
    moved = shutil.copytree(out, tmp_path / "paper")
    for split in ("test", "train"):
        path = moved / "data" / "vqa" / f"{split}.jsonl"
        first, *rest = path.read_text().splitlines()
        other = [json.dumps(json.loads(first) | {"answer": "a kidney"}), *rest]
        path.write_text("\n".join(other) + "\n")
        with pytest.raises(RunError, match=rf"{split}.jsonl: is not what the stage 'vqa' wrote"):
            phantom_places(moved, SETTINGS, lambda done, total: None, FEW)
        data = DataConfig(**{name: moved / "data" / "vqa" / f"{name}.jsonl" for name in ("train", "test")})
        own = [replace(job, run=replace(job.run, config=replace(job.run.config, data=data))) for job in jobs]
        with pytest.raises(RunError, match=r"other content: the answer of (sample|row 1)"):
            run_all(own, 0, lambda line: None)
        shutil.copy(out / "data" / "vqa" / f"{split}.jsonl", path)


def test_more_patients_are_drawn_anew(tmp_path: Path):
    for count in (1, 2):
        patients = {"train": 1, "validation": 1, "test": count}
        places = phantom_places(tmp_path, (), lambda done, total: None, patients)
        rows = (places.data["slake"] / "test.jsonl").read_text().splitlines()
        assert len({json.loads(row)["meta"]["patient"] for row in rows}) == count


def test_a_difference_is_shown_only_where_the_data_are_the_same():
    cells = ((Cell(Estimate(81.0, 79.0, 83.0, 9), 82.36), Cell(None, 86.76), Cell(Estimate(5, 5, 5, 1), None)),)
    measured = tuple(Column("slake", "open_recall") for _ in range(3))
    table = Table("table1", "t", "", ("a", "b", "c"), measured, ("A3Tune",), cells, True, {})
    assert "| A3Tune | 81.0 [79.0, 83.0] (paper 82.36, -1.4) | - (86.76) | 5 |" in as_markdown(table)


def test_quick_is_small():
    assert sum(QUICK.values()) < 30
