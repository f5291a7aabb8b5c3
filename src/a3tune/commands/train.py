"""`a3tune train`: an adapter, with a model card."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from a3tune.bases import pinned
from a3tune.config import RunConfig
from a3tune.data.public import public_data
from a3tune.data.rows import read_split
from a3tune.labels.rank.kinds import SHIPPED
from a3tune.labels.rank.known import warn_of
from a3tune.machine import processes
from a3tune.machine.files import write_atomic
from a3tune.models import base_folder
from a3tune.report.card import CARD, model_card
from a3tune.report.gather import counts, stored_quality
from a3tune.run.folder import RunFolder
from a3tune.training.best import read_best
from a3tune.training.log import in_brief
from a3tune.training.train import train
from a3tune.vlm.load import describe


def fine_tune(
    config: RunConfig,
    progress: Callable[[int, int], None],
    warn: Callable[[str], None] = lambda line: None,
    note: Callable[[str], None] = lambda text: None,
    *,
    synthetic: bool = False,
) -> Path:
    """Train an adapter in `config.output`; weak labels come from the store (`label`). Returns the run folder.

    The adapter gets a model card, as does the best one, unless it has one: `synthetic` says in it that the data are
    phantom scans. `warn` gets a line where the shipped ranker made the labels of images that it does not know, `note`
    the last losses.
    """
    if config.labels.source == "weak" and config.labels.ranker == SHIPPED and not synthetic:
        images = (sample.image for sample in read_split(config.data, "train"))
        if warning := warn_of(config.labels.ranker, images):
            warn(warning)
    if base_folder(config.model.path) is None:
        describe(config.model.path)  # what cannot be had is told before there is a run folder
    folder = RunFolder(train(config, callbacks=[_Steps(progress, note)]))
    cards = {folder.adapter / CARD: ""}
    best = read_best(folder) if processes.index() == 0 else None
    if best:
        cards[folder.best / CARD] = (
            f"The adapter after step {best.step}, kept for its {best.score} on validation rows: {best.value:.4g}. It "
            "was chosen by that number, which therefore flatters it."
        )
    if processes.index() == 0 and not all(card.exists() for card in cards):
        samples = read_split(config.data, "train")
        labels = stored_quality(config, samples) if config.labels.source == "weak" else None
        name = public_data(samples)
        known = replace(config, model=replace(config.model, path=pinned(config.model.path)))
        for card, kept in cards.items():
            if not card.exists():
                text = model_card(known, counts(samples), data=name, labels=labels, synthetic=synthetic, kept=kept)
                write_atomic(card, text.encode())
    return folder.path


class _Steps(TrainerCallback):
    """Tells the optimiser steps done, and the last losses."""

    def __init__(self, progress: Callable[[int, int], None], note: Callable[[str], None]) -> None:
        self.progress, self.note = progress, note
        self._brief: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._brief |= in_brief(kwargs["logs"])
        self.note(" ".join(f"{name} {value}" for name, value in self._brief.items()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)
