"""Small trainings for tests: data, a model, a trainer, a run, and callbacks that look into them."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import TrainerCallback, TrainingArguments, set_seed

from a3tune.adapters import add_adapter
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
from a3tune.labels.truth import truth_labels
from a3tune.masks import encode_mask
from a3tune.training.collate import Collator
from a3tune.training.trainer import A3Trainer
from a3tune.types import Region, Sample
from a3tune.vlm.load import Vlm
from a3tune.vlm.tiny import random_vlm, tiny_processor, train_tokenizer

PIXELS = 48
SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "image_size": PIXELS}
ADAPTER = {"rank": 4, "expert_rank": 2, "query_experts": 2, "key_experts": 3, "router_hidden": 8}
ANSWERS = ["left", "right upper lobe", "no", "a mass in the liver"]
FIXED = AlignmentConfig(weight=0.5, heads=3, head_selection="fixed")
LABELLED = (0, 1, 4)
"""So few that a process often has no label at all."""
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
"""Adam makes much of gradients that are zero but for rounding."""
BATCH = AlignmentConfig(weight=0.5, heads=3, head_selection="batch")
CASES: list[dict[str, Any]] = [
    {"alignment": BATCH, "max_steps": 3, "global": (4, 1)},
    {"alignment": replace(BATCH, head_selection="running", variant="code"), "max_steps": 2, "global": (2, 3)},
    {
        "alignment": replace(BATCH, head_selection="fixed"),
        "max_steps": 1,
        "global": (2, 2),
        "activation_checkpointing": True,
    },
]
"""`global`: samples per pass over all processes, and passes per step. 10 samples leave a short end of each epoch."""


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
    if alignment.head_selection == "fixed":
        trainer.alignment.selector.fix([(0, 1), (1, 0), (1, 3)], (2, 4))
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


class History(Gradients):
    """The gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, **kwargs)
        self.steps.append({name: value.numpy() for name, value in self.found.items()})


def learner(folder: Path, case: Mapping[str, Any], *callbacks: Any) -> A3Trainer:
    few = [replace(s, regions=s.regions if i in LABELLED else None) for i, s in enumerate(samples(10))]
    trainer = make_trainer(folder, few, callbacks=list(callbacks), **SGD | dict(case))
    with torch.no_grad():  # LoRA's zero matrices would leave most gradients zero
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return trainer


Learnt = tuple[list[dict[str, np.ndarray]], list[dict[str, Any]], dict[str, np.ndarray]]


def case_for(case: dict[str, Any], processes: int) -> dict[str, Any]:
    size, accumulation = case["global"]
    rest = {name: value for name, value in case.items() if name != "global"}
    return rest | {"per_device_train_batch_size": size // processes, "gradient_accumulation_steps": accumulation}


def assert_alike(mine: Learnt, other: Learnt) -> None:
    for step, (ours, theirs) in enumerate(zip(mine[0], other[0], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], atol=1e-5, rtol=1e-4, err_msg=f"{step} {name}")
    for ours, theirs in zip(mine[1], other[1], strict=True):
        assert ours["heads_selected"] == theirs["heads_selected"]
        for name in ("loss", "loss_llm", "loss_align", "labelled", "attention_inside", "grad_norm", "epoch"):
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-4), name
    for name, score in mine[2].items():
        np.testing.assert_allclose(score, other[2][name], rtol=1e-5)
