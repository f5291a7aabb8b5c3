"""Validation while a model trains: what it measures, that it changes nothing, and which adapter is kept."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from a3tune.adapters import load_adapter
from a3tune.cli import app
from a3tune.config import AdapterConfig, AlignmentConfig, LabelsConfig, RunConfig, load_config
from a3tune.data.rows import read_rows, write_rows
from a3tune.errors import ConfigError, RunError
from a3tune.evaluation.evaluate import evaluate
from a3tune.machine.digests import check_digests
from a3tune.run.folder import RunFolder
from a3tune.training.best import Best, read_best
from a3tune.training.score import is_better, validation_sample
from a3tune.training.train import train
from a3tune.vlm.load import load_vlm
from trainings import At, config_of, metrics, samples, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("base"))
    rows = []
    for sample in samples(12)[6:]:
        image = folder / f"{sample.id}.png"
        image.write_bytes(sample.image)  # pyright: ignore[reportArgumentType]
        rows.append(replace(sample, image=image))
    write_rows(folder / "validation.jsonl", rows)
    return folder


def watched(base: Path, output: Path, **training: Any) -> RunConfig:
    """A run with all that a validation could disturb: dropout, a running choice of heads, the balance term."""
    settings = {"eval_steps": 1, "eval_samples": 5, "keep_best": "loss_llm", "load_balance": 0.1, "max_steps": 6}
    config = config_of(base, output, **settings | training)
    return replace(
        config,
        data=replace(config.data, validation=base / "validation.jsonl"),
        adapter=replace(config.adapter, dropout=0.2),
        alignment=AlignmentConfig(heads=2, head_selection="running"),
        evaluation=replace(config.evaluation, max_new_tokens=4, batch_size=2, decode="sampling"),
    )


def unwatched(config: RunConfig) -> RunConfig:
    return replace(config, training=replace(config.training, eval_steps=0, keep_best=None, patience=None))


def content(folder: Path) -> dict[str, bytes]:
    """What a run leaves, byte for byte; a run that goes on does not know the heads of the pass before."""
    kept = [*folder.glob("adapter/*"), *folder.glob("best/*")]
    log = re.sub(rb'"heads_overlap": [^,]*, ', b"", (folder / "metrics.jsonl").read_bytes())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept} | {"log": log}


def lines(folder: Path, *, validation: bool) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if ("eval_loss" in line) == validation]


def test_a_validation_leaves_no_trace_in_the_training(base: Path, tmp_path: Path):
    with_it = train(watched(base, tmp_path / "with"), callbacks=())
    without = train(unwatched(watched(base, tmp_path / "without")), callbacks=())
    name = "adapter/adapter_model.safetensors"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()
    assert lines(with_it, validation=False) == metrics(without)
    assert [line["step"] for line in lines(with_it, validation=True)] == [1, 2, 3, 4, 5, 6]


def test_its_scores_are_those_of_an_evaluation(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run", eval_steps=4)
    folder = train(config, callbacks=())
    measured = lines(folder, validation=True)
    assert [line["step"] for line in measured] == [4, 6]  # the last step's, too
    vlm = load_vlm(base / "model", device="cpu")
    vlm = replace(vlm, model=load_adapter(vlm.model, folder / "adapter"))
    found = evaluate(vlm, validation_sample(config), config.active_evaluation).metrics
    for name in ("open_recall", "coverage", "attention_mass"):
        assert measured[-1][f"eval_{name}"] == pytest.approx(found[name].mean, abs=1e-6)
    assert {"eval_loss_align", "eval_labelled", "eval_attention_inside"} <= measured[-1].keys()
    weight = config.alignment.weight
    assert measured[-1]["eval_loss"] == pytest.approx(
        measured[-1]["eval_loss_llm"] + weight * measured[-1]["eval_loss_align"]
    )


def test_its_losses_do_not_depend_on_how_they_are_cut(base: Path, tmp_path: Path):
    """Where heads are fixed, batches of 1 and of 3 samples give the same means."""
    found = []
    for size in (1, 3):
        config = watched(base, tmp_path / str(size), max_steps=1, batch_size=size, accumulation=3 // size)
        config = replace(
            config,
            adapter=AdapterConfig(rank=4, expert_rank=2, query_experts=2, key_experts=3),
            alignment=AlignmentConfig(heads=2, head_selection="fixed"),
            training=replace(config.training, load_balance=0.0),
        )
        found.append(lines(train(config, callbacks=()), validation=True)[0])
    for name in ("eval_loss_llm", "eval_loss_align", "eval_labelled", "eval_attention_inside"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


class KilledError(Exception):
    pass


def killed(config: RunConfig, step: int) -> None:
    """A run that dies in a step, without a word."""

    def die() -> None:
        raise KilledError

    with pytest.raises(KilledError):
        train(config, callbacks=[At(step, die)])


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_killed_run_ends_as_one_that_was_not_disturbed(step: int, base: Path, tmp_path: Path):
    whole = train(watched(base, tmp_path / "whole", learning_rate=0.1), callbacks=())
    config = watched(base, tmp_path / "parts", learning_rate=0.1)
    killed(config, step)
    parts = train(config, callbacks=())
    assert content(parts) == content(whole)
    best = read_best(RunFolder(whole))
    measured = lines(whole, validation=True)
    assert best is not None
    assert best.value == min(line["eval_loss_llm"] for line in measured)
    assert best.value == measured[best.step - 1]["eval_loss_llm"]


def test_the_best_adapter_is_the_one_of_its_step(base: Path, tmp_path: Path):
    settings = {"learning_rate": 0.1, "scheduler": "constant_with_warmup"}
    config = watched(base, tmp_path / "run", max_steps=12, **settings)
    config = replace(config, alignment=replace(config.alignment, weight=1.0, until=None))
    folder = train(config, callbacks=())
    best = read_best(RunFolder(folder))
    assert best is not None and best.step < 12  # such a step size spoils it soon
    assert check_digests(folder / "best", RunError, "")
    vlm = load_vlm(base / "model", device="cpu")
    vlm = replace(vlm, model=load_adapter(vlm.model, folder / "best"))
    found = evaluate(vlm, validation_sample(config), config.active_evaluation).metrics
    measured = lines(folder, validation=True)[best.step - 1]
    assert measured["eval_coverage"] == pytest.approx(found["coverage"].mean, abs=1e-6)
    assert RunFolder.of_adapter(folder / "best") == RunFolder(folder)


@pytest.fixture
def worse_and_worse(base: Path, tmp_path: Path) -> RunConfig:
    settings = {"learning_rate": 0.3, "scheduler": "constant_with_warmup", "max_steps": 12, "patience": 2}
    return watched(base, tmp_path / "run", **settings, save_steps=1)


def test_a_training_that_gets_no_better_ends(worse_and_worse: RunConfig, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        folder = train(worse_and_worse, callbacks=())
    best = read_best(RunFolder(folder))
    assert best is not None
    last = metrics(folder)[-1]["step"]
    assert last == best.step + 2 < 12
    assert f"ended early after step {last} of 12: loss_llm was not better than" in caplog.text
    assert (folder / "adapter").is_dir()


def test_it_ends_there_too_if_it_was_killed_before_its_adapter_was_saved(worse_and_worse: RunConfig):
    folder = train(worse_and_worse, callbacks=())
    expected = content(folder)
    for file in (folder / "adapter").iterdir():
        file.unlink()
    (folder / "adapter").rmdir()
    train(worse_and_worse, callbacks=())
    assert content(folder) == expected


def test_a_best_adapter_that_is_gone_or_damaged_is_told(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run")
    killed(config, 5)
    (tmp_path / "run" / "best").rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"best: missing"):
        train(config, callbacks=())
    (tmp_path / "moved").rename(tmp_path / "run" / "best")
    file = tmp_path / "run" / "best" / "best.json"
    file.write_text(file.read_text().replace('"step": ', '"step": 1'))
    with pytest.raises(RunError, match=r"best\.json: damaged"):
        train(config, callbacks=())


def test_a_swap_that_was_cut_short_is_undone(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run")
    killed(config, 5)
    folder = RunFolder(tmp_path / "run")
    known = read_best(folder)
    work = folder.path / ".best.unfinished"
    work.mkdir()
    folder.best.rename(work / "old")  # between the two renames
    assert read_best(folder) == known != None  # noqa: E711
    train(config, callbacks=())


def test_a_best_adapter_of_other_settings_does_not_stay(base: Path, tmp_path: Path):
    """A run without a checkpoint takes other settings: what it had kept by then is of the old ones."""
    killed(watched(base, tmp_path / "run", save_steps=100), 3)
    assert read_best(RunFolder(tmp_path / "run"))
    folder = train(watched(base, tmp_path / "run", keep_best="coverage", max_steps=1), callbacks=())
    assert read_best(RunFolder(folder)) == Best("coverage", lines(folder, validation=True)[0]["eval_coverage"], 1)


def test_a_run_does_not_go_on_with_other_rows_to_measure(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run")
    killed(config, 5)
    for name, value in {"eval_steps": 2, "eval_samples": 3, "keep_best": "coverage", "patience": 3}.items():
        with pytest.raises(RunError, match=rf"other settings: training\.{name}"):
            train(replace(config, training=replace(config.training, **{name: value})), callbacks=())
    rows = read_rows(base / "validation.jsonl")
    other = tmp_path / "other.jsonl"
    write_rows(other, [replace(row, answer="elsewhere") for row in rows])
    with pytest.raises(RunError, match=r"sample s\w+'? of data\.validation is another|of data\.validation is another"):
        train(replace(config, data=replace(config.data, validation=other)), callbacks=())
    same = tmp_path / "same.jsonl"
    write_rows(same, rows)  # another place, the same rows
    train(replace(config, data=replace(config.data, validation=same)), callbacks=())


def test_a_file_that_is_not_used_is_told(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        folder = train(unwatched(watched(base, tmp_path / "run", max_steps=1)), callbacks=())
    assert "validation.jsonl is not used, because training.eval_steps is 0" in caplog.text
    assert not (folder / "best").exists()


def test_no_labels_no_alignment_loss(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run", max_steps=1)
    folder = train(replace(config, labels=LabelsConfig(source="none")), callbacks=())
    (measured,) = lines(folder, validation=True)
    assert "eval_loss_align" not in measured
    assert measured["eval_loss"] == measured["eval_loss_llm"]
    assert "eval_coverage" in measured  # regions are known, whatever was aligned


def test_it_works_with_recomputed_activations(base: Path, tmp_path: Path):
    folder = train(watched(base, tmp_path / "run", max_steps=2, activation_checkpointing=True), callbacks=())
    assert len(lines(folder, validation=True)) == 2


def test_the_sample_is_always_the_same(base: Path, tmp_path: Path):
    config = watched(base, tmp_path / "run")
    first = [sample.id for sample in validation_sample(config)]
    other = replace(config, training=replace(config.training, seed=7, eval_samples=99))
    assert len(first) == 5 and len(validation_sample(other)) == 6
    again = replace(other, training=replace(other.training, eval_samples=5))
    assert [sample.id for sample in validation_sample(again)] == first


@pytest.mark.parametrize(
    ("score", "told"),
    [
        ("closed_acuracy", "did you mean closed_accuracy"),
        ("reliance_inside", "no score of a validation"),
        ("closed_accuracy", "no question has it"),
        ("bleu", "there is no report"),
        ("zzz", "expected one of loss, loss_llm"),
    ],
)
def test_a_score_that_cannot_be_had_is_told(score: str, told: str, base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=told):
        validation_sample(watched(base, tmp_path / "run", keep_best=score))


def test_settings_that_need_each_other():
    with pytest.raises(ConfigError, match="eval_steps is 0"):
        load_config(None, ["training.keep_best=loss"])
    with pytest.raises(ConfigError, match="keep_best names no score"):
        load_config(None, ["training.patience=2"])


def test_which_way_is_better():
    assert is_better("loss", 1.0, 2.0) and not is_better("loss", 2.0, 1.0)
    assert is_better("closed_accuracy", 0.5, 0.4) and is_better("hallucination", 0.1, 0.2)
    assert not is_better("coverage", 0.5, 0.5)


def test_the_command_says_what_it_kept_and_gives_it_a_card(base: Path, tmp_path: Path):
    rows = [f"data.train={base / 'train.jsonl'}", f"data.validation={base / 'validation.jsonl'}"]
    settings = ["labels.source=truth", "training.max_steps=2", "training.eval_steps=1", "training.keep_best=loss"]
    run = tmp_path / "run"
    said = CliRunner().invoke(app, ["train", *rows, *settings, f"output={run}", "evaluation.max_new_tokens=4"])
    assert said.exit_code == 0, said.output
    assert f"Best: {run / 'best'} (loss " in said.output
    card = (run / "best" / "README.md").read_text()
    assert "kept for its loss on validation rows" in card
    assert "validation rows" not in (run / "adapter" / "README.md").read_text()
    test = str(base / "validation.jsonl")
    answered = ["eval", test, "--adapter", str(run / "best"), "--out", str(tmp_path / "answers")]
    assert CliRunner().invoke(app, [*answered, "evaluation.max_new_tokens=4"]).exit_code == 0
    assert "Not evaluated yet" not in (run / "best" / "README.md").read_text()
    check_digests(run / "best", RunError, "")
    page = ["report", str(tmp_path / "answers"), "--out", str(tmp_path / "page.html")]
    (tmp_path / "answers" / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    assert CliRunner().invoke(app, page).exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "Answer loss L_LLM, validation" in text and "Coverage, validation" in text


def test_weak_labels_of_the_rows_that_are_measured(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = tmp_path / "labels"
    config = watched(base, tmp_path / "run", max_steps=1, keep_best="loss_align")
    config = replace(config, labels=LabelsConfig(source="weak", store=store))

    def label(rows: str) -> None:
        assert CliRunner().invoke(app, ["label", str(base / rows), "--out", str(store)]).exit_code == 0

    label("train.jsonl")
    with pytest.raises(ConfigError, match=r"loss_align cannot be measured: no row of data\.validation has labels in"):
        train(config, callbacks=())
    by_answers = replace(config, training=replace(config.training, keep_best="loss"), output=tmp_path / "without")
    with caplog.at_level(logging.WARNING):
        (without,) = lines(train(by_answers, callbacks=()), validation=True)
    assert "5 of the 5 validation rows that are evaluated have no labels in" in caplog.text
    assert "eval_loss_align" not in without
    label("validation.jsonl")
    (measured,) = lines(train(config, callbacks=()), validation=True)
    assert measured["eval_labelled"] == 1 and measured["eval_loss_align"] > 0


def test_nothing_to_align_to_is_told(base: Path, tmp_path: Path):
    rows = [replace(row, regions=None) for row in read_rows(base / "validation.jsonl")]
    write_rows(tmp_path / "plain.jsonl", rows)
    config = watched(base, tmp_path / "run", keep_best="loss_align")
    with pytest.raises(ConfigError, match="nothing is aligned"):
        validation_sample(replace(config, data=replace(config.data, validation=tmp_path / "plain.jsonl")))
