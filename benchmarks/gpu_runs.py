"""Whole trainings on a device, for `gpu.py`: one that is killed and goes on, and one of two processes on one card."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from a3tune.config import RunConfig, dump_config, load_config
from a3tune.data.phantom.dataset import write_phantom
from a3tune.training import train as training

STEPS, LIMIT = 4, 120
"""Optimiser steps of a training, and seconds for one of two processes."""


def resumed(device: str) -> list[dict[str, Any]]:
    """A training that is killed after its second step and goes on, beside one that is not, and two that are not."""
    with TemporaryDirectory() as folder:
        configs = {name: _config(Path(folder), name, device) for name in ("one", "another", "killed")}
        for name, config in configs.items():
            if name == "killed":
                with suppress(_KilledError):
                    training.train(config, callbacks=[_Killed()])
            training.train(config, callbacks=[])
        return [
            {"what": "killed and resumed, beside uninterrupted", "largest difference": _apart(folder, "one", "killed")},
            {"what": "uninterrupted twice", "largest difference": _apart(folder, "one", "another")},
        ]


def processes_on_one_card(device: str) -> list[dict[str, Any]]:
    """Two processes with half the batch each beside one with the whole: DDP on one card, by each backend."""
    rows = []
    with TemporaryDirectory() as folder:
        training.train(_config(Path(folder), "one", device), callbacks=[])
        for backend in ("nccl", "gloo") if device == "cuda" else ("gloo",):
            config = _config(Path(folder), backend, device, "training.batch_size=2")
            file = Path(folder) / f"{backend}.yaml"
            file.write_text(dump_config(config))
            start = time.perf_counter()
            said = _together(file, backend)
            row: dict[str, Any] = {"backend": backend, "seconds": time.perf_counter() - start}
            rows.append(row | ({"failed": said} if said else {"largest difference": _apart(folder, "one", backend)}))
    return rows


def _config(folder: Path, name: str, device: str, *more: str) -> RunConfig:
    rows = folder / "data" / "train.jsonl"
    if not rows.is_file():
        rows = write_phantom(folder / "data", {"train": 8})["train"]
    settings = ["labels.source=truth", f"training.max_steps={STEPS}", "training.save_steps=2", "training.batch_size=4"]
    settings += [f"data.train={rows}", f"output={folder / name}", f"model.device={device}", "alignment.weight=0.5"]
    return load_config(None, [*settings, *more])


def _apart(folder: str, *names: str) -> float:
    """The largest difference between the weights of two adapters."""
    one, other = (load_file(Path(folder) / name / "adapter" / "adapter_model.safetensors") for name in names)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class _KilledError(Exception):
    """Ends a training as a kill would: right after a checkpoint."""


class _Killed(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _KilledError


def _together(config: Path, backend: str) -> str:
    """Run `main` below in two processes on the first device; what went wrong, in a line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", "from gpu_runs import work; work()", str(config), backend]
    place = Path(__file__).parent
    shared["PYTHONPATH"] = os.pathsep.join([str(place), *sys.path])
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[1] for process in started]
    except subprocess.TimeoutExpired:
        said = [f"no end within {LIMIT} s"] * 2
    for process in started:
        process.kill()
    failed = [text for text, process in zip(said, started, strict=True) if process.wait()]
    return failed[0].strip().splitlines()[-1][:150] if failed else ""


def work() -> None:
    """One of two processes: train by a configuration file with a backend of torch.distributed."""
    file, backend = sys.argv[1:]
    # Two processes on one card are for this trial only, so there is no setting for it.
    training.TrainingArguments = partial(TrainingArguments, ddp_backend=backend)  # pyright: ignore
    training.train(load_config(Path(file)), callbacks=[])
