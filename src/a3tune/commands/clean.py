"""`a3tune clean`: what a finished run does not need any more; never adapters, answers, scores, labels or the log."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from a3tune.errors import RunError
from a3tune.machine.files import remove, restore_folder
from a3tune.run.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Leftover:
    path: Path
    nbytes: int


def leftovers(path: Path) -> list[Leftover]:
    """What may go: checkpoints, and what killed processes left half made.

    Raises RunError for what is no run, and for one that is not finished: its checkpoints are all that there is of it.
    """
    folder = RunFolder.open(path)
    if folder.checkpoints.is_dir() and not folder.adapter.is_dir():
        raise RunError(
            f"{path}: is not finished, its checkpoints are all that there is of it; train it to the end (the same "
            "command goes on), or delete the whole folder yourself"
        )
    restore_folder(folder.best)
    half_made = [*path.glob(".*.tmp"), *path.glob(".*.unfinished")]
    found = [one for one in (folder.checkpoints, *sorted(half_made)) if one.exists()]
    return [Leftover(one, _nbytes(one)) for one in found]


def clean(path: Path, found: Sequence[Leftover]) -> None:
    """Delete what `leftovers` found. Raises RunError where another process works in the folder, or it cannot be."""
    with RunFolder.open(path).lock():
        for one in found:
            try:
                remove(one.path)
            except OSError as error:
                raise RunError(f"{one.path}: cannot be deleted: {error.strerror}") from error


def _nbytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())
