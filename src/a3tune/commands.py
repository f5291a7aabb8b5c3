"""What each command does, over a `RunConfig`. Knows which room does what, in which order; prints nothing."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from a3tune import processes
from a3tune.adapters import load_adapter
from a3tune.config import LabelsConfig, RunConfig, dump_config
from a3tune.data.images import describe, load_image
from a3tune.data.rows import read_rows
from a3tune.decoding import make_decoder
from a3tune.errors import ConfigError, DataError, ModelError, RunError
from a3tune.evaluate import evaluate
from a3tune.files import write_atomic
from a3tune.labels.propose import Proposer, make_proposer
from a3tune.labels.quality import Quality, label_quality
from a3tune.labels.rank import Ranker, make_ranker
from a3tune.labels.store import LabelRun, LabelStore, label_images
from a3tune.predictions import read_cost
from a3tune.report.card import CARD, Evaluation, model_card, update_card
from a3tune.report.data import Cases, LabelQuality, ReportData, public_data, public_settings
from a3tune.report.figures import overlay
from a3tune.report.gather import (
    Method,
    choose_cases,
    draw_cases,
    label_scores,
    method_results,
    question_only,
    read_method,
)
from a3tune.report.html import render
from a3tune.report.table import comparison_tables
from a3tune.results import Results, classes
from a3tune.run import RunFolder, read_json, read_settings
from a3tune.training.train import train
from a3tune.types import Labels, Sample
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm, load_boxes, load_vlm
from a3tune.vlm.patches import paint
from a3tune.vlm.tiny import shipped

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
GREEDY = "greedy"
"""Decoding method that the others are compared with."""
EVALUATION = "evaluation.yaml"
"""File of a run folder: the settings that its answers were made with."""
GROUPS = ("body", "modality", "organ")
"""Fields of `meta` that label quality is broken down by."""
MIN_IOU = 0.5
"""Overlap from which a weak label counts as the true region."""


def label(config: RunConfig, progress: Progress) -> tuple[LabelRun, dict[str, Quality]]:
    """Weak labels of `config.data.train` into the label store; what is there already is not made again.

    Returns what was done, and how well the labels find the true regions where these are known (`label_quality`).
    """
    samples = read_rows(_needed(config.data.train, "data.train", "a JSONL file to label"))
    run = _make_labels(config, samples, progress)
    usable = [sample for sample in samples if describe(sample.image) not in run.failures]
    store = LabelStore(_store(config))
    quality = label_quality(
        usable, lambda sample: store.labels(sample, top_k=None), top_k=config.labels.top_k, min_iou=MIN_IOU, by=GROUPS
    )
    text = json.dumps({name: asdict(group) for name, group in quality.items()}, indent=2)
    write_atomic(quality_file(config), text.encode())
    return run, quality


def quality_file(config: RunConfig) -> Path:
    """File of a label store: how well the best K of its labels find the true regions."""
    return _store(config) / f"quality-{config.labels.top_k}.json"


def fine_tune(config: RunConfig, progress: Progress, *, synthetic: bool = False) -> Path:
    """Train an adapter in `config.output`; weak labels come from the store (`label`). Returns the run folder.

    The adapter gets a model card, unless it has one: `synthetic` says in it that the data are phantom scans.
    """
    folder = RunFolder(train(config, callbacks=[_Steps(progress)]))
    card = folder.adapter / CARD
    if processes.index() == 0 and not card.exists():
        path = _needed(config.data.train, "data.train", "a JSONL file to train on")
        samples = read_rows(path)
        labels = _label_quality(config) if config.labels.source == "weak" else None
        name = public_data(path, samples)
        text = model_card(config, _counts(samples), data=name, labels=labels, synthetic=synthetic)
        write_atomic(card, text.encode())
    return folder.path


def measure(config: RunConfig, adapter: Path | None, progress: Progress) -> Results:
    """Answer and score `config.data.test` with the base model or an adapter; everything ends in `config.output`.

    An adapter's model card takes over the results.
    """
    return _measure(Subject(config, adapter), _load(config, adapter), _questions(config), progress)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate: a base with its settings, and an adapter if it has one."""

    config: RunConfig
    adapter: Path | None


def by_difference(out: Path, subjects: Mapping[str, Subject], methods: Sequence[str]) -> Callable[[str, str], Path]:
    """Model, method -> a folder in `out`, called `model-method` less the part that is the same for all."""

    def place(title: str, method: str) -> Path:
        return out / "-".join(([title] if len(subjects) > 1 else []) + ([method] if len(methods) > 1 else []))

    return place


def measure_all(
    subjects: Mapping[str, Subject], methods: Sequence[str], place: Callable[[str, str], Path], progress: Progress
) -> tuple[list[Path], dict[str, str]]:
    """`measure` of every model with every decoding method, in the run folders that `place` gives them.

    Returns the folders, those of greedy decoding first, and by folder name why what is left out cannot be had here.

    Raises ConfigError for a method that does not exist, or settings of one (`evaluation.decoding`) for several.
    """
    if len(methods) > 1 and any(subject.config.evaluation.decoding for subject in subjects.values()):
        raise ConfigError("evaluation.decoding: these are settings of one decoding method, give them with one --decode")
    decoders = {name: make_decoder(name) for name in sorted(methods, key=lambda name: name != GREEDY)}
    runs: list[Path] = []
    absent: dict[str, str] = {}
    for title, subject in subjects.items():
        vlm, samples = _load(subject.config, subject.adapter), _questions(subject.config)
        for name, decoder in decoders.items():
            run = place(title, name)
            if name == "controlmllm" and not all(sample.regions for sample in samples):
                absent[run.name] = "it needs the true regions of every question, and some have none"
                continue
            try:
                decoder.check(vlm)
            except ModelError as error:
                absent[run.name] = str(error)
                continue
            settings = replace(subject.config.evaluation, decode=name)
            config = replace(subject.config, evaluation=settings, output=run)
            _measure(replace(subject, config=config), vlm, samples, progress)
            runs.append(run)
    return runs, absent


def _questions(config: RunConfig) -> list[Sample]:
    return read_rows(_needed(config.data.test, "data.test", "a JSONL file to evaluate"))


def _measure(subject: Subject, vlm: Vlm, samples: Sequence[Sample], progress: Progress) -> Results:
    config = subject.config
    if processes.index() == 0:
        RunFolder.create(config.output)
    processes.wait()
    folder, settings = RunFolder(config.output), config.evaluation
    results = evaluate(
        vlm,
        samples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        **_decoding(config),
        weights={name: Path(str(place)) for name, place in settings.weights.items()},
        tau=settings.tau,
        normalisation=settings.normalisation,
        out_folder=folder.path,
        progress=progress,
    )
    if processes.index() == 0:
        folder.write_text(EVALUATION, dump_config(config))
        if not folder.environment.is_file():
            folder.write_environment()
        if subject.adapter:
            name = public_data(_needed(config.data.test, "data.test", "a JSONL file to evaluate"), samples)
            update_card(subject.adapter, Evaluation(name, len(samples), config, results.metrics))
    processes.wait()
    return results


def ask(config: RunConfig, adapter: Path | None, image: Path, question: str, out: Path) -> str:
    """The answer to one question; `out` becomes a PNG of the image under the attention of the answer."""
    vlm = _load(config, adapter)
    sample = Sample(id="question", image=image, prompt=question, answer="", answer_type="report")
    results = evaluate(vlm, [sample], max_new_tokens=config.evaluation.max_new_tokens, **_decoding(config))
    pixels = np.asarray(load_image(image))
    size = (pixels.shape[0], pixels.shape[1])
    heat = paint(results.maps[sample.id].astype(np.float32), token_boxes(vlm, *size), size)
    picture = io.BytesIO()
    overlay(pixels, heat).save(picture, "PNG")
    write_atomic(out, picture.getvalue())
    return results.predictions[0].prediction


@dataclass(frozen=True, slots=True)
class Page:
    """What a report says beside what its runs left."""

    title: str
    command: str
    """That makes the page again."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of the runs, by the names of their folders; the others are called by these names."""
    reference: str | None = None
    """Run that the others are compared with; None is the first."""
    shown: str | None = None
    """Run whose cases are drawn; None is the last."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    synthetic: bool = False


def write_report(runs: Sequence[Path], out: Path, page: Page) -> ReportData:
    """One page about evaluated runs, in this order.

    Raises RunError when a folder holds no evaluated run, two have one name, or the runs answered different questions.
    """
    folders = _named(runs)
    reference, shown = page.reference or next(iter(folders)), page.shown or list(folders)[-1]
    config = _evaluation(folders[shown])
    samples = _questions(config)
    methods = [read_method(name, page.titles.get(name, name), folder, samples) for name, folder in folders.items()]
    data = ReportData(
        title=page.title,
        methods=method_results(methods, samples, reference),
        reference=reference,
        counts=_counts(samples),
        seeds=1,
        command=page.command,
        settings=public_settings(config),
        seconds=page.seconds,
        tau=config.evaluation.tau,
        normalisation=config.evaluation.normalisation,
        question_only=question_only(read_rows(config.data.train), samples) if config.data.train else None,
        labels=_label_quality(config),
        cases=_cases(config, methods, samples, shown, reference) if shown != reference else None,
        synthetic=page.synthetic,
        environment=_environment(folders[shown]),
    )
    write_atomic(out, render(data).encode())
    return data


def compare(runs: Sequence[Path], forms: Sequence[str], by: str | None = None) -> list[str]:
    """A table of evaluated runs in this order, compared with the first, in each of `forms` (`report.table.FORMATS`).

    `by` is a field of `meta`: a table for each of its values.

    Raises as `write_report`; DataError when no question has the field.
    """
    folders = _named(runs)
    reference = next(iter(folders))
    config = _evaluation(folders[reference])
    samples = _questions(config)
    methods = [read_method(name, name, folder, samples) for name, folder in folders.items()]
    costs = {name: read_cost(folder) for name, folder in folders.items()}
    chosen = {"": list(range(len(samples)))} if by is None else classes(samples, by)
    if not chosen:
        known = sorted({name for sample in samples for name in sample.meta})
        raise DataError(f"meta.{by}: expected a field of the questions, they have {', '.join(known) or 'none'}")
    results = {
        name: method_results(
            [replace(method, predictions=tuple(method.predictions[i] for i in indices)) for method in methods],
            [samples[i] for i in indices],
            reference,
        )
        for name, indices in chosen.items()
    }
    return [comparison_tables(results, costs, reference, form) for form in forms]


def _named(runs: Sequence[Path]) -> dict[str, RunFolder]:
    folders = {path.resolve().name: RunFolder.open(path) for path in runs}
    if len(folders) < len(runs):
        raise RunError(f"runs: expected folders of different names, got {', '.join(map(str, runs))}; rename one")
    return folders


class _Steps(TrainerCallback):
    """Tells the optimiser steps done."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)


def _needed(path: Path | None, key: str, what: str) -> Path:
    if path is None:
        raise ConfigError(f"{key}: expected {what}, got none; add {key}=FILE.jsonl")
    return path


def _load(config: RunConfig, adapter: Path | None) -> Vlm:
    processes.join(cpu=config.model.device == "cpu")
    vlm = load_vlm(**asdict(config.model))
    return vlm if adapter is None else replace(vlm, model=load_adapter(vlm.model, adapter))


def _decoding(config: RunConfig) -> dict[str, Any]:
    settings = config.evaluation
    names = ("decode", "decoding", "strategy", "seed")
    return {name: getattr(settings, name) for name in names}


def _store(config: RunConfig) -> Path:
    return config.labels.store or config.output / "labels"


def proposer_and_ranker(settings: LabelsConfig, device: str) -> tuple[Proposer, Ranker]:
    """What finds segments, and what ranks them, as the settings say; `device` as `model.device`."""
    place = None if device == "auto" else device
    ranker = shipped("ranker") if settings.ranker == "tiny" else Path(settings.ranker)
    return (
        make_proposer(settings.proposer, settings.weights, settings.proposal, place),
        make_ranker(ranker, place),
    )


def _make_labels(config: RunConfig, samples: Sequence[Sample], progress: Progress) -> LabelRun:
    settings = config.labels
    return label_images(
        samples,
        *proposer_and_ranker(settings, config.model.device),
        _store(config),
        visual_prompt=settings.visual_prompt,
        query=settings.query,
        workers=settings.workers,
        backend=settings.backend,
        progress=progress,
    )


def _evaluation(folder: RunFolder) -> RunConfig:
    path = folder.path / EVALUATION
    if not path.is_file():
        raise RunError(f"{folder.path}: holds no {EVALUATION}: it was not evaluated; use `a3tune eval` first")
    return read_settings(path)


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    counts = {"questions": len(samples), "images": len({sample.image for sample in samples})}
    patients = {sample.meta["patient"] for sample in samples if "patient" in sample.meta}
    return counts | ({"patients": len(patients)} if patients else {})


def _label_quality(config: RunConfig) -> LabelQuality | None:
    path = quality_file(config)
    if not path.is_file():
        return None
    found = read_json(path, "run `a3tune label` again")
    quality = {name: Quality(**group) for name, group in found.items()}
    return label_scores(quality, top_k=config.labels.top_k, min_iou=MIN_IOU)


def _cases(
    config: RunConfig, methods: Sequence[Method], samples: Sequence[Sample], shown: str, reference: str
) -> Cases:
    """The cases with their weak labels, which are made now: only training data was labelled."""
    chosen = choose_cases(methods, shown, reference)
    labels: dict[str, Labels] = {}
    if config.labels.source == "weak":
        ids = {choice.id for choice in chosen.choices}
        drawn = [sample for sample in samples if sample.id in ids]
        _make_labels(config, drawn, lambda done, total: None)
        store = LabelStore(_store(config))
        labels = {sample.id: store.labels(sample, config.labels.top_k, config.labels.threshold) for sample in drawn}
    return draw_cases(chosen, methods, samples, labels, load_boxes(config.model.path))


def _environment(folder: RunFolder) -> dict[str, str]:
    if not folder.environment.is_file():
        return {}
    found = read_json(folder.environment, "delete it")
    flat = {name: value for name, value in found.items() if isinstance(value, str | int)} | found.get("packages", {})
    return {name: str(value) for name, value in flat.items()}
