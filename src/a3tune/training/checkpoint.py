"""Checkpoints: what they hold, whole on the disk before the one before them is deleted, checked before they are read.

Knows files; of the training only what it takes to go on.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from a3tune.errors import RunError
from a3tune.machine.files import sync_tree
from a3tune.training.counting import CountingTrainer
from a3tune.training.step import Alignment

HEADS_FILE = "heads.safetensors"
"""The scores that rank the heads, where they outlive a batch."""
STEP_FILE = "step.json"
"""How many samples an optimiser step takes, whatever the number of processes."""
PICKLED = (".pt", ".pth", ".bin")
"""Files of `torch.save`: ZIP archives, whose check sums need no unpickling."""


class CheckpointingTrainer(CountingTrainer):
    """A Trainer whose checkpoints also hold `HEADS_FILE` and `STEP_FILE`, and are whole."""

    alignment: Alignment | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STEP_FILE).write_text(json.dumps({"samples": self.samples_per_step}))
        if self.alignment is not None and (scores := self.alignment.selector.state_dict()):
            save_file(scores, folder / HEADS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.alignment is not None and checkpoint and (file := Path(checkpoint) / HEADS_FILE).is_file():
            self.alignment.selector.load_state_dict(load_file(file))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.args, self.state.global_step):
            super()._save_checkpoint(model, trial)


@contextmanager
def saving(args: TrainingArguments, step: int) -> Iterator[None]:
    """While this is open the Trainer saves the checkpoint of a step; older ones are deleted after that.

    Deleted by the Trainer itself, they would be gone before the new one is on the disk. Raises OSError where
    `torch.save` says RuntimeError: it means that the disk does not take it.
    """
    kept, args.save_total_limit = args.save_total_limit, None
    folder = Path(str(args.output_dir))
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        args.save_total_limit = kept
    if args.should_save:
        saved = folder / f"checkpoint-{step}"
        sync_tree(saved)
        delete_others(saved)


def delete_others(checkpoint: Path) -> None:
    """Delete all other checkpoints; neither numbers nor times tell a half deleted one from one that is whole."""
    for path in checkpoint.parent.glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; its state file is written last, so one without it was cut short."""
    complete = {step: path for path in folder.glob("checkpoint-*") if (step := state_of(path).get("global_step"))}
    return complete[max(complete)] if complete else None


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state, with `global_step` and `max_steps`; empty where there is no valid one."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return {}


def samples_of_step(checkpoint: Path) -> int:
    """How many samples an optimiser step takes. Raises RunError where `STEP_FILE` does not say it."""
    try:
        return json.loads((checkpoint / STEP_FILE).read_text())["samples"]
    except (OSError, ValueError, TypeError, KeyError):
        raise RunError(f"{checkpoint}: holds no valid {STEP_FILE}; remove this checkpoint") from None


def check_checkpoint(checkpoint: Path) -> None:
    """Raise RunError naming the file of a checkpoint that is damaged."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in PICKLED:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
                if broken:
                    raise zipfile.BadZipFile(f"bad check sum of {broken}")
        except (SafetensorError, zipfile.BadZipFile, OSError) as error:
            raise RunError(
                f"{path}: damaged ({error}); delete the folder {checkpoint}: the same command then goes on from the "
                "checkpoint before it, or from the start"
            ) from None
