"""The run folder: one folder tells the whole story of a run.

Knows which files a run holds and whether a folder is ours; not what the files say.
"""

import json
import os
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from a3tune.config import RunConfig, dump_config, load_config, load_given
from a3tune.errors import RunError, in_short
from a3tune.machine.digests import sealed, unsealed
from a3tune.machine.files import check_place, locked, unfinished, write_atomic

MARKER = "a3tune.json"
SCHEMA = 1
PACKAGES = ("a3tune", "torch", "transformers", "peft", "accelerate", "numpy")
_EARLIER = {"alignment.until": None}
"""What settings were before they were settings: a run that does not say them is of that time."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that belongs to one run. Make one with `create` or `open`."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new run folder, or the one of an earlier run at `path`.

        Raises RunError when the folder holds something else, or cannot be written. Nothing in it is ever deleted.
        """
        folder = cls(path)
        if cls.check(path):
            return folder
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: the output folder cannot be made: {error.strerror}; choose another") from None
        folder.write_json(MARKER, {"schema": SCHEMA, "a3tune": version("a3tune")})
        return folder

    @classmethod
    def check(cls, path: Path) -> bool:
        """Whether `path` is the folder of an earlier run; `create` makes one if it is not. Touches nothing.

        Raises RunError when `path` holds something else.
        """
        check_place(path)
        marker = unfinished(path / MARKER)  # a run that was killed at once left no more than this
        if not path.exists() or all(item == marker for item in path.iterdir()):
            return False
        cls.open(path)
        return True

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run. Raises RunError when there is none at `path`."""
        if not path.is_dir():
            raise RunError(f"{path}: expected the folder of a run, there is none")
        try:
            schema = json.loads((path / MARKER).read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise RunError(
                f"{path}: the output folder is not ours: it holds files but no valid {MARKER}; choose another"
            ) from None
        if type(schema) is not int or schema != SCHEMA:
            raise RunError(
                f"{path}: made by another version of a3tune (layout {str(schema)[:40]}, this one reads {SCHEMA}); "
                "choose another"
            )
        return cls(path)

    @classmethod
    def of_adapter(cls, adapter: Path) -> "RunFolder | None":
        """The run that an adapter, or a checkpoint of it, lies in; None if there is none. A link is followed."""
        place = adapter.resolve().parent
        runs = (cls(path) for path in (place, place.parent))
        return next((run for run in runs if place in (run.path, run.checkpoints) and run.config.is_file()), None)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def best(self) -> Path:
        """The adapter with the best score of the validation, as `adapter` else; the one of the last step is there."""
        return self.path / "best"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """The settings that the answers were made with."""
        return self.path / "evaluation.yaml"

    @property
    def identity(self) -> Path:
        """What the answers belong to, by content: rows, images, weights; and the settings."""
        return self.path / "identity.json"

    @property
    def training_identity(self) -> Path:
        """What the training was started with, by content: rows, images, labels, base."""
        return self.path / "training_identity.json"

    @property
    def maps(self) -> Path:
        """Folder of the attention maps: safetensors, one file per batch."""
        return self.path / "maps"

    @property
    def nonfinite(self) -> Path:
        """Step, samples and losses where a loss was NaN or infinite."""
        return self.path / "nonfinite.json"

    @property
    def summary(self) -> Path:
        """Of a demo: its numbers."""
        return self.path / "summary.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def reliance(self) -> Path:
        """What was answered with parts of the images hidden."""
        return self.path / "reliance.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder for this process; see `locked`. Raises RunError when another run holds it."""
        return locked(self.path)

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of this folder, whole or not at all; see `write_atomic`."""
        return write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """As `write_text`, sealed; a number that JSON does not know (NaN) is an error of the caller (ValueError)."""
        return self.write_text(name, json.dumps(sealed(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_config(self, config: RunConfig) -> Path:
        return self.write_text(self.config.name, dump_config(config))

    def read_config(self) -> RunConfig:
        """The settings of the run. Raises RunError when it has none yet, ConfigError when someone broke them."""
        if not self.config.is_file():
            raise RunError(f"{self.path}: holds no {self.config.name}: the run never started; train first")
        return read_settings(self.config)

    def write_environment(self, base: str | None = None) -> Path:
        return self.write_json(self.environment.name, environment(base))


def read_settings(path: Path) -> RunConfig:
    """Settings that one of our commands wrote; those that it did not know yet as they were at the time.

    Raises RunError when nothing is left of them, ConfigError as always.
    """
    if not path.read_bytes().strip():
        raise RunError(f"{path}: cannot be read, it is empty; delete it, and run the command that made it again")
    config, given = load_given(path)
    unsaid = [(name, value) for name, value in _EARLIER.items() if name not in given]
    return load_config(path, unsaid) if unsaid else config


def read_json(path: Path, again: str) -> dict[str, Any]:
    """JSON that `write_json` wrote. Raises RunError, which says what to do (`again`), if it is damaged."""
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read, it is damaged ({in_short(error)}); {again}") from None


def environment(base: str | None = None) -> dict[str, Any]:
    """Versions and hardware that results may depend on; no names of users, hosts or folders.

    `base` is the base model where it is one of the Hugging Face Hub, with its commit.
    """
    import torch

    return ({} if base is None else {"base model": base}) | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {package: version(package) for package in PACKAGES},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
