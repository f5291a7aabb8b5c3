"""A loss that is no number."""

from pathlib import Path

import pytest
import torch

from a3tune.errors import RunError
from trainings import make_trainer, samples


def test_a_loss_that_is_not_finite_names_the_samples(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples(2))
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(torch.nan)
    with pytest.raises(RunError, match=r"step 1: the loss is nan on samples s\d, s\d"):
        trainer.train()
