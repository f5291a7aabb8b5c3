"""Checkpoints: what they hold, whole on the disk before the one before them is deleted, checked before they are read.

The digests of all its files are written last: a checkpoint with them is whole. Knows files; of the training only what
it takes to go on.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from a3tune.errors import RunError, in_short
from a3tune.machine.digests import DIGESTS, check_digests, write_digests
from a3tune.machine.files import sync_tree
from a3tune.models import check_finite
from a3tune.training.mixin import AlignmentMixin

STEP_FILE = "step.json"
"""How many samples an optimiser step takes, whatever the number of processes."""
PICKLED = (".pt", ".pth", ".bin")
"""Files of `torch.save`: ZIP archives, whose check sums need no unpickling."""
_MOST_STEPS = 2**31
"""No training takes more."""
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", STEP_FILE)
"""Of one process, besides its random state; what is shared out among processes has names of its own."""

logger = logging.getLogger(__name__)


class CheckpointingTrainer(AlignmentMixin):
    """A Trainer whose checkpoints also hold `STEP_FILE`, and are whole."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STEP_FILE).write_text(json.dumps({"samples": self.samples_per_step}))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.args, self.state.global_step, self.accelerator.wait_for_everyone):
            super()._save_checkpoint(model, trial)


@contextmanager
def saving(args: TrainingArguments, step: int, wait: Callable[[], None]) -> Iterator[None]:
    """While this is open the Trainer saves the checkpoint of a step; older ones are deleted after that.

    Deleted by the Trainer itself, they would be gone before the new one is on the disk. `wait` returns when all
    processes have written what is theirs. Raises OSError where `torch.save` says RuntimeError: it means that the disk
    does not take it.
    """
    kept, args.save_total_limit = args.save_total_limit, None
    folder = Path(str(args.output_dir))
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        args.save_total_limit = kept
    wait()
    if args.should_save:
        saved = folder / f"checkpoint-{step}"
        sync_tree(saved)
        write_digests(saved)
        delete_others(saved)


def delete_others(checkpoint: Path) -> None:
    """Delete all other checkpoints; neither numbers nor times tell a half deleted one from one that is whole."""
    for path in checkpoint.parent.glob("checkpoint-*"):
        if path != checkpoint:
            shutil.rmtree(path, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what is said of newer ones: they were cut short.

    Those of earlier versions have no digests; their state file was written last.
    """
    steps = {step: path for path in folder.glob("checkpoint-*") if (step := _step_of(path)) is not None}
    whole = {step: path for step, path in steps.items() if (path / DIGESTS).is_file()}
    whole = whole or {step: path for step, path in steps.items() if state_of(path)}
    last = max(whole, default=0)
    for step, path in sorted(steps.items()):
        if step > last:
            logger.warning("%s is not whole, it was cut short: going on from %s", path, whole.get(last, "the start"))
    return whole.get(last)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state, with `global_step` and `max_steps` >= 1; empty where there is no valid one."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        TrainerState(**state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    counts = [state.get(name) for name in ("global_step", "max_steps")]
    history = state.get("log_history")
    valid = all(type(count) is int and 1 <= count <= _MOST_STEPS for count in counts) and isinstance(history, list)
    return state if valid else {}


def samples_of_step(checkpoint: Path) -> int:
    """How many samples an optimiser step takes. Raises RunError where `STEP_FILE` does not say it."""
    try:
        samples = json.loads((checkpoint / STEP_FILE).read_text())["samples"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        samples = None
    if type(samples) is not int or samples < 1:
        raise RunError(f"{checkpoint}: holds no valid {STEP_FILE}; {_instead(checkpoint)}")
    return samples


def check_checkpoint(checkpoint: Path) -> None:
    """Raise RunError naming the file of a checkpoint that is damaged, missing, or of another step."""
    if not check_digests(checkpoint, RunError, _instead(checkpoint)):
        _check_contents(checkpoint)
    step = state_of(checkpoint).get("global_step")
    if step != _step_of(checkpoint):
        raise RunError(f"{checkpoint}: holds the state of step {step}: it has another's name; {_instead(checkpoint)}")


def _check_contents(checkpoint: Path) -> None:
    """What can be told of the files of earlier versions, which have no digests."""
    names = {path.name for path in checkpoint.iterdir()}
    shared_out = any(path.is_dir() or "fsdp" in path.name for path in checkpoint.iterdir())
    missing = [] if shared_out else [name for name in NEEDED if name not in names]
    if missing:
        raise RunError(f"{checkpoint / missing[0]}: missing; {_instead(checkpoint)}")
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                check_finite(load_file(path))
            elif path.suffix in PICKLED:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
                if broken:
                    raise zipfile.BadZipFile(f"bad check sum of {broken}")
        except (SafetensorError, zipfile.BadZipFile, OSError, ValueError) as error:
            raise RunError(f"{path}: damaged ({in_short(error)}); {_instead(checkpoint)}") from None


def _step_of(checkpoint: Path) -> int | None:
    """The step that the name of a checkpoint says."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() and checkpoint.is_dir() else None


def _instead(checkpoint: Path) -> str:
    return (
        f"delete the folder {checkpoint}: the same command then goes on from the checkpoint before it, or from the "
        "start"
    )
