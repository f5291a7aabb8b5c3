"""Same names, other content: what goes on, and what is refused, when inputs change between stop and going on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from a3tune.commands.evaluate import evaluate_run
from a3tune.commands.label import label
from a3tune.config import DataConfig, EvaluationConfig, LabelsConfig, ModelConfig, RunConfig, dump_config
from a3tune.data.rows import read_rows
from a3tune.errors import RunError
from a3tune.evaluation.identity import read, record, refuse_unlike_rows, rows_of
from a3tune.evaluation.predictions import read_maps
from a3tune.report.gather import read_run
from a3tune.report.write import Page, compare, write_report
from a3tune.run.folder import RunFolder
from a3tune.training.train import train
from changes import CHANGES, Change, Inputs
from trainings import At, config_of, write_base

TRAINING = [name for name, change in CHANGES.items() if change.command == "train"]
EVALUATION = [name for name, change in CHANGES.items() if change.command == "eval"]


class StoppedError(Exception):
    pass


def stop() -> None:
    raise StoppedError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ranker_folder: Path) -> Path:
    """Data, a model, a label store; trainings stopped after their first step and whole ones; an evaluation."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    write_base(folder / "data")
    (folder / "data" / "model").rename(folder / "model")
    inputs = inputs_of(folder)
    label(settings(inputs, folder / "none", "weak", ranker_folder), lambda done, total: None)
    for source in ("truth", "weak"):
        whole = settings(inputs, folder / f"{source} whole", source, ranker_folder)
        train(whole, callbacks=())
        with pytest.raises(StoppedError):
            train(replace(whole, output=folder / f"{source} stopped"), callbacks=[At(3, stop)])
    evaluate_run(evaluation(inputs, folder / "answers"), inputs.adapter, lambda done, total: None)
    return folder


def inputs_of(folder: Path) -> Inputs:
    adapter = folder / "truth whole" / "adapter"
    return Inputs(folder / "data" / "train.jsonl", folder / "model", adapter, folder / "store")


def settings(inputs: Inputs, output: Path, source: Any, ranker: Path) -> RunConfig:
    config = config_of(inputs.rows.parent, output, max_steps=3, save_steps=1)
    labels = LabelsConfig(source=source, ranker=str(ranker), store=inputs.store)
    return replace(
        config,
        model=ModelConfig(path=str(inputs.model), device="cpu"),
        data=DataConfig(train=inputs.rows),
        labels=labels,
    )


def evaluation(inputs: Inputs, output: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(inputs.model), device="cpu"),
        data=DataConfig(test=inputs.rows),
        evaluation=EvaluationConfig(max_new_tokens=3, batch_size=2, heads=2),
        output=output,
    )


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    return shutil.copytree(world, tmp_path / "world")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def apply(change: Change, folder: Path) -> Inputs:
    return change.apply(inputs_of(folder)) or inputs_of(folder)


def weights_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_goes_on_only_with_what_it_was_started_with(copied: Path, ranker_folder: Path, name: str) -> None:
    change = CHANGES[name]
    source = change.source or "truth"
    inputs = apply(change, copied)
    for run in ("stopped", "whole"):
        output = copied / f"{source} {run}"
        config = settings(inputs, output, source, ranker_folder)
        before = content(output)
        if change.outcome == "refused":
            with pytest.raises(RunError, match=change.says) as refusal:
                train(config, callbacks=())
            assert "choose another output" in str(refusal.value)
            assert content(output) == before
        else:
            train(config, callbacks=())
            assert weights_of(output) == weights_of(copied / f"{source} whole")


@pytest.mark.parametrize("name", EVALUATION)
def test_an_evaluation_is_repeated_only_on_what_it_was_made_on(copied: Path, name: str) -> None:
    change = CHANGES[name]
    inputs = apply(change, copied)
    config, before = evaluation(inputs, copied / "answers"), content(copied / "answers")
    if change.outcome == "refused":
        with pytest.raises(RunError, match=change.says) as refusal:
            evaluate_run(config, inputs.adapter, lambda done, total: None)
        assert "choose another output" in str(refusal.value)
        assert content(copied / "answers") == before
    else:
        evaluate_run(config, inputs.adapter, lambda done, total: None)
        assert content(copied / "answers")["predictions.jsonl"] == before["predictions.jsonl"]


def test_an_adapter_on_a_base_that_changed_is_told(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = inputs_of(copied)
    for name, told in (("everything moved", False), ("one value of the base", True)):
        caplog.clear()
        moved = apply(CHANGES[f"eval: {name}"], copied)
        evaluate_run(evaluation(moved, copied / name), inputs.adapter, lambda done, total: None)
        assert ("trained on another base: of the base model model.safetensors is another" in caplog.text) == told


def test_maps_of_answers_that_are_gone_are_not_taken_for_those_of_new_ones(copied: Path) -> None:
    folder, inputs = RunFolder(copied / "answers"), inputs_of(copied)
    expected = read_maps(folder)
    stale = {f"sample {name}": np.zeros_like(values) for name, values in expected.items()}
    save_file(stale, folder.maps / "9999999.safetensors")
    folder.predictions.unlink()
    evaluate_run(evaluation(inputs, folder.path), inputs.adapter, lambda done, total: None)
    found = read_maps(folder)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("name", ["answer", "question", "true region", "image"])
def test_reports_are_about_the_rows_that_were_evaluated(copied: Path, tmp_path: Path, name: str) -> None:
    second = shutil.copytree(copied / "answers", copied / "second")
    for run in (copied / "answers", second):
        settings = RunFolder(run).evaluation
        config = evaluation(inputs_of(copied), run)
        settings.write_text(dump_config(config))
    compare([copied / "answers", second], [".md"])
    change = CHANGES[f"eval: {'an' if name[0] in 'ai' else 'a'} {name}"]
    apply(change, copied)
    if name != "image":  # a table shows none
        with pytest.raises(RunError, match=change.says):
            compare([copied / "answers", second], [".md"])
    with pytest.raises(RunError, match=change.says):
        write_report([copied / "answers", second], tmp_path / "page.html", Page("t", "c"))
    assert not (tmp_path / "page.html").exists()


def test_answers_to_other_questions_are_not_compared_though_their_identity_is_gone(copied: Path) -> None:
    folder, rows = RunFolder(copied / "answers"), read_rows(inputs_of(copied).rows)
    folder.identity.unlink()
    read_run("answers", "Answers", folder, rows)
    for part, now in (("prompt", "And now?"), ("answer", "a lung"), ("answer_type", "report")):
        other = [replace(rows[0], **{part: now}), *rows[1:]]
        with pytest.raises(RunError, match=rf"answers: the {part} of sample .* it was .*, and is '{re.escape(now)}'"):
            read_run("answers", "Answers", folder, other)


def test_answers_about_other_images_of_one_name_are_not_compared(copied: Path) -> None:
    second = RunFolder(shutil.copytree(copied / "answers", copied / "second"))
    refuse_unlike_rows([RunFolder(copied / "answers"), second])
    apply(CHANGES["eval: an image"], copied)
    record(second, replace(read(second), rows=rows_of(read_rows(inputs_of(copied).rows))))
    with pytest.raises(RunError, match=r"second: the image of sample .* was another than in .*answers"):
        refuse_unlike_rows([RunFolder(copied / "answers"), second])
    second.identity.unlink()
    refuse_unlike_rows([RunFolder(copied / "answers"), second])


def test_a_training_of_an_earlier_version_goes_on_and_says_what_it_does_not_know(
    copied: Path, ranker_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(copied / "truth stopped")
    recorded = folder.training_identity.read_bytes()
    folder.training_identity.unlink()
    config = settings(inputs_of(copied), folder.path, "truth", ranker_folder)
    with pytest.raises(RunError, match=r"other settings: (model\.path|data\.train)"):
        train(config, callbacks=())  # nobody knows whether what lies elsewhere is the same
    text = folder.config.read_text().replace(str(folder.read_config().data.train), str(config.data.train))
    text = text.replace(folder.read_config().model.path, config.model.path)
    folder.config.write_text(text.replace(str(folder.read_config().labels.store), str(config.labels.store)))
    train(config, callbacks=())
    assert "does not say which rows, labels and base it was started with" in caplog.text
    assert weights_of(folder.path) == weights_of(copied / "truth whole")
    assert folder.training_identity.read_bytes() == recorded


def test_a_training_without_its_settings_is_refused(copied: Path, ranker_folder: Path) -> None:
    for run in ("stopped", "whole"):
        folder = RunFolder(copied / f"truth {run}")
        config = settings(inputs_of(copied), folder.path, "truth", ranker_folder)
        folder.config.unlink()
        before = content(folder.path)
        with pytest.raises(RunError, match=r"without its config\.yaml.*choose another output"):
            train(replace(config, training=replace(config.training, seed=9)), callbacks=())
        assert content(folder.path) == before


def test_answers_of_an_earlier_version_are_refused(copied: Path) -> None:
    folder = RunFolder(copied / "answers")
    earlier = json.loads(folder.identity.read_text())
    folder.write_json(folder.identity.name, earlier["settings"] | {"model": "x", "weights": "0" * 64})
    with pytest.raises(RunError, match="an earlier version of a3tune"):
        evaluate_run(evaluation(inputs_of(copied), folder.path), inputs_of(copied).adapter, lambda done, total: None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 1, "base": {}}'])
@pytest.mark.parametrize("place", ["truth stopped/training_identity.json", "answers/identity.json"])
def test_a_damaged_identity_is_told(copied: Path, ranker_folder: Path, place: str, text: str) -> None:
    (copied / place).write_text(text)
    inputs = inputs_of(copied)
    with pytest.raises(RunError, match=r"identity\.json|an earlier version"):
        if place.startswith("answers"):
            evaluate_run(evaluation(inputs, copied / "answers"), inputs.adapter, lambda done, total: None)
        else:
            train(settings(inputs, copied / "truth stopped", "truth", ranker_folder), callbacks=())
