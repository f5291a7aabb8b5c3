"""`a3tune train --dry-run`: what a training would take, and what would be wrong. Touches nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from a3tune.config import RunConfig
from a3tune.data.rows import read_split
from a3tune.errors import A3TuneError, ConfigError
from a3tune.machine import processes
from a3tune.machine.memory import in_use
from a3tune.models import base_folder
from a3tune.run.folder import RunFolder
from a3tune.training.checkpoint import last_checkpoint, state_of
from a3tune.training.estimate import Memory, estimate_memory, steps_of
from a3tune.training.regions import known_labels, label_store, region_source
from a3tune.training.resume import is_finished, refuse_other_settings
from a3tune.training.score import validation_sample
from a3tune.training.train import train
from a3tune.types import Sample


def foresee(config: RunConfig, timed_steps: int | None = None) -> Iterator[str]:
    """Lines about a training that `commands.checks.check_train` has let pass.

    `timed_steps` are taken, in a folder that is gone afterwards. Raises what the training would raise: LabelError for a
    row without labels, RunError for a folder of another run.
    """
    if timed_steps and processes.count() > 1:
        raise ConfigError("--timed-steps: expected one process; each of several would take its own steps")
    samples = read_split(config.data, "train")
    yield _of_rows(config, samples)
    size = config.training.batch_size * config.training.accumulation * processes.count()
    steps = steps_of(config, len(samples), processes.count())
    yield f"Steps: {steps:,} of {size:,} samples{_so_far(config)}"
    if measured := validation_sample(config):
        every, store = config.training.eval_steps, label_store(config)
        labelled = f", {len(known_labels(config, store, measured)):,} of them labelled" if store else ""
        yield f"Validation: {len(measured):,} rows of {config.data.validation}{labelled}, every {every:,} steps"
    name = config.model.path
    if base_folder(name) is None:
        yield f"Model: {name} is not on this machine; it would be downloaded, and its memory is not known before"
        return
    yield _of_memory(config, samples)
    if timed_steps:
        seconds = _seconds_a_step(config, timed_steps)
        minutes = seconds * steps / 60
        whole = f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
        yield f"Time: {seconds:.3g} s a step ({timed_steps} timed), {whole} without evaluations; {in_use()}"


def _of_rows(config: RunConfig, samples: list[Sample]) -> str:
    rows = f"Rows: {len(samples):,}"
    if config.labels.source == "none":
        return f"{rows}; nothing is aligned (labels.source=none)"
    if (store := label_store(config)) is None:
        return f"{rows}, {sum(bool(sample.regions) for sample in samples):,} of them with regions of their own"
    for sample in samples:
        store.content(sample)
    return f"{rows}, all of them labelled in {config.label_store}"


def _so_far(config: RunConfig) -> str:
    folder = RunFolder(config.output)
    finished, checkpoint = is_finished(folder), last_checkpoint(folder.checkpoints)
    if finished or checkpoint:
        refuse_other_settings(folder, config)
    if finished:
        return "; it is finished"
    return f"; it goes on from step {state_of(checkpoint)['global_step']:,}" if checkpoint else ""


def _of_memory(config: RunConfig, samples: list[Sample]) -> str:
    try:
        need = estimate_memory(config, samples, region_source(config, label_store(config)))
    except A3TuneError:
        raise
    except Exception as error:  # a family whose layers cannot be taken away
        return f"Memory: not known ({type(error).__name__}: a smaller model of this kind cannot be made)"
    return _in_words(need)


def _in_words(need: Memory) -> str:
    parts = {"weights": need.weights, "adapter and its optimiser": need.adapter, "a step": need.step}
    words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"Memory of a device: about {need.total / 1e9:.2f} GB ({words})"


def _seconds_a_step(config: RunConfig, count: int) -> float:
    """Seconds of the steps after the first, which is slower than all others."""
    timer = _Timer(count)
    with TemporaryDirectory() as place:
        quiet = replace(config.training, max_steps=count + 1, eval_steps=0, keep_best=None, patience=None, report_to=())
        alone = replace(
            config,
            output=Path(place) / "run",
            data=replace(config.data, validation=None),
            labels=replace(config.labels, store=config.label_store),
            training=quiet,
        )
        with suppress(_EnoughError):
            train(alone, callbacks=[timer])
    return (timer.times[-1] - timer.times[0]) / count


class _EnoughError(Exception):
    """Ends a training whose adapter nobody wants."""


class _Timer(TrainerCallback):
    def __init__(self, count: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count, self.clock = count, clock
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self.clock())
        if len(self.times) > self.count:
            raise _EnoughError
