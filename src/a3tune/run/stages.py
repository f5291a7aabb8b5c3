"""Stages that run once: a finished one is recognised by its stamp and skipped. Knows no stage."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3tune import __version__
from a3tune.machine.files import write_atomic
from a3tune.machine.hashes import json_hash


@dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a stage that was started."""

    key: str
    """Hash of the stage's settings and inputs."""
    seconds: float
    """Spent on it so far, interruptions left out."""
    done: bool


class Stages:
    """The stages in a folder of ours. `stamps` is where their stamps lie."""

    def __init__(self, stamps: Path, say: Callable[[str], None]) -> None:
        self.stamps = stamps
        self.say = say
        self.seconds: dict[str, float] = {}
        """Of every stage that was asked for, also if it was finished earlier."""

    def run(self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path], work: Callable[[], None]) -> str:
        """Do `work`, unless it was finished with the same inputs and its outputs are still there.

        Work that was interrupted finds what it left behind; what was made of other inputs is deleted first.

        Args:
            name: of the stage, a file name.
            inputs: JSON values: all that the outputs depend on, keys of earlier stages among them.
            outputs: files and folders that `work` makes.

        Returns the stage's key, an input of the stages that build on it.
        """
        key = json_hash({"stage": name, "version": __version__, **inputs})
        stamp = self._read(name)
        if stamp is not None and stamp.key == key:
            if stamp.done and all(path.exists() for path in outputs):
                self.seconds[name] = stamp.seconds
                self.say(f"{name}: done earlier ({stamp.seconds:.0f} s)")
                return key
        else:
            stamp = Stamp(key, 0.0, done=False)
            for path in outputs:
                _remove(path)
        self._work(name, stamp, work)
        return key

    def finished(self, name: str) -> bool:
        """Whether a stage of this name was ever finished; its inputs may have changed since."""
        stamp = self._read(name)
        return stamp is not None and stamp.done

    def _work(self, name: str, stamp: Stamp, work: Callable[[], None]) -> None:
        self._write(name, Stamp(stamp.key, stamp.seconds, done=False))
        start, done = time.monotonic(), False
        try:
            work()
            done = True
        finally:
            self.seconds[name] = stamp.seconds + time.monotonic() - start
            self._write(name, Stamp(stamp.key, self.seconds[name], done))
        self.say(f"{name}: {self.seconds[name]:.0f} s")

    def _read(self, name: str) -> Stamp | None:
        try:
            stamp = Stamp(**json.loads((self.stamps / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        known = isinstance(stamp.key, str) and isinstance(stamp.seconds, int | float) and isinstance(stamp.done, bool)
        return stamp if known else None

    def _write(self, name: str, stamp: Stamp) -> None:
        self.stamps.mkdir(exist_ok=True)
        text = json.dumps({"key": stamp.key, "seconds": round(stamp.seconds, 1), "done": stamp.done})
        write_atomic(self.stamps / f"{name}.json", text.encode())


def digest(path: Path) -> str:
    """Hash of a file, or of all files in a folder and their names."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return json_hash({str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
