"""What each command does, over a `RunConfig`. Knows which room does what, in which order; prints nothing."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from a3tune.adapters import load_adapter
from a3tune.config import RunConfig, dump_config, load_config
from a3tune.data.images import describe, load_image
from a3tune.data.rows import read_rows
from a3tune.decoding import DECODERS, make_decoder
from a3tune.errors import ConfigError, ModelError, RunError
from a3tune.evaluate import Results, evaluate
from a3tune.files import write_atomic
from a3tune.labels.propose import make_proposer
from a3tune.labels.quality import Quality, label_quality
from a3tune.labels.rank import make_ranker
from a3tune.labels.store import LabelRun, LabelStore, label_images
from a3tune.predictions import read_cost
from a3tune.report.card import model_card
from a3tune.report.data import Cases, LabelQuality, ReportData, public_settings
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
from a3tune.report.table import comparison_table
from a3tune.run import RunFolder
from a3tune.training.train import train
from a3tune.types import Labels, Sample
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm, load_boxes, load_vlm
from a3tune.vlm.patches import paint
from a3tune.vlm.tiny import shipped

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
EVALUATION = "evaluation.yaml"
"""File of a run folder: the settings that its answers were made with."""
QUALITY = "quality.json"
"""File of a label store: how well its labels find the true regions."""
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
    write_atomic(_store(config) / QUALITY, text.encode())
    return run, quality


def fine_tune(config: RunConfig, progress: Progress, *, synthetic: bool = False) -> Path:
    """Train an adapter in `config.output`; weak labels come from the store (`label`). Returns the run folder.

    `synthetic` says in the adapter's model card that the data are phantom scans.
    """
    folder = RunFolder(train(config, callbacks=[_Steps(progress)]))
    samples = read_rows(_needed(config.data.train, "data.train", "a JSONL file to train on"))
    write_atomic(folder.adapter / "README.md", model_card(config, _counts(samples), synthetic=synthetic).encode())
    return folder.path


def measure(config: RunConfig, adapter: Path | None, progress: Progress) -> Results:
    """Answer and score `config.data.test` with the base model or an adapter; everything ends in `config.output`."""
    return _measure(config, _load(config, adapter), _questions(config), progress)


def measure_all(config: RunConfig, adapter: Path | None, progress: Progress) -> tuple[dict[str, Path], dict[str, str]]:
    """`measure` with every decoding method, in a run folder each inside `config.output`.

    Returns the folders by method, and why the methods that are left out cannot be had here.
    """
    vlm, samples = _load(config, adapter), _questions(config)
    regions = all(sample.regions for sample in samples)
    done: dict[str, Path] = {}
    absent: dict[str, str] = {}
    for name in DECODERS:
        if name == "controlmllm" and not regions:
            absent[name] = "it needs the true regions of every question, and some have none"
            continue
        try:
            make_decoder(name).check(vlm)
        except ModelError as error:
            absent[name] = str(error)
            continue
        method = replace(config.evaluation, decode=name, decoding={}, strategy=None)
        done[name] = config.output / name
        _measure(replace(config, evaluation=method, output=done[name]), vlm, samples, progress)
    return done, absent


def _questions(config: RunConfig) -> list[Sample]:
    return read_rows(_needed(config.data.test, "data.test", "a JSONL file to evaluate"))


def _measure(config: RunConfig, vlm: Vlm, samples: Sequence[Sample], progress: Progress) -> Results:
    folder = RunFolder.create(config.output)
    settings = config.evaluation
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
    folder.write_text(EVALUATION, dump_config(config))
    if not folder.environment.is_file():
        folder.write_environment()
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


def compare(runs: Sequence[Path], forms: Sequence[str]) -> list[str]:
    """A table of evaluated runs in this order, compared with the first, in each of `forms` (`report.table.FORMATS`).

    Raises as `write_report`.
    """
    folders = _named(runs)
    reference = next(iter(folders))
    config = _evaluation(folders[reference])
    samples = _questions(config)
    methods = [read_method(name, name, folder, samples) for name, folder in folders.items()]
    costs = {name: read_cost(folder) for name, folder in folders.items()}
    results = method_results(methods, samples, reference)
    return [comparison_table(results, costs, reference, form) for form in forms]


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
        self.progress(state.global_step, state.max_steps)


def _needed(path: Path | None, key: str, what: str) -> Path:
    if path is None:
        raise ConfigError(f"{key}: expected {what}, got none; add {key}=FILE.jsonl")
    return path


def _load(config: RunConfig, adapter: Path | None) -> Vlm:
    vlm = load_vlm(**asdict(config.model))
    return vlm if adapter is None else replace(vlm, model=load_adapter(vlm.model, adapter))


def _decoding(config: RunConfig) -> dict[str, Any]:
    settings = config.evaluation
    names = ("decode", "decoding", "strategy", "seed")
    return {name: getattr(settings, name) for name in names}


def _store(config: RunConfig) -> Path:
    return config.labels.store or config.output / "labels"


def _make_labels(config: RunConfig, samples: Sequence[Sample], progress: Progress) -> LabelRun:
    settings = config.labels
    device = None if config.model.device == "auto" else config.model.device
    return label_images(
        samples,
        make_proposer(settings.proposer, settings.weights, settings.proposal, device),
        make_ranker(shipped("ranker") if settings.ranker == "tiny" else Path(settings.ranker), device),
        _store(config),
        visual_prompt=settings.visual_prompt,
        query=settings.query,
        workers=settings.workers,
        progress=progress,
    )


def _evaluation(folder: RunFolder) -> RunConfig:
    path = folder.path / EVALUATION
    if not path.is_file():
        raise RunError(f"{folder.path}: holds no {EVALUATION}: it was not evaluated; use `a3tune eval` first")
    return load_config(path)


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    counts = {"questions": len(samples), "images": len({sample.image for sample in samples})}
    patients = {sample.meta["patient"] for sample in samples if "patient" in sample.meta}
    return counts | ({"patients": len(patients)} if patients else {})


def _label_quality(config: RunConfig) -> LabelQuality | None:
    path = _store(config) / QUALITY
    if not path.is_file():
        return None
    quality = {name: Quality(**group) for name, group in json.loads(path.read_text(encoding="utf-8")).items()}
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
    found = json.loads(folder.environment.read_text(encoding="utf-8"))
    flat = {name: value for name, value in found.items() if isinstance(value, str | int)} | found.get("packages", {})
    return {name: str(value) for name, value in flat.items()}
