"""The run folder: one folder tells the whole story of a run.

Knows which files a run holds and whether a folder is ours; not what the files say. Needs a POSIX system (`fcntl`).
"""

import fcntl
import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from a3tune.config import RunConfig, dump_config, load_config
from a3tune.errors import RunError
from a3tune.files import write_atomic

MARKER = "a3tune.json"
SCHEMA = 1
PACKAGES = ("a3tune", "torch", "transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that belongs to one run. Make one with `create` or `open`."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new run folder, or the one of an earlier run at `path`.

        Raises RunError when the folder holds something else, or cannot be written. Nothing in it is ever deleted.
        """
        folder = cls(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected an output folder, this is a file; choose another")
        if path.exists() and any(path.iterdir()):
            return cls.open(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: the output folder cannot be made: {error.strerror}; choose another") from None
        folder.write_json(MARKER, {"schema": SCHEMA, "a3tune": version("a3tune")})
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run. Raises RunError when there is none at `path`."""
        if not path.is_dir():
            raise RunError(f"{path}: expected the folder of a run, there is none")
        try:
            schema = json.loads((path / MARKER).read_text(encoding="utf-8"))["schema"]
        except (OSError, ValueError, TypeError, KeyError):
            raise RunError(
                f"{path}: the output folder is not ours: it holds files but no valid {MARKER}; choose another"
            ) from None
        if schema != SCHEMA:
            raise RunError(
                f"{path}: made by another version of a3tune (layout {schema}, this one reads {SCHEMA}); choose another"
            )
        return cls(path)

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
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. Raises RunError when another run holds it.

        The operating system releases the lock however the process ends, `kill -9` included, so it never goes stale.
        """
        try:
            file = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}; choose another output folder") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"{self.path}: in use by another run ({file.read().strip() or 'just started'}); "
                    "wait for it or choose another output folder"
                ) from None
            except OSError as error:
                raise RunError(
                    f"{self.path}: this file system has no locks ({error.strerror}); choose another"
                ) from None
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                yield
            finally:
                file.truncate(0)

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of this folder, whole or not at all; see `write_atomic`."""
        return write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """As `write_text`; a number that JSON does not know (NaN) is an error of the caller (ValueError)."""
        return self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_config(self, config: RunConfig) -> Path:
        return self.write_text(self.config.name, dump_config(config))

    def read_config(self) -> RunConfig:
        """The settings of the run. Raises RunError when it has none yet, ConfigError when someone broke them."""
        if not self.config.is_file():
            raise RunError(f"{self.path}: holds no {self.config.name}: the run never started; train first")
        return load_config(self.config)

    def write_environment(self) -> Path:
        return self.write_json(self.environment.name, environment())


def environment() -> dict[str, Any]:
    """Versions and hardware that results may depend on; no names of users, hosts or folders."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {package: version(package) for package in PACKAGES},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
