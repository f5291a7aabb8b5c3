"""Both losses in the Trainer: their scale, their effect, and what changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from a3tune.compat.generation import CACHE
from a3tune.config import AlignmentConfig
from a3tune.errors import ConfigError, ModelError
from trainings import FIXED, Gradients, logged, make_trainer, samples


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
    assert outputs[0].get(CACHE) is None
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


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, samples(2), activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    trainer.model.enable_input_require_grads()
    with pytest.raises(ModelError, match="use_reentrant"):
        trainer.train()


@pytest.mark.parametrize("kind", ["a3moe", "lora"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activation_checkpointing_changes_no_gradient(tmp_path: Path, bf16: bool, kind: str) -> None:
    """Nor dropout, balance and the casts of mixed precision: the layers are replayed when the forward pass is over."""
    beside = {"dropout": 0.3, "kind": kind, "load_balance": 0.1 if kind == "a3moe" else 0.0, "bf16": bf16}
    found = []
    for checkpointing in (False, True):
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path, samples(2), callbacks=[gradients], activation_checkpointing=checkpointing, **beside
        )
        trainer.train()
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


def test_labels_are_not_smoothed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        make_trainer(tmp_path, samples(2), label_smoothing_factor=0.1)
