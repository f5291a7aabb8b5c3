"""Checkpoints on the disk: whole before the one before them is deleted, and checked before they are read."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from a3tune.errors import RunError
from a3tune.machine.files import sync_tree

PICKLED = (".pt", ".pth", ".bin")
"""Files of `torch.save`: ZIP archives, whose check sums need no unpickling."""


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
