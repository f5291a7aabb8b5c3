"""Checkpoints: resumption to the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from a3tune.config import AlignmentConfig
from a3tune.training.checkpoint import last_checkpoint
from a3tune.training.interrupt import StopOnRequest
from trainings import At, make_trainer, samples, weights


@pytest.mark.parametrize("selection", ["running", "fixed"])
def test_a_resumed_run_ends_at_exactly_the_same_weights(tmp_path: Path, selection: Any) -> None:
    settings: dict[str, Any] = {
        "alignment": AlignmentConfig(weight=0.3, until=1.0, heads=3, head_selection=selection),
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
        second.alignment.selector.fix([(0, 0), (0, 1), (0, 2)], (2, 4))  # the checkpoint's heads must win
    second.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "parts")))
    assert second.state.global_step == 5
    expected, found = weights(whole), weights(second)
    assert any(not torch.equal(first_value, expected[name]) for name, first_value in weights(first).items())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name, value in whole.alignment.selector.state_dict().items():
        assert torch.equal(second.alignment.selector.state_dict()[name], value)
