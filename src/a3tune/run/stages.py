"""Stages that run once: a finished one is recognised by its stamp and skipped. Knows no stage."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from a3tune.errors import RunError
from a3tune.machine.files import remove, write_atomic
from a3tune.machine.hashes import file_hashes, files_in, json_hash, tree_hashes


@dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a stage that was started."""

    key: str
    """Hash of the stage's settings and inputs."""
    seconds: float
    """Spent on it so far, interruptions left out."""
    done: bool
    made: Mapping[str, str] | None = None
    """Of a finished stage its files, by their content; None if an earlier version of a3tune finished it."""


class Stages:
    """The stages in a folder of ours. `stamps` is where their stamps lie."""

    def __init__(self, stamps: Path, say: Callable[[str], None]) -> None:
        self.stamps = stamps
        self.say = say
        self.seconds: dict[str, float] = {}
        """Of every stage that was asked for, also if it was finished earlier."""

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], None],
        *,
        kept: Sequence[Path] | None = None,
    ) -> str:
        """Do `work`, unless it was finished with the same inputs and its outputs are still what it made.

        Work that was interrupted, or of whose outputs a file is missing, finds what is there; what was made of other
        inputs is deleted first.

        Args:
            name: of the stage, a file name.
            inputs: JSON values: all that the outputs depend on, keys of earlier stages among them.
            outputs: files and folders that `work` makes.
            kept: those of them, or in them, that no later stage may change; None is all.

        Returns the stage's key, an input of the stages that build on it.

        Raises:
            RunError: someone else changed what it made, and would lose that.
        """
        key = json_hash({"stage": name, "version": version("a3tune"), **inputs})
        stamp = self._read(name)
        kept = outputs if kept is None else kept
        if stamp is not None and stamp.key == key:
            if stamp.done and all(path.exists() for path in outputs) and self._is_whole(name, stamp):
                self.seconds[name] = stamp.seconds
                if stamp.made is None:
                    self._write(name, replace(stamp, made=self._made(kept)))
                self.say(f"{name}: done earlier ({stamp.seconds:.0f} s)")
                return key
        else:
            stamp = Stamp(key, 0.0, done=False)
            for path in outputs:
                remove(path)
        self._work(name, stamp, work, kept)
        return key

    def finished(self, name: str) -> bool:
        """Whether a stage of this name was ever finished; its inputs may have changed since."""
        stamp = self._read(name)
        return stamp is not None and stamp.done

    def _is_whole(self, name: str, stamp: Stamp) -> bool:
        """Whether all files of a finished stage are there. Raises RunError if one holds something else."""
        made = {self.stamps.parent / file: content for file, content in (stamp.made or {}).items()}
        if not all(path.is_file() for path in made):
            return False
        for path, content in file_hashes(made).items():
            if content != made[path]:
                raise RunError(
                    f"{path}: is not what the stage {name!r} wrote: it was changed since, or is damaged. Delete it to "
                    "have it made anew by the same command; keep a copy of what is yours"
                )
        return True

    def _made(self, kept: Sequence[Path]) -> dict[str, str]:
        files = [file for path in kept if path.exists() for file in files_in(path) if not file.name.startswith(".")]
        return {os.path.relpath(file, self.stamps.parent): content for file, content in file_hashes(files).items()}

    def _work(self, name: str, stamp: Stamp, work: Callable[[], None], kept: Sequence[Path]) -> None:
        self._write(name, Stamp(stamp.key, stamp.seconds, done=False))
        start, made = time.monotonic(), None
        try:
            work()
            made = self._made(kept)
        finally:
            self.seconds[name] = stamp.seconds + time.monotonic() - start
            self._write(name, Stamp(stamp.key, self.seconds[name], made is not None, made))
        self.say(f"{name}: {self.seconds[name]:.0f} s")

    def _read(self, name: str) -> Stamp | None:
        try:
            stamp = Stamp(**json.loads((self.stamps / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        known = isinstance(stamp.key, str) and isinstance(stamp.seconds, int | float) and isinstance(stamp.done, bool)
        return stamp if known else None

    def _write(self, name: str, stamp: Stamp) -> None:
        self.stamps.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(replace(stamp, seconds=round(stamp.seconds, 1))))
        write_atomic(self.stamps / f"{name}.json", text.encode())


def digest(path: Path) -> str:
    """Hash of a file, or of all files in a folder and their names."""
    return json_hash(tree_hashes(path))
