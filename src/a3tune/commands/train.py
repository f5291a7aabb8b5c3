"""`a3tune train`: an adapter, with a model card."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from a3tune.config import RunConfig
from a3tune.data.public import public_data
from a3tune.data.rows import read_split
from a3tune.labels.rank.kinds import SHIPPED
from a3tune.labels.rank.known import warn_of
from a3tune.machine import processes
from a3tune.machine.files import write_atomic
from a3tune.report.card import CARD, model_card
from a3tune.report.gather import counts, stored_quality
from a3tune.run.folder import RunFolder
from a3tune.training.train import train


def fine_tune(
    config: RunConfig,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None] = lambda line: None,
    *,
    synthetic: bool = False,
) -> Path:
    """Train an adapter in `config.output`; weak labels come from the store (`label`). Returns the run folder.

    The adapter gets a model card, unless it has one: `synthetic` says in it that the data are phantom scans. `warn`
    gets a line where the shipped ranker made the labels of images that it does not know.
    """
    if config.labels.source == "weak" and config.labels.ranker == SHIPPED and not synthetic:
        images = (sample.image for sample in read_split(config.data, "train"))
        if warning := warn_of(config.labels.ranker, images):
            warn(warning)
    folder = RunFolder(train(config, callbacks=[_Steps(progress)]))
    card = folder.adapter / CARD
    if processes.index() == 0 and not card.exists():
        samples = read_split(config.data, "train")
        labels = stored_quality(config, samples) if config.labels.source == "weak" else None
        name = public_data(samples)
        text = model_card(config, counts(samples), data=name, labels=labels, synthetic=synthetic)
        write_atomic(card, text.encode())
    return folder.path


class _Steps(TrainerCallback):
    """Tells the optimiser steps done."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)
