"""Attention alignment in TRL's SFTTrainer. TRL is no dependency: `make test-trainers` has an environment for it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from a3tune.adapters import A3MoEConfig
from a3tune.errors import ConfigError
from a3tune.training.mixin import HEADS_FILE, AlignmentMixin
from a3tune.training.step import Alignment
from trainings import fresh_vlm, samples

trl = pytest.importorskip("trl", reason="make test-trainers")
Dataset = pytest.importorskip("datasets").Dataset
EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL: dict[str, Any] = {"r": 4, "expert_rank": 2, "query_experts": 2, "key_experts": 3, "router_hidden": 8}
pytestmark = [
    pytest.mark.filterwarnings("default"),  # what TRL and datasets warn of is theirs
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
]


class Mine(AlignmentMixin, trl.SFTTrainer):
    pass


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def make(folder: Path, *, callbacks: Any = None, **changes: Any) -> Mine:
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_steps": 2}
    fixed: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 1}
    vlm = fresh_vlm()
    align = Alignment(vlm.model, vlm.processor, heads=3, weight=0.5, head_selection="running")
    rows = [
        {"image": s.image, "prompt": s.prompt, "answer": s.answer, "regions": [(i, i, i + 12, i + 12)]}
        for i, s in enumerate(samples(6))
    ]
    torch.manual_seed(3)
    own: dict[str, Any] = {"processing_class": vlm.processor, "peft_config": A3MoEConfig(**SMALL)}
    args = trl.SFTConfig(str(folder), **settings | fixed | changes)
    return Mine(vlm.model, args, align.collate, Dataset.from_list(rows), alignment=align, callbacks=callbacks, **own)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_example_takes_the_step_of_the_plain_loop(tmp_path: Path) -> None:
    path = EXAMPLES / "align_trl_sft.py"
    assert len(path.read_text().splitlines()) <= 40
    found, expected = (
        runpy.run_path(str(EXAMPLES / f"align_{name}.py"))["main"](tmp_path / name, True)
        for name in ("trl_sft", "plain_loop")
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] < found[0]


def test_it_logs_ours_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", gradient_accumulation_steps=2)
    whole.train()
    line = whole.state.log_history[0]
    assert line["loss"] == pytest.approx(line["loss_llm"] + 0.5 * line["loss_align"], rel=1e-4)
    assert {"labelled", "attention_inside", "query_entropy", "heads_selected"} <= line.keys()
    make(tmp_path / "parts", gradient_accumulation_steps=2, callbacks=[StopAt()]).train()
    assert (tmp_path / "parts" / "checkpoint-2" / HEADS_FILE).is_file()
    rest = make(tmp_path / "parts", gradient_accumulation_steps=2)
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)


def test_another_loss_of_trl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loss_type: expected none"):
        make(tmp_path, loss_type="dft")
