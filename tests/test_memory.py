"""Too little memory: smaller passes, the same gradients; or an error that says what to do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from a3tune.errors import RunError
from a3tune.training.trainer import A3Trainer
from trainings import BATCH, CASES, History, Learnt, assert_alike, case_for, learner


class Small:
    """A device that has too little memory for more than `most` samples in a pass."""

    def __init__(self, trainer: A3Trainer, most: int, where: str) -> None:
        self.most, self.where = most, where
        self.passes: list[int] = []
        forward, backward = trainer.model.forward, trainer.accelerator.backward

        def forward_in_memory(**inputs: Any) -> Any:
            self.passes.append(len(inputs["input_ids"]))
            if where == "forward":
                self.refuse()
            return forward(**inputs)

        def backward_in_memory(loss: torch.Tensor, **options: Any) -> None:
            backward(loss, **options)  # the worst moment: some gradients are there
            if where == "backward":
                self.refuse()

        trainer.model.forward = forward_in_memory
        trainer.accelerator.backward = backward_in_memory

    def refuse(self) -> None:
        if self.passes[-1] > self.most:
            raise torch.OutOfMemoryError("too little")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_too_little_memory_halves_the_passes_and_changes_nothing_else(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = case_for({"alignment": replace(BATCH, head_selection="fixed"), "max_steps": 2, "global": (4, 2)}, 1)
    found: list[Learnt] = []
    for most in (4, 1):
        history = History()
        trainer = learner(tmp_path / str(most), case, history)
        small = Small(trainer, most, where)
        trainer.train()
        found.append((history.steps, trainer.state.log_history[:-1], {}))
    assert_alike(*found)
    # 10 samples are two steps of (4, 4) and (2); the second pass of 2 samples, and all later ones, are single.
    assert small.passes == [4, 2, *[1] * 8, *[1] * 2]
    assert len(caplog.messages) == 2
    assert "going on with 1" in caplog.messages[-1]


def test_memory_that_never_suffices_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_for(CASES[0], 1)
    trainer = learner(tmp_path, case)
    Small(trainer, 0, "forward")
    with pytest.raises(RunError, match=r"too little memory for one sample \("):
        trainer.train()
    several = learner(tmp_path, case)
    Small(several, 2, "forward")
    monkeypatch.setattr(A3Trainer, "alone", False)
    with pytest.raises(RunError, match=r"training\.batch_size=2 and 2 times the training\.accumulation"):
        several.train()
