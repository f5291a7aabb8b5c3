"""The adapters that a training leaves: the one of the last step, and the best one by a score of the validation.

The best one says itself at which step it was made and how good it is, so that a run that was killed knows it again.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainerCallback

from a3tune.bases import pinned
from a3tune.errors import RunError
from a3tune.machine import processes
from a3tune.machine.digests import check_digests, sealed, write_digests
from a3tune.machine.files import new_folder, replacing_folder, restore_folder, sync_folder, sync_tree
from a3tune.machine.hub import named
from a3tune.run.folder import RunFolder, read_json
from a3tune.training.score import VALIDATION, is_better

BEST = "best.json"
"""File of the best adapter's folder: what `Best` holds."""


@dataclass(frozen=True, slots=True)
class Best:
    """How good the best adapter is."""

    score: str
    """Name of the score (`training.keep_best`)."""
    value: float
    step: int
    """After which it was measured."""


_BEST = TypeAdapter(Best)


def read_best(folder: RunFolder) -> Best | None:
    """What is known of the best adapter of a run; None if it has none. Raises RunError if it is damaged."""
    restore_folder(folder.best)
    if not folder.best.is_dir():
        return None
    again = f"delete {folder.best} and {folder.checkpoints}: the same command then starts anew"
    check_digests(folder.best, RunError, again, [BEST])
    try:
        return _BEST.validate_python(read_json(folder.best / BEST, again))
    except ValueError:
        raise RunError(f"{folder.best / BEST}: cannot be read, it is damaged; {again}") from None


class BestAdapter(TrainerCallback):
    """Keeps the adapter whenever an evaluation beats all before it, and ends a training that gets no better.

    Args:
        folder: of the run.
        score: by which adapters are compared.
        steps: optimiser steps between evaluations.
        patience: evaluations without a better one after which the training ends; None: never.
        base: name of the base model.
    """

    def __init__(self, folder: RunFolder, score: str, steps: int, patience: int | None, base: str) -> None:
        self.folder, self.score, self.steps, self.patience, self.base = folder, score, steps, patience, base
        self.best = processes.from_first(read_best(folder) if processes.index() == 0 else None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.best is None and any(VALIDATION + self.score in line for line in state.log_history):
            raise RunError(
                f"{self.folder.best}: missing, and the run has evaluated before; put it back, or delete "
                f"{self.folder.checkpoints}: the same command then starts anew"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        value = kwargs["metrics"].get(self.score, math.nan)  # nobody said yes or no, so there is no accuracy
        # A run that goes on comes again to what it has measured: its best is neither better nor worse than itself.
        if math.isfinite(value) and (self.best is None or is_better(self.score, value, self.best.value)):
            self.best = Best(self.score, value, state.global_step)
            if state.is_world_process_zero:
                with replacing_folder(self.folder.best, lambda: None) as new:
                    _write(kwargs["model"], None, self.base, new, asdict(self.best))
        if self.gave_up(state.global_step):
            control.should_training_stop = True
        return control

    def gave_up(self, step: int) -> bool:
        """Whether the training ends after this step, with the best one so far."""
        since = self.best.step if self.best else 0
        return self.patience is not None and step // self.steps - since // self.steps >= self.patience

    def reason(self, step: int, last: int) -> str:
        """Why it ends."""
        known = f"better than {self.best.value:.4g} (step {self.best.step})" if self.best else "measured at all"
        return f"ended early after step {step} of {last}: {self.score} was not {known} in {self.patience} evaluations"


def save_adapter(model: Any, state: dict[str, Any] | None, base: str, folder: RunFolder) -> None:
    """Save the last adapter, under another name first: a folder called `adapter` is always whole."""
    unfinished = new_folder(folder.adapter.with_name(".adapter.tmp"))
    _write(model, state, base, unfinished)
    sync_tree(unfinished)
    unfinished.rename(folder.adapter)
    sync_folder(folder.path)


def _write(
    model: Any, state: dict[str, Any] | None, base: str, place: Path, best: Mapping[str, Any] | None = None
) -> None:
    with _named(model, base):
        model.save_pretrained(str(place), state_dict=state, save_embedding_layers=False)
    # PEFT's empty form of a model card; ours is written from the settings and the data (`report.card`).
    (place / "README.md").unlink(missing_ok=True)
    if best is not None:
        (place / BEST).write_text(json.dumps(sealed(best)) + "\n")
    write_digests(place)


@contextmanager
def _named(model: Any, base: str) -> Iterator[None]:
    """While this is open the adapter says its base by the user's name, and of one of the Hub the commit.

    Not longer: checkpoints are saved with PEFT's default, which looks for files of that name on the Hub.
    """
    configs = list(model.peft_config.values())
    before = [(config.base_model_name_or_path, config.revision) for config in configs]
    repository = named(pinned(base), "model")
    for config in configs:
        config.base_model_name_or_path = repository.name if repository else base
        config.revision = repository.revision if repository else None
    try:
        yield
    finally:
        for config, names in zip(configs, before, strict=True):
            config.base_model_name_or_path, config.revision = names
