"""Runs what experiments need, cell by cell: train once, answer with every decoding method. Resumable, on many devices.

A run that several tables share is made once: its folder is named by what it is and by a hash of its settings.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from a3tune.commands.evaluate import evaluate_all
from a3tune.commands.label import label
from a3tune.commands.subject import Subject
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.errors import LabelError
from a3tune.machine.signals import held
from a3tune.machine.workers import become_worker, ending, until_stopped
from a3tune.reproduce.content import refuse_other_content
from a3tune.reproduce.experiments import Column, Experiment, Row
from a3tune.reproduce.places import Places
from a3tune.run.folder import RunFolder

ADAPTERS = {"base": ["labels.source=none"], "lora": ["adapter.kind=lora", "labels.source=none"], "a3tune": []}
"""Settings of the three kinds of models."""


@dataclass(frozen=True, slots=True)
class Run:
    """A model, trained or not; its settings name the run folder."""

    config: RunConfig
    trained: bool

    def answers(self, decode: str) -> Path:
        """Folder of its answers by a decoding method."""
        return self.config.output.parent.parent / "answers" / f"{self.config.output.name}-{decode}"


@dataclass(frozen=True, slots=True)
class Job:
    """A run, and the decoding methods that it answers by."""

    run: Run
    methods: list[str]


def run_of(places: Places, out: Path, experiment: Experiment, row: Row, column: Column, seed: int) -> Run:
    """The run behind a cell of a table. Attention is measured over the same heads and rows in all."""
    trained = row.adapter != "base"
    given = [*ADAPTERS[row.adapter], *row.change, *([f"training.seed={seed}"] if trained else [])]
    config = places.config(experiment.model, column.data, given)
    for setting, factor in row.scale.items():
        section, name = setting.split(".")
        group = getattr(config, section)
        config = replace(config, **{section: replace(group, **{name: factor * getattr(group, name)})})
    measured = places.config(experiment.model, column.data, ()).active_evaluation
    config = replace(config, evaluation=replace(config.evaluation, heads=measured.heads, rows=measured.rows))
    data = (config.data.test or Path()).parent.name if places.stand_in else column.data
    parts = [data, *([] if places.stand_in else [experiment.model]), row.adapter]
    parts += [f"seed{seed}"] if trained else []
    name = run_name(parts, config)
    config = replace(config, labels=replace(config.labels, store=out / "labels" / data))
    return Run(replace(config, output=out / "runs" / name), trained)


def run_name(parts: Sequence[str], config: RunConfig) -> str:
    """Of a run's folder: for people, and a hash that tells its settings from all others."""
    settings = hashlib.sha256(repr(config).encode()).hexdigest()[:8]
    return re.sub(r"[^\w.=-]+", "_", "-".join([*parts, settings]))


def plan(places: Places, out: Path, chosen: Iterable[Experiment], seeds: Sequence[int]) -> list[Job]:
    """Every run that the experiments need, once, with the decoding methods that it answers by.

    A data set without a place needs none: its columns stay empty.
    """
    needed: dict[Path, Job] = {}
    for experiment in chosen:
        if not experiment.asks:
            continue
        columns = [column for column in experiment.columns if column.data in places.data]
        for row, column, seed in product(experiment.rows, columns, seeds):
            run = run_of(places, out, experiment, row, column, seed)
            job = needed.setdefault(run.config.output, Job(run, []))
            if row.decode not in job.methods:
                job.methods.append(row.decode)
    return list(needed.values())


def run_all(jobs: Sequence[Job], workers: int, say: Callable[[str], None], *, labels: bool = True) -> dict[str, str]:
    """Label, train and answer what is not there yet, `workers` runs at a time, each on a device of its own where
    there are several; nothing with 0. Without `labels` they are expected to be there. Returns why answers that are
    missing cannot be had, by folder."""
    answered = [(job.run.answers(name), job.run) for job in jobs for name in job.methods if _answered(job.run, name)]
    trained = {run.config.output: run.config for _, run in answered if run.trained}
    refuse_other_content(((place, run.config) for place, run in answered), trained.values())
    left = [replace(job, methods=[name for name in job.methods if not _answered(job.run, name)]) for job in jobs]
    left = [job for job in left if job.methods]
    say(f"{len(jobs) - len(left)} of {len(jobs)} runs were done earlier")
    if workers == 0:
        return {}
    if labels:
        _label(left, say)
    absent: dict[str, str] = {}
    for number, (job, missing) in enumerate(_done(left, workers), start=1):
        absent |= missing
        say(f"{number} of {len(left)}: {job.run.config.output.name}")
    return absent


def _label(jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """Make what the jobs learn from, once."""
    labelled: set[tuple[Path | None, Path | None, int]] = set()
    for job in jobs:
        config = job.run.config
        places = (config.labels.store, config.data.train, config.labels.top_k)
        if job.run.trained and config.labels.source == "weak" and places not in labelled:
            say(f"labels of {config.data.train}")
            made, _ = label(config, _silent, say)
            if made.failures:
                first = next(iter(made.failures.values()))
                count = f"{len(made.failures)} of its {made.images} images"
                raise LabelError(f"{config.data.train}: {count} cannot be read, as: {first}")
            labelled.add(places)


def work(job: Job) -> dict[str, str]:
    """Train and answer; returns which answers cannot be had, and why."""
    config = job.run.config
    adapter = RunFolder(fine_tune(config, _silent)).adapter if job.run.trained else None
    subject = {config.output.name: Subject(config, adapter)}
    done = evaluate_all(subject, job.methods, lambda _, method: job.run.answers(method), _silent)
    for error in done.failed.values():
        raise error
    return done.absent


def _done(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, dict[str, str]]]:
    """The jobs as they end, with what they could not answer; with one worker all happens in this process."""
    if workers == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    context = get_context("spawn")
    with held():  # see `workers.in_order`
        devices = context.Queue()
        pool = ProcessPoolExecutor(workers, context, _take_device, (devices,))
    for number in range(workers):
        devices.put(number)
    with ending(pool):
        with held():
            working = {pool.submit(until_stopped, work, job): job for job in jobs}
        yield from ((working[done], done.result()) for done in as_completed(working))


def _answered(run: Run, method: str) -> bool:
    return RunFolder(run.answers(method)).results.is_file()


def _take_device(devices: Queue) -> None:
    """Of several CUDA devices each process sees one."""
    become_worker()
    number = devices.get()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def _silent(done: int, total: int) -> None:
    pass
