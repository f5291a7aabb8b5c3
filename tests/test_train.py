"""Runs: what they leave, refuse, and go on with after an interruption."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a3tune.adapters import load_adapter
from a3tune.config import DataConfig, LabelsConfig
from a3tune.errors import ConfigError, LabelError, RunError
from a3tune.training.interrupt import Interrupted
from a3tune.training.train import train
from a3tune.training.trainer import A3Trainer
from a3tune.vlm.load import load_vlm
from trainings import config_of, metrics, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_a_run_leaves_an_adapter_and_its_story(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path / "run")
    folder = train(config, callbacks=())
    assert {"config.yaml", "environment.json", "metrics.jsonl", "adapter", "checkpoints"} <= {
        p.name for p in folder.iterdir()
    }
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "loss_llm", "loss_align", "labelled", "learning_rate", "key_use"} <= lines[-1].keys()
    adapted = load_adapter(load_vlm(base / "model", device="cpu").model, folder / "adapter")
    assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
    before = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    train(config, callbacks=())
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused(base: Path, tmp_path: Path) -> None:
    train(config_of(base, tmp_path / "run", max_steps=1), callbacks=())
    with pytest.raises(RunError, match=r"other settings: training\.learning_rate"):
        train(config_of(base, tmp_path / "run", max_steps=1, learning_rate=0.5), callbacks=())


def test_a_run_that_could_not_start_does_not_keep_the_folder(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path / "run", max_steps=1)
    with pytest.raises(LabelError):
        train(replace(config, labels=LabelsConfig(source="weak")), callbacks=())
    with pytest.raises(ConfigError, match="heads: expected at most"):  # known at the first step
        train(replace(config, alignment=replace(config.alignment, heads=999)), callbacks=())
    train(config, callbacks=())


def test_ctrl_c_saves_and_the_same_command_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config_of(base, tmp_path / "whole", save_steps=100), callbacks=())
    config = config_of(base, tmp_path / "parts", save_steps=100)
    compute_loss = A3Trainer.compute_loss

    def interrupted(self: A3Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(A3Trainer, "compute_loss", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4; the same command"):
        train(config, callbacks=())
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "parts" / "adapter").exists()
    monkeypatch.undo()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1}\n{"step": 4, "lo')  # as if it had been killed later than its checkpoint
    parts = train(config, callbacks=())
    one, other = (folder / "adapter" / "adapter_model.safetensors" for folder in (whole, parts))
    assert one.read_bytes() == other.read_bytes()
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3, 4]
    assert [line["loss"] for line in metrics(parts)] == [line["loss"] for line in metrics(whole)]


def test_ctrl_c_in_the_last_step_ends_what_comes_after(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, compute_loss = config_of(base, tmp_path / "run", max_steps=1), A3Trainer.compute_loss

    def interrupted(self: A3Trainer, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(A3Trainer, "compute_loss", interrupted)
    with pytest.raises(Interrupted) as told:
        train(config, callbacks=())
    assert told.value.number == signal.SIGTERM
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()  # what was finished is kept
    assert train(config, callbacks=()) == tmp_path / "run"


def test_a_run_killed_before_its_adapter_was_saved_is_finished(base: Path, tmp_path: Path) -> None:
    # At a constant learning rate a step too many would show.
    config = config_of(base, tmp_path / "run", max_steps=2, scheduler="constant_with_warmup")
    folder = train(config, callbacks=())
    expected = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    for file in (folder / "adapter").iterdir():
        file.unlink()
    (folder / "adapter").rmdir()
    broken = folder / "checkpoints" / "checkpoint-9"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    train(config, callbacks=())
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_weak_labels_must_have_been_made(base: Path, tmp_path: Path) -> None:
    config = replace(config_of(base, tmp_path / "run"), labels=LabelsConfig(source="weak"))
    with pytest.raises(LabelError, match="a3tune label"):
        train(config, callbacks=())


def test_without_labels_there_is_no_alignment(base: Path, tmp_path: Path) -> None:
    config = replace(config_of(base, tmp_path / "run", max_steps=1), labels=LabelsConfig(source="none"))
    assert "loss_align" not in metrics(train(config, callbacks=()))[0]


def test_a_run_without_training_data_says_so(base: Path, tmp_path: Path) -> None:
    config = replace(config_of(base, tmp_path / "run"), data=DataConfig())
    with pytest.raises(ConfigError, match=r"data\.train"):
        train(config, callbacks=())
