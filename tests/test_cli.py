import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from a3tune.cli import app
from a3tune.cli.runs import adapter_titles
from a3tune.config import dump_config, load_config
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows, write_rows
from a3tune.decoding import DECODERS
from a3tune.metrics.catalogue import describe
from orientations import UPRIGHT, oriented

COMMANDS = (
    "demo",
    "data",
    "convert",
    "label",
    "train",
    "eval",
    "compare",
    "ask",
    "app",
    "report",
    "reproduce",
    "merge",
)
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `a3tune` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_phantom(tmp_path_factory.mktemp("data"), {"train": 2, "test": 1}, seed=3)


@pytest.fixture(scope="module")
def trained(data, vlm_folder: Path, ranker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after `label`, `train` and `eval`."""
    folder = tmp_path_factory.mktemp("runs")
    settings = folder / "settings.yaml"
    settings.write_text(
        f"model: {{path: {vlm_folder}}}\nlabels: {{ranker: {ranker_folder}, store: {folder / 'labels'}}}\n"
        "adapter: {rank: 2, expert_rank: 2}\nalignment: {heads: 0.5}\ntraining: {max_steps: 1, batch_size: 4}\n"
        "evaluation: {max_new_tokens: 4}\n"
    )
    mine = folder / "mine"
    for arguments in (
        ["label", data["train"], "--out", folder / "labels", "--config", settings],
        ["train", "--config", settings, f"data.train={data['train']}", f"output={mine}"],
        ["eval", data["test"], "--adapter", mine / "adapter", "--out", mine],
        ["eval", data["test"], "--adapter", "none", "--out", folder / "base", "--config", settings],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    return mine


def test_version_and_help(run: Run):
    assert re.fullmatch(r"a3tune \d+\.\d+\.\d+\n", run("--version").output)
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(run: Run, command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: a3tune {command}" in result.output


def test_a_command_of_a_users_own_stands_behind_ours(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
    app.command("mine")(lambda: None)
    shown = run("--help")
    assert shown.exit_code == 0, shown.output
    assert shown.output.index(" reproduce ") < shown.output.index(" mine ")


@pytest.mark.parametrize("below", ["", "below/deeper"])
@pytest.mark.parametrize(
    "command",
    [
        "train data.train=DATA labels.source=none output=OUT",
        "eval DATA --adapter none --out OUT",
        "label DATA --out OUT",
        "sweep data.train=DATA data.validation=TEST labels.source=truth --vary alignment.until=1,null --out OUT",
        "reproduce table1 --out OUT",
        "demo --out OUT",
    ],
)
def test_a_file_in_the_place_of_an_output_folder_is_told_before_anything_is_done(
    run: Run, data: dict[str, Path], tmp_path: Path, command: str, below: str
):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    given = {"DATA": str(data["train"]), "TEST": str(data["test"]), "OUT": str(file / below)}
    result = run(*(re.sub("DATA|TEST|OUT", lambda name: given[name[0]], part) for part in command.split()))
    assert result.exit_code == 2
    assert f"a3tune: {given['OUT']}: expected " in result.output and "is a file; choose another" in result.output
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_typing_errors_are_answered_with_a_suggestion(run: Run):
    result = run("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.output
    result = run("train", "--confg", "x.yaml")
    assert result.exit_code == 2
    assert "--config" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "labels.topk=2"], "a3tune: labels.topk=2: labels.topk: no such setting; did you mean labels.top_k?"),
        (["train", "--config", "none.yaml"], "a3tune: none.yaml: expected a YAML file"),
        (["train"], "a3tune: data.train: expected"),
        (["label", "none.jsonl", "--out", "labels"], "a3tune: none.jsonl: expected a JSONL file"),
        (["report", "nothing"], "a3tune: nothing: expected the folder of a run"),
        (["demo", "patients.train=0"], "a3tune: patients.train=0: patients.train: expected an integer >= 1, got 0"),
        (["demo", "patients.dev=1"], "a3tune: patients.dev=1: expected one of patients.train, patients."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_dry_runs_print_all_settings_and_touch_nothing(run: Run, tmp_path: Path):
    for arguments in (
        ["demo", "training.epochs=1"],
        ["label", "data.jsonl", "--out", "labels", "labels.top_k=3"],
        ["train", "training.epochs=1"],
        ["eval", "data.jsonl", "--adapter", "none", "--out", "runs/x"],
        ["ask", "Where?", "--image", "x.png"],
    ):
        result = run(*arguments, "--dry-run")
        assert result.exit_code == 0, result.output
        assert "top_k:" in result.output
        assert "# Would" in result.output
    assert list(tmp_path.iterdir()) == []


def test_what_a_dry_run_prints_is_a_config_file(run: Run, tmp_path: Path):
    printed = run("train", "labels.query=Organ: {question}", "--dry-run").output
    (tmp_path / "settings.yaml").write_text(printed)
    assert run("train", "--config", "settings.yaml", "--dry-run").output == printed


def test_the_chain_leaves_an_adapter_answers_and_scores(trained: Path, data):
    assert (trained / "adapter" / "adapter_config.json").is_file()
    card = (trained / "adapter" / "README.md").read_text()
    assert "not a medical device" in card and "Not evaluated yet" not in card and ", greedy\n" in card
    assert "Of the true regions of" in card and str(trained) not in card
    asked = len(data["test"].read_text().splitlines())
    assert len((trained / "predictions.jsonl").read_text().splitlines()) == asked
    assert "attention_mass" in json.loads((trained / "results.json").read_text())["metrics"]


def test_a_finished_training_leaves_the_card_as_it_is(run: Run, trained: Path):
    card = trained / "adapter" / "README.md"
    before = card.read_text()
    card.write_text(before + "Mine.\n")
    result = run("train", "--config", str(trained / "config.yaml"))
    assert result.exit_code == 0, result.output
    assert card.read_text() == before + "Mine.\n"
    card.write_text(before)


def test_eval_takes_the_settings_that_the_adapter_was_trained_with(trained: Path):
    assert json.loads((trained / "results.json").read_text())["settings"]["max_new_tokens"] == 4


def test_label_tells_what_it_made_and_lists_what_failed(run: Run, data, ranker_folder: Path, tmp_path: Path):
    rows = data["train"].read_text().splitlines()
    row = json.loads(rows[0])
    row["image"] = str(data["train"].parent / row["image"])
    broken = row | {"id": "broken", "image": "broken.png"}
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(broken) + "\n")
    for made in ("1 of them cut", "0 of them cut"):
        result = run("label", "rows.jsonl", "--out", "labels", f"labels.ranker={ranker_folder}")
        assert result.exit_code == 1
        assert made in result.stdout
        assert re.search(r"failed: .*broken\.png: ", result.stderr)


def test_labels_are_shown_and_exported(run: Run, trained: Path, data, tmp_path: Path):
    store = trained.parent / "labels"
    shown = run("label", "status", store)
    assert shown.exit_code == 0, shown.output
    assert "superpixels" in shown.output
    assert re.search(r"images +[1-9]", shown.output)
    done = run("label", "export", store, data["train"], "--out", "coco.json", "labels.top_k=1")
    assert done.exit_code == 0, done.output
    exported = json.loads((tmp_path / "coco.json").read_text())
    assert len(exported["annotations"]) == len(data["train"].read_text().splitlines())
    assert run("label", "export", store, data["train"], "--out", "coco.json").exit_code == 2
    assert run("label", "export", store, data["train"], "--format", "overlays", "--out", "drawn").exit_code == 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_options_of_label_may_come_before_the_data(run: Run):
    assert "data.jsonl into labels" in run("label", "--out", "labels", "data.jsonl", "--dry-run").output


@pytest.fixture
def rad(tmp_path: Path) -> Path:
    """A VQA-RAD of one image and one question per split."""
    folder = tmp_path / "rad"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(folder / "images" / "synpic1.jpg")
    row = {
        "image_name": "synpic1.jpg",
        "image_organ": "HEAD",
        "question": "On which side is the lesion?",
        "answer": "left",
    }
    row |= {"answer_type": "OPEN", "question_type": "POS", "phrase_type": "freeform"}
    for number, split in enumerate(("train", "test")):
        (folder / f"{split}set.json").write_text(json.dumps([row | {"qid": number}]))
    return folder


def test_a_published_data_set_is_checked_and_prepared(run: Run, rad: Path, tmp_path: Path):
    checked = run("data", "check", rad)
    assert checked.exit_code == 0, checked.output
    assert "1,797" in checked.output
    prepared = run("data", "prepare", rad, "--out", "ready")
    assert prepared.exit_code == 0, prepared.output
    assert "labels.query='Medical image of {organ}. {question}'" in prepared.output
    row = json.loads((tmp_path / "ready" / "train.jsonl").read_text())
    assert (tmp_path / "ready" / row["image"]).samefile(rad / "images" / "synpic1.jpg")
    assert "--force" in run("data", "prepare", rad, "--out", "ready").stderr
    (rad / "images" / "synpic1.jpg").unlink()
    missing = run("data", "check", rad)
    assert missing.exit_code == 1
    assert "images/synpic1.jpg: missing" in missing.output


def test_masks_become_regions_of_questions(run: Run, rad: Path, tmp_path: Path):
    run("data", "prepare", rad, "--out", "ready")
    (tmp_path / "masks.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "synpic1.jpg", "width": 8, "height": 6}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
                "categories": [{"id": 1, "name": "lesion"}],
            }
        )
    )
    result = run("data", "regions", "ready/train.jsonl", "--masks", "masks.json", "--out", "ready/with.jsonl")
    assert "1 of 1 questions have regions" in result.output
    row = json.loads((tmp_path / "ready" / "with.jsonl").read_text())
    assert row["regions"] == [{"box": [1, 2, 4, 6], "name": "lesion"}]


def test_convert_lists_the_layouts_it_knows(run: Run, rad: Path):
    (rad / "config.json").write_text('{"model_type": "bert"}')
    result = run("convert", rad, "--out", "model")
    assert result.exit_code == 2
    assert "llava_med_15" in result.stderr


def test_ask_answers_draws_and_does_not_overwrite(run: Run, trained: Path, data, tmp_path: Path):
    image = next(data["test"].parent.glob("images/test-*.png"))
    ask = ["ask", "Is there a lesion in the liver?", "--adapter", trained / "adapter", "--image", image]
    result = run(*ask, "--out", "heat.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "heat.png") as picture, Image.open(image) as scan:
        assert picture.size == scan.size
    before = (tmp_path / "heat.png").read_bytes()
    refused = run(*ask, "--out", "heat.png")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    (tmp_path / "heat.png").write_bytes(b"old")
    assert run(*ask, "--out", "heat.png", "--force").exit_code == 0
    assert (tmp_path / "heat.png").read_bytes() == before


@pytest.mark.parametrize("orientation", [3, 6])
def test_ask_sees_and_draws_an_image_upright(run: Run, trained: Path, data, tmp_path: Path, orientation: int):
    image = next(data["test"].parent.glob("images/test-*.png"))
    pixels = np.asarray(Image.open(image).convert("RGB"))[:40]
    Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](pixels))).save(tmp_path / "upright.png")
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=oriented(orientation))
    ask = ("ask", "Is there a lesion in the liver?", "--adapter", trained / "adapter")
    answers = {
        name: run(*ask, "--image", f"{name}.png", "--out", f"{name}-heat.png").stdout for name in ("upright", "turned")
    }
    assert answers["upright"] == answers["turned"]
    assert (tmp_path / "upright-heat.png").read_bytes() == (tmp_path / "turned-heat.png").read_bytes()


def test_report_compares_runs_and_takes_one_alone(run: Run, trained: Path, tmp_path: Path):
    result = run("report", trained.parent / "base", trained, "--out", "both.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both.html").read_text()
    assert "base" in page
    assert "mine" in page
    assert str(tmp_path) not in page
    assert run("report", trained, "--out", "one.html").exit_code == 0


def test_report_refuses_a_run_without_answers(run: Run, trained: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a3tune.json").write_text((trained / "a3tune.json").read_text())
    result = run("report", "empty")
    assert result.exit_code == 2
    assert "a3tune eval" in result.stderr


@pytest.fixture
def two(data, tmp_path: Path) -> Path:
    """Two test questions with regions."""
    rows = [line for line in data["test"].read_text().splitlines() if json.loads(line).get("regions")][:2]
    moved = [json.loads(line) for line in rows]
    for row in moved:
        row["image"] = str(data["test"].parent / row["image"])
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(row) for row in moved))
    return tmp_path / "two.jsonl"


def test_a_score_without_an_interval_is_shown_with_a_dash(run: Run, trained: Path, two: Path):
    first = two.with_name("first.jsonl")
    first.write_text(two.read_text().splitlines()[0])
    result = run("eval", first, "--adapter", trained / "adapter", "--out", "one")
    assert result.exit_code == 0 and "nan" not in result.stdout
    assert re.search(r"^attention_mass +0\.\d{3}  - +n = 1$", result.stdout, re.MULTILINE), result.stdout


def test_several_models_and_methods_in_one_call(run: Run, trained: Path, two: Path, tmp_path: Path):
    models = ("--adapter", "none", "--adapter", trained / "adapter")
    result = run("eval", two, *models, "--out", "grid", "--decode", "pai", "--decode", "greedy")
    assert result.exit_code == 0, result.output
    names = [line.split(" | ")[0].removeprefix("| ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert names[2:] == ["base-greedy", "base-pai", "mine-greedy", "mine-pai"]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == sorted(names[2:])
    by = run("compare", "grid/base-greedy", "grid/mine-pai", "--by", "modality", "--out", "table.csv")
    assert by.exit_code == 0, by.output
    modalities = {json.loads(line)["meta"]["modality"] for line in two.read_text().splitlines()}
    assert {line.split(",")[0] for line in (tmp_path / "table.csv").read_text().splitlines()[1:]} == modalities
    assert all(f"### {modality}" in by.stdout for modality in modalities)
    unknown = run("compare", "grid/base-greedy", "grid/mine-pai", "--by", "hospital")
    assert unknown.exit_code == 2
    assert "meta.hospital" in unknown.stderr and "modality" in unknown.stderr


def test_a_grid_of_evaluations_that_cannot_be_is_refused(run: Run, trained: Path, two: Path):
    same = run("eval", two, *["--adapter", trained / "adapter"] * 2, "--out", "grid")
    assert same.exit_code == 2
    assert "different names" in same.stderr
    methods = ("--decode", "vcd", "--decode", "pai")
    settings = run("eval", two, "evaluation.decoding.alpha=2", "--adapter", "none", "--out", "grid", *methods)
    assert settings.exit_code == 2
    assert "one --decode" in settings.stderr


def test_all_decoding_methods_are_compared(run: Run, trained: Path, two: Path, tmp_path: Path):
    result = run("eval", two, "--adapter", trained / "adapter", "--out", "all", "--decode", "all")
    assert result.exit_code == 0, result.output
    names = [line.split(" | ")[0].removeprefix("| ") for line in result.stdout.splitlines() if line.startswith("| ")]
    done = [name for name in DECODERS if (tmp_path / "all" / name).is_dir()]
    assert names[2:] == sorted(done, key=lambda name: name != "greedy")
    assert len(names) == 2 + len(DECODERS) - result.stderr.count("left out: ")
    again = run("compare", "all/greedy", "all/vcd", "--out", "table.tex")
    assert again.exit_code == 0, again.output
    assert "1.00x" in (tmp_path / "table.tex").read_text()
    assert run("compare", "all/greedy", "all/vcd", "--out", "table.doc").exit_code == 2
    assert run("compare", "all/greedy", trained).exit_code == 2


def test_a_method_that_fails_while_answering_stops_no_other(
    run: Run, trained: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from a3tune.decoding.vcd import Vcd
    from a3tune.errors import ModelError

    def fails(*_: object, **__: object) -> None:
        raise ModelError("vcd: its window is full")

    monkeypatch.setattr(Vcd, "__call__", fails)
    methods = [word for name in ("greedy", "vcd", "opera", "m3id") for word in ("--decode", name)]
    model = ("--adapter", trained / "adapter", "evaluation.strategy=multinomial")
    result = run("eval", two, *model, "--out", "some", *methods)
    assert result.exit_code == 2
    names = [line.split(" | ")[0].removeprefix("| ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert names[2:] == ["greedy", "m3id"]
    assert "failed: vcd: vcd: its window is full" in result.stderr
    assert "left out: opera: decode opera: searches with beams" in result.stderr
    assert not (tmp_path / "some" / "opera").exists()  # refused before anything was asked
    nothing = run("eval", two, *model, "--out", "none", "--decode", "opera", "--decode", "vcd")
    assert nothing.exit_code == 2 and nothing.stdout == "" and "failed: vcd" in nothing.stderr


def test_a_model_that_cannot_be_loaded_stops_no_other(run: Run, trained: Path, two: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "broken")
    weights = tmp_path / "broken" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    models = ("--adapter", tmp_path / "broken" / "adapter", "--adapter", trained / "adapter")
    result = run("eval", two, *models, "--out", "grid")
    assert result.exit_code == 2
    assert "failed: broken: " in result.stderr and "| mine |" in result.stdout


def test_an_unknown_decoding_method_is_told_the_known_ones(run: Run, trained: Path, data):
    result = run("eval", data["test"], "--adapter", trained / "adapter", "--out", "x", "--decode", "vcdd")
    assert result.exit_code == 2
    assert "vcd, dola" in result.stderr


def test_ctrl_c_says_how_to_go_on(run: Run, data, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("a3tune.commands.label.label", interrupted)
    result = run("label", data["train"], "--out", "labels")
    assert result.exit_code == 130
    assert "the same command goes on from what is finished" in result.stderr


def test_the_message_of_an_interruption_is_shown(run: Run, data, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped after step 3 of 9")

    monkeypatch.setattr("a3tune.commands.train.fine_tune", interrupted)
    result = run("train", f"data.train={data['train']}", "labels.source=none")
    assert result.exit_code == 130
    assert "a3tune: stopped after step 3 of 9" in result.stderr


def test_a_training_takes_over_what_its_labels_were_made_with(run: Run, data, vlm_folder: Path, tmp_path: Path):
    made = ("labels.visual_prompt=crop", "labels.proposal.min_area=0.01")
    assert run("label", data["train"], "--out", "labels", *made).exit_code == 0
    shared = (f"data.train={data['train']}", "labels.store=labels", f"model.path={vlm_folder}", "training.max_steps=1")
    shared += ("adapter.rank=2", "adapter.expert_rank=2", "training.batch_size=2")
    assert run("train", *shared, "output=mine").exit_code == 0
    settings = load_config(tmp_path / "mine" / "config.yaml").labels
    assert (settings.visual_prompt, settings.proposal) == ("crop", {"min_area": 0.01})
    assert "| labels.visual_prompt | crop |" in (tmp_path / "mine" / "adapter" / "README.md").read_text()
    assert run("train", *shared, "output=mine").exit_code == 0  # finished, with the same settings
    for name in ("mine", "base"):
        adapter = "mine/adapter" if name == "mine" else "none"
        config = ("--config", "mine/config.yaml", "evaluation.max_new_tokens=2")
        assert run("eval", data["test"], "--adapter", adapter, "--out", f"{name}-answers", *config).exit_code == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "labels").rglob("*"))
    assert run("report", "base-answers", "mine-answers").exit_code == 0
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "labels").rglob("*"))
    result = run("train", *shared, "labels.visual_prompt=dim", "output=other")
    assert result.exit_code == 2
    assert "labels.visual_prompt is dim, theirs were made with crop" in result.stderr


def test_attention_is_measured_over_what_was_trained(trained: Path):
    settings = json.loads((trained / "results.json").read_text())["settings"]
    assert (settings["heads"], settings["rows"]) == (0.5, "after_image")
    used = load_config(trained / "evaluation.yaml").evaluation
    assert (used.heads, used.rows) == (0.5, "after_image")


def test_attention_is_measured_over_what_the_user_says(run: Run, trained: Path, data):
    over = ("evaluation.heads=2", "evaluation.rows=answer")
    assert run("eval", data["test"], "--adapter", trained / "adapter", "--out", "other", *over).exit_code == 0
    settings = json.loads(Path("other/results.json").read_text())["settings"]
    assert (settings["heads"], settings["rows"]) == (2, "answer")


def test_runs_that_measured_attention_in_different_ways_say_so(run: Run, trained: Path, data):
    over = ("evaluation.heads=2", "evaluation.rows=answer")
    assert run("eval", data["test"], "--adapter", trained / "adapter", "--out", "other", *over).exit_code == 0
    table = run("compare", trained, "other").stdout
    assert (
        "cannot be compared. mine: the 50 % of all heads that look at the image most, and over all text rows" in table
    )
    assert "other: the 2 heads that look at the image most, and over the rows that choose the answer's tokens" in table
    alike = run("compare", trained, trained.parent / "base").stdout
    assert "Attention is averaged over the 50 % of all heads that look at the image most" in alike
    assert run("report", trained, "other", "--out", "both.html").exit_code == 0
    assert "measured in different ways" in Path("both.html").read_text()
    card = (trained / "adapter" / "README.md").read_text()
    assert "Attention is averaged over" in card


@pytest.mark.parametrize("how", ["link", "here", "checkpoint"])
def test_an_adapter_brings_its_settings_however_it_is_reached(
    run: Run, trained: Path, how: str, tmp_path: Path, monkeypatch
):
    adapter = trained / "adapter"
    if how == "link":
        (tmp_path / "link").symlink_to(adapter)
        adapter = tmp_path / "link"
    elif how == "here":
        monkeypatch.chdir(adapter)
        adapter = Path()
    else:
        adapter = trained / "checkpoints" / "checkpoint-1"
    result = run("ask", "Where?", "--image", "x.png", "--adapter", adapter, "--out", tmp_path / "heat.png", "--dry-run")
    assert "heads: 0.5" in result.output


def test_an_adapter_without_its_run_says_that_defaults_hold(run: Run, trained: Path, tmp_path: Path):
    shutil.copytree(trained / "adapter", tmp_path / "copied" / "adapter")
    result = run("ask", "Where?", "--image", "x.png", "--adapter", tmp_path / "copied" / "adapter", "--dry-run")
    assert "has no config.yaml of its run beside it" in result.stderr


def test_settings_beside_an_adapter_start_no_program(run: Run, trained: Path, tmp_path: Path):
    shutil.copytree(trained / "adapter", tmp_path / "strange" / "adapter")
    settings = load_config(trained / "config.yaml", [f"evaluation.weights.radgraph={tmp_path}"])
    (tmp_path / "strange" / "config.yaml").write_text(dump_config(settings))
    arguments = ("ask", "Where?", "--image", "x.png", "--adapter", tmp_path / "strange" / "adapter", "--dry-run")
    result = run(*arguments)
    assert "evaluation.weights left out" in result.stderr and "radgraph" not in result.stdout
    assert "radgraph" in run(*arguments, f"evaluation.weights.radgraph={tmp_path}").stdout
    mine = run(*arguments, f"evaluation.weights.chexbert={tmp_path}")  # does not bring theirs along
    assert "evaluation.weights left out" in mine.stderr
    assert "chexbert" in mine.stdout and "radgraph" not in mine.stdout


def test_a_base_beside_an_adapter_is_measured_as_the_adapter_is(run: Run, trained: Path, data, vlm_folder: Path):
    models = ("--adapter", "none", "--adapter", trained / "adapter", f"model.path={vlm_folder}")
    result = run("eval", data["test"], *models, "--out", "both", "evaluation.max_new_tokens=2")
    assert result.exit_code == 0, result.output
    assert "Attention is averaged over the 50 % of all heads" in result.stdout


def test_answers_of_different_lengths_are_neither_ranked_nor_tested(run: Run, trained: Path, data):
    longer = ("evaluation.max_new_tokens=6",)
    assert run("eval", data["test"], "--adapter", trained / "adapter", "--out", "longer", *longer).exit_code == 0
    table = run("compare", f"cut={trained}", "longer", "--out", "table.csv").stdout
    assert "(evaluation.max_new_tokens: cut 4, longer 6), so that neither scores nor passes" in table
    assert "**" not in table and "&ast; " not in table.split("Best bold")[0]
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    assert {row["method"] for row in rows} == {"cut", "longer"}
    assert not any(row["p"] or row["difference"] for row in rows)
    assert all("evaluation.max_new_tokens: cut 4, longer 6" in row["unlike"] for row in rows)
    assert run("report", f"cut={trained}", "longer", "--out", "both.html").exit_code == 0
    page = Path("both.html").read_text()
    assert "Not ranked and not tested: " in page and "evaluation.max_new_tokens: cut 4, longer 6" in page
    assert 'class="best"' not in page.split("</table>")[0]


def test_runs_of_one_name_are_told_apart_or_named(run: Run, trained: Path, tmp_path: Path):
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name / "ev")
    table = run("compare", "a/ev", "b/ev").stdout
    assert "| a/ev |" in table and "| b/ev |" in table and "differs from a/ev" in table
    named = run("compare", "First try=a/ev", "b/ev").stdout
    assert "| First try |" in named and "| ev |" in named
    assert run("report", "a/ev", "Second=b/ev", "--out", "page.html").exit_code == 0
    page = Path("page.html").read_text()
    assert "Second against ev" in page
    twice = run("compare", "a/ev", "a/ev")
    assert twice.exit_code == 2 and "NAME=FOLDER" in twice.stderr
    assert adapter_titles([None, Path("a/ev/adapter"), Path("b/ev/adapter")]) == ["base", "a-ev", "b-ev"]


def test_reports_that_name_a_test_are_neither_right_nor_wrong(run: Run, trained: Path, data, tmp_path: Path):
    rows = [json.loads(line) for line in data["test"].read_text().splitlines()[:2]]
    for row in rows:
        row |= {"answer_type": "report", "image": str(data["test"].parent / row["image"])}
        row["meta"]["test"] = "one"
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = ("--adapter", "none", "--adapter", trained / "adapter")
    run("eval", "reports.jsonl", *models, "--out", "grid", "evaluation.max_new_tokens=3")
    assert run("report", *(tmp_path / "grid").iterdir(), "--out", "page.html").exit_code == 0
    page = Path("page.html").read_text()
    assert "nan against" not in page and "Right answers" not in page


def test_tests_of_runs_that_cannot_be_compared_are_not(run: Run, trained: Path, data, tmp_path: Path):
    rows = [json.loads(line) for line in data["test"].read_text().splitlines()[:2]]
    for row in rows:
        row["image"] = str(data["test"].parent / row["image"])
        row["meta"]["test"] = "one"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for tokens in (2, 3):
        run(
            "eval",
            "rows.jsonl",
            "--adapter",
            trained / "adapter",
            "--out",
            tokens,
            f"evaluation.max_new_tokens={tokens}",
        )
    assert run("report", "2", "3", "--out", "page.html").exit_code == 0
    page = Path("page.html").read_text()
    assert "cut at different lengths" in page and "Right answers" not in page


def test_what_was_measured_differently_is_neither_ranked_nor_tested(run: Run, trained: Path, data):
    settings = ("evaluation.tau=0.6", "evaluation.normalisation=sum")
    assert run("eval", data["test"], "--adapter", trained / "adapter", "--out", "tau", *settings).exit_code == 0
    table = run("compare", trained, "tau", "--out", "table.csv").stdout
    assert "measured in different ways" in table and "0.6 as Coverage's threshold" in table
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    attention = [row for row in rows if row["metric"] in ("coverage", "intensity", "attention_mass")]
    assert not any(row["p"] for row in attention)
    assert all("0.6 as Coverage's threshold" in row["unlike"] for row in attention)
    assert not any(row["unlike"] for row in rows if row["metric"].startswith("open"))


def test_what_answers_rest_on_is_measured_compared_and_shown(run: Run, trained: Path, data):
    models = ("--adapter", "none", "--adapter", trained / "adapter", "--config", trained / "config.yaml")
    result = run("eval", data["test"], *models, "--out", "both", "--occlude", "evaluation.fillings=mean")
    assert result.exit_code == 0, result.output
    assert "Reliance inside" in result.stdout and "Deletion gain" in result.stdout
    assert (
        "Reliance: the true regions and 2 % of the longer side around them were hidden, with mean in" in result.stdout
    )
    regions = sum(bool(sample.regions) for sample in read_rows(data["test"]))
    found = json.loads(Path("both/mine/results.json").read_text())
    assert found["counts"]["with_reliance"] == found["metrics"]["reliance_inside"]["count"] == regions > 0
    assert found["metrics"]["accuracy_intact"]["count"] == regions
    card = (trained / "adapter" / "README.md").read_text()
    assert "Reliance: the true regions" in card and "| Reliance inside, % |" in card
    assert run("report", "both/base", "both/mine", "--out", "both.html").exit_code == 0
    page = Path("both.html").read_text()
    assert (
        '<section id="reliance">' in page
        and "of the answers, hiding as much elsewhere" in page
        and "The difference of" in page
    )
    one = ("--adapter", trained / "adapter", "--occlude", "evaluation.fillings=noise")
    assert run("eval", data["test"], *one, "--out", "noise").exit_code == 0
    table = run("compare", "both/mine", "noise", "--out", "table.csv").stdout
    assert "Reliance was measured in different ways" in table and "with noise in their place" in table
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    tested = {row["metric"] for row in rows if row["p"]}
    assert "attention_mass" in tested and not any(describe(name).kind == "reliance" for name in tested)
    assert {"reliance_inside", "reliance_inside_mean", "reliance_inside_noise"} <= {row["metric"] for row in rows}


def test_weak_labels_are_hidden_where_nobody_drew_regions(run: Run, trained: Path, data, ranker_folder: Path):
    rows = [replace(sample, regions=None) for sample in read_rows(data["test"])][:3]
    write_rows(Path("plain.jsonl"), rows)
    one = ("--adapter", trained / "adapter", "--occlude", "evaluation.fillings=mean", "labels.top_k=2")
    result = run("eval", "plain.jsonl", *one, "--out", "weak")
    assert result.exit_code == 0, result.output
    assert re.search(r"reliance_inside +\d", result.stdout)
    said = run("compare", "weak").stdout
    assert "weak labels, since no region is known (the 2 segments most similar to the question" in said
    write_rows(Path("nowhere.jsonl"), [replace(sample, regions=()) for sample in rows])
    result = run("eval", "nowhere.jsonl", *one, "--out", "nowhere")
    assert result.exit_code == 2 and "got an empty list for all 3 questions" in result.stderr
    assert not Path("nowhere").exists()


def test_a_second_setting_of_the_store_does_not_stop_a_run(run: Run, data, vlm_folder: Path, ranker_folder: Path):
    shared = (f"data.train={data['train']}", "labels.store=labels", f"model.path={vlm_folder}", "training.max_steps=1")
    shared += ("adapter.rank=2", "adapter.expert_rank=2", "training.batch_size=2", "output=mine")
    assert run("label", data["train"], "--out", "labels", f"labels.ranker={ranker_folder}").exit_code == 0
    assert run("train", *shared).exit_code == 0
    shutil.rmtree("mine/adapter")
    assert run("label", data["train"], "--out", "labels", "labels.visual_prompt=crop").exit_code == 0
    assert run("train", *shared).exit_code == 0
    assert run("train", *shared).exit_code == 0


def test_labels_do_not_go_into_a_run(run: Run, trained: Path, data):
    result = run("label", data["train"], "--out", trained)
    assert result.exit_code == 2 and "is the folder of a run" in result.stderr


def test_tab_completes_the_names_of_settings(monkeypatch: pytest.MonkeyPatch, run: Run):
    words = "a3tune train training.ev"
    monkeypatch.setenv("_A3TUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", "2")
    said = CliRunner().invoke(app, [], prog_name="a3tune").output
    assert {"training.eval_steps=", "training.eval_samples="} <= set(said.split())


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("training.lr=1", "training.learning_rate"),
        ("adapter.lora_r=8", "adapter.rank"),
        ("training.load_in_4bit=true", "model.quantization"),
    ],
)
def test_names_of_other_programs_are_known(given: str, ours: str, run: Run):
    assert f"did you mean {ours}?" in run("train", given).stderr


def test_all_such_names_lead_to_settings():
    from a3tune.config.reading import ELSEWHERE, keys

    assert set(ELSEWHERE.values()) <= set(keys())
    assert not set(ELSEWHERE) & {key.rpartition(".")[2] for key in keys()}
