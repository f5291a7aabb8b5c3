"""Both losses: their scale, their effect, resumption, interruption, and errors that name the samples."""

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import TrainerCallback, TrainingArguments, set_seed

from a3tune.adapters import add_adapter, load_adapter
from a3tune.attention.capture import use_capture
from a3tune.config import (
    AdapterConfig,
    AlignmentConfig,
    DataConfig,
    LabelsConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from a3tune.data.rows import write_rows
from a3tune.errors import ConfigError, LabelError, ModelError, RunError
from a3tune.labels.truth import truth_labels
from a3tune.masks import encode_mask
from a3tune.training.collate import Collator
from a3tune.training.interrupt import Interrupted, StopOnRequest
from a3tune.training.train import last_checkpoint, train
from a3tune.training.trainer import A3Trainer
from a3tune.types import Region, Sample
from a3tune.vlm.load import Vlm, load_vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PIXELS = 48
SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "image_size": PIXELS}
ADAPTER = {"rank": 4, "expert_rank": 2, "query_experts": 2, "key_experts": 3, "router_hidden": 8}
ANSWERS = ["left", "right upper lobe", "no", "a mass in the liver"]
FIXED = AlignmentConfig(weight=0.5, heads=3, head_selection="fixed")


def square(x: int, y: int) -> np.ndarray:
    mask = np.zeros((PIXELS, PIXELS), bool)
    mask[y : y + 12, x : x + 12] = True
    return mask


def samples(count: int) -> list[Sample]:
    """Images with a bright square; every third sample has no region."""
    made = []
    for index in range(count):
        x, y = (index * 7) % 36, (index * 11) % 36
        image = Image.new("RGB", (PIXELS, PIXELS), (index * 9 % 200, 60, 90))
        ImageDraw.Draw(image).rectangle((x, y, x + 11, y + 11), fill="white")
        file = io.BytesIO()
        image.save(file, "PNG")
        regions = None if index % 3 == 2 else (Region(mask=encode_mask(square(x, y))),)
        made.append(
            Sample(f"s{index}", file.getvalue(), f"Where is mass {index}?", ANSWERS[index % 4], "open", regions)
        )
    return made


def fresh_vlm() -> Vlm:
    model = random_vlm(**SHAPE)
    use_capture(model)
    tokenizer = train_tokenizer([sample.prompt + sample.answer for sample in samples(8)])
    return Vlm(model, tiny_processor(tokenizer, image_size=PIXELS), "tiny")


def make_trainer(
    folder: Path,
    data: list[Sample],
    *,
    alignment: AlignmentConfig = FIXED,
    kind: Any = "a3moe",
    dropout: float = 0.0,
    callbacks: list[TrainerCallback] | None = None,
    load_balance: float = 0.0,
    **changes: Any,
) -> A3Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "save_steps": 100,
        "logging_steps": 1,
    }
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        seed=1,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        **settings | changes,
    )
    vlm = fresh_vlm()
    set_seed(3)
    model = add_adapter(vlm.model, AdapterConfig(kind, dropout=dropout, **ADAPTER), balance=load_balance > 0)
    trainer = A3Trainer(
        model,
        args,
        data,
        Collator(vlm, truth_labels),
        alignment=alignment,
        load_balance=load_balance,
        callbacks=callbacks,
    )
    if trainer.selector is not None and alignment.head_selection == "fixed":
        trainer.selector.fix([(0, 1), (1, 0), (1, 3)], (2, 4))
    return trainer


class Gradients(TrainerCallback):
    """Keeps what reaches the optimiser."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class At(TrainerCallback):
    """Calls something at the end of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.action()


def weights(trainer: A3Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: A3Trainer, name: str) -> list[Any]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize(("batch", "accumulation", "variant"), [(2, 3, "paper"), (4, 2, "code")])
def test_accumulation_gives_the_gradients_of_one_big_batch(
    tmp_path: Path, batch: int, accumulation: int, variant: Any
) -> None:
    """(4, 2) splits six samples into four and two: neither batches nor samples per batch may weigh in."""
    found, lines = [], []
    for size, steps in [(6, 1), (batch, accumulation)]:
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path,
            samples(6),
            alignment=replace(FIXED, variant=variant),
            callbacks=[gradients],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        # Zero matrices (LoRA's B) would leave most gradients zero and hide differences.
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        trainer.train()
        found.append(gradients.found)
        lines.append(trainer.state.log_history[0])
    whole, split = found
    assert whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=1e-4, msg=name)
    for name in ("loss", "loss_llm", "loss_align", "labelled", "attention_inside"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-4), name


def test_the_loss_is_both_losses_and_unlabelled_samples_count_as_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples(6), per_device_train_batch_size=6)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(line["loss_llm"] + 0.5 * line["loss_align"], rel=1e-5)
    assert line["labelled"] == pytest.approx(4 / 6)
    labelled_only = make_trainer(tmp_path, [s for s in samples(6) if s.regions], per_device_train_batch_size=4)
    labelled_only.train()
    assert line["loss_align"] == pytest.approx(logged(labelled_only, "loss_align")[0] * 4 / 6, rel=1e-4)


def test_without_alignment_nothing_is_captured(tmp_path: Path) -> None:
    seen: list[dict] = []
    trainer = make_trainer(tmp_path, samples(2), alignment=AlignmentConfig(weight=0.0), kind="lora")
    forward = trainer.model.forward
    outputs: list[Any] = []

    def recording(**inputs: Any) -> Any:
        seen.append(inputs)
        outputs.append(forward(**inputs))
        return outputs[-1]

    trainer.model.forward = recording
    trainer.train()
    assert outputs[0].past_key_values is None
    assert not {"capture", "routing", "output_attentions", "segments", "image_mask"} & seen[0].keys()
    assert not logged(trainer, "loss_align")
    assert logged(trainer, "loss_llm")


def test_alignment_moves_attention_into_the_labels(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        samples(2),
        alignment=replace(FIXED, weight=20.0),
        max_steps=20,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        load_balance=0.01,
    )
    trainer.train()
    inside = logged(trainer, "attention_inside")
    assert inside[-1] > 1.5 * inside[0]
    line = trainer.state.log_history[-2]
    assert 0 <= line["heads_overlap"] <= 1
    assert sum(line["key_use"]) == pytest.approx(1, abs=1e-4)
    assert 0 < line["query_entropy"] <= np.log(2) + 1e-5


@pytest.mark.parametrize("selection", ["running", "fixed"])
def test_a_resumed_run_ends_at_exactly_the_same_weights(tmp_path: Path, selection: Any) -> None:
    settings: dict[str, Any] = {
        "alignment": AlignmentConfig(weight=0.3, heads=3, head_selection=selection),
        "dropout": 0.1,
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", samples(7), **settings)
    whole.train()
    stop = StopOnRequest()
    first = make_trainer(
        tmp_path / "parts", samples(7), callbacks=[stop, At(3, lambda: setattr(stop, "requested", True))], **settings
    )
    first.train()
    assert first.state.global_step == 3
    second = make_trainer(tmp_path / "parts", samples(7), **settings)
    if selection == "fixed":
        second.selector.fix([(0, 0), (0, 1), (0, 2)], (2, 4))  # the checkpoint's heads must win
    second.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "parts")))
    assert second.state.global_step == 5
    expected, found = weights(whole), weights(second)
    assert any(not torch.equal(first_value, expected[name]) for name, first_value in weights(first).items())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name, value in whole.selector.state_dict().items():
        assert torch.equal(second.selector.state_dict()[name], value)


def test_a_loss_that_is_not_finite_names_the_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples(2))
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(RunError, match=r"step 1: the loss is nan on samples s\d, s\d"):
        trainer.train()


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, samples(2), activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    trainer.model.enable_input_require_grads()
    with pytest.raises(ModelError, match="use_reentrant"):
        trainer.train()


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        gradients = Gradients()
        make_trainer(tmp_path, samples(2), callbacks=[gradients], activation_checkpointing=checkpointing).train()
        found.append(gradients.found)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-7, rtol=1e-5)


def test_bf16_stays_close(tmp_path: Path) -> None:
    lines = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, samples(6), bf16=bf16, per_device_train_batch_size=6)
        trainer.train()
        lines.append(trainer.state.log_history[0])
    for name in ("loss_llm", "loss_align", "attention_inside"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=0.02)


def test_heads_are_calibrated_on_the_training_set(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples(6))
    trainer.selector.load_state_dict({})
    trainer.calibrate_heads()
    score = trainer.selector.state_dict()["score_LH"]
    assert score.shape == (2, 4)
    assert bool(((score > 0) & (score < 1)).all())
    trainer.train()
    assert torch.equal(trainer.selector.state_dict()["score_LH"], score)


def write_base(folder: Path) -> Path:
    """A model folder and train.jsonl beside it."""
    vlm = fresh_vlm()
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    rows = []
    for sample in samples(6):
        (folder / f"{sample.id}.png").write_bytes(sample.image)  # pyright: ignore[reportArgumentType]
        rows.append(replace(sample, image=folder / f"{sample.id}.png"))
    write_rows(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def config_of(base: Path, output: Path, **training: Any) -> RunConfig:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "log_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
    return RunConfig(
        model=ModelConfig(path=str(base / "model"), device="cpu"),
        data=DataConfig(train=base / "train.jsonl"),
        labels=LabelsConfig(source="truth"),
        adapter=AdapterConfig(rank=4, expert_rank=2, query_experts=2, key_experts=3),
        alignment=AlignmentConfig(heads=2),
        training=TrainingConfig(**settings | training),
        output=output,
    )


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
