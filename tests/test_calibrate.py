"""Fixed heads, ranked before the training."""

from pathlib import Path

import pytest
import torch

from a3tune.errors import ConfigError
from a3tune.training import calibrate
from trainings import CASES, case_for, learner, make_trainer, samples


def test_heads_are_calibrated_on_the_training_set(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples(6))
    trainer.alignment.selector.load_state_dict({})
    trainer.calibrate_heads()
    score = trainer.alignment.selector.state_dict()["score_LH"]
    assert score.shape == (2, 4)
    assert bool(((score > 0) & (score < 1)).all())
    trainer.train()
    assert torch.equal(trainer.alignment.selector.state_dict()["score_LH"], score)


def test_zero3_cannot_rank_heads_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = learner(tmp_path, case_for(CASES[2], 1))
    monkeypatch.setattr(calibrate, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"head_selection: fixed .* ZeRO-3"):
        trainer.calibrate_heads()
