"""The whole chain on phantom scans: data, labels, LoRA and A3Tune, evaluation, report. Tunables: `assets/demo/`.

Every stage is what a command of the CLI does (`commands.py`), over a `RunConfig`. Knows their order and places.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from a3tune.commands.evaluate import Progress, evaluate_run
from a3tune.commands.label import label
from a3tune.commands.train import fine_tune
from a3tune.config import RunConfig
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows, read_split
from a3tune.demo.plan import Demo
from a3tune.errors import LabelError
from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.results import estimate_as_json
from a3tune.labels.fitting import fitting_settings
from a3tune.labels.quality import Quality
from a3tune.labels.stored import read_quality
from a3tune.metrics.catalogue import describe
from a3tune.models import adapter_weights, shipped
from a3tune.report.gather import question_only
from a3tune.report.records import RightAnswers
from a3tune.report.summary import number
from a3tune.report.tests import right_by_test
from a3tune.report.write import Page, write_report
from a3tune.run.folder import RunFolder, read_json
from a3tune.run.stages import Stages, digest
from a3tune.types import Prediction, Sample

SUMMARY_METRICS = ("open_recall", "closed_accuracy", "coverage", "intensity", "attention_mass")
TITLES = {"base": "Base", "lora": "LoRA", "a3tune": "A3Tune (weak labels)", "a3tune_truth": "A3Tune (true regions)"}
TESTS = {
    "disagree": "where a mark names another answer",
    "random": "where a mark names any answer",
    "none": "where there is no mark",
    "agree": "where a mark names the right answer",
}
REFERENCE = "lora"
_UNDEFINED = {"mean": None, "ci95": [None, None]}
COMMAND = "a3tune demo"

Bar = Callable[[str], AbstractContextManager[Progress]]
"""title -> a progress bar, for as long as it is open."""


def run_demo(demo: Demo, say: Callable[[str], None], bar: Bar) -> Path:
    """Run what is not finished yet and return the report; `summary.json` beside it holds the numbers.

    An interrupted demo goes on where it was. A stage whose settings or inputs changed runs again, with all that
    builds on it.
    """
    folder = RunFolder.create(demo.folder)
    with folder.lock():
        stages = Stages(folder.path / "stages", say)
        for line in _announcement(demo, stages):
            say(line)
        data = _data(demo, stages, bar)
        labels = _labels(demo, stages, data, bar)
        for line in _inputs(demo):
            say(line)
        evaluated = {name: _method(demo, name, stages, data, labels, bar) for name in demo.configs}
        stages.run("report", evaluated, [folder.report], lambda: _report(demo, folder.report, stages.seconds))
        numbers = summary(demo, stages.seconds)
        # For whoever reads it: nothing but the numbers.
        folder.write_text(folder.summary.name, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    for line in _table(numbers):
        say(line)
    return folder.report


def summary(demo: Demo, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Content of `summary.json`; a number that is not defined is null."""
    methods: dict[str, dict[str, Any]] = {}
    by_test = _tested(demo)
    for name, config in demo.configs.items():
        metrics = read_json(RunFolder(config.output).results, "delete it and run the same command again")["metrics"]
        methods[name] = {
            metric: {part: metrics.get(metric, _UNDEFINED)[part] for part in _UNDEFINED} for metric in SUMMARY_METRICS
        }
        methods[name]["tests"] = {test: _as_json(found[name]) for test, found in by_test.items()}
    quality = label_quality_of(demo)
    labels = {"recall_at_k": quality.recall, "mean_best_iou": quality.best_iou}
    return {"methods": methods, "labels": labels, "seconds": dict(seconds)}


def _tested(demo: Demo) -> dict[str, dict[str, RightAnswers]]:
    samples = read_split(demo.configs[REFERENCE].data, "test")
    answers = {name: _answers(RunFolder(config.output), samples) for name, config in demo.configs.items()}
    return right_by_test(answers, samples, REFERENCE)


def _answers(folder: RunFolder, samples: Sequence[Sample]) -> list[Prediction]:
    by_id = {prediction.id: prediction for prediction in read_predictions(folder)}
    return [by_id[sample.id] for sample in samples]


def _as_json(found: RightAnswers) -> dict[str, Any]:
    share = estimate_as_json(found.share)
    if found.comparison is None:
        return share
    change = estimate_as_json(found.comparison.difference)
    return {**share, "paired_vs_lora": {"difference": change["mean"], "ci95": change["ci95"]}}


def _data(demo: Demo, stages: Stages, bar: Bar) -> str:
    recipe, folder = demo.recipe, demo.folder / "data"

    def work() -> None:
        with bar("Drawing scans") as progress:
            write_phantom(
                folder,
                recipe.patients,
                seed=recipe.seed,
                marks=recipe.marks,
                types=recipe.questions,
                progress=progress,
            )

    inputs = {name: getattr(recipe, name) for name in ("patients", "seed", "marks", "questions")}
    return stages.run("data", inputs, [folder], work)


def _labels(demo: Demo, stages: Stages, data: str, bar: Bar) -> str:
    config = demo.configs["a3tune"]
    weights = config.labels.weights
    settings = asdict(config.labels) | {"store": None, "weights": weights and _weights(str(weights), "")}

    def work() -> None:
        with bar("Finding regions") as progress:
            label(config, progress)

    inputs = {"data": data, "labels": settings, "ranker": _weights(config.labels.ranker, "ranker")}
    return stages.run("labels", inputs, [demo.folder / "labels"], work)


def _method(demo: Demo, name: str, stages: Stages, data: str, labels: str, bar: Bar) -> str:
    """Train and evaluate a method; returns the key of its evaluation."""
    config, title = demo.configs[name], TITLES.get(name, name)
    folder = RunFolder(config.output)
    model = {**asdict(config.model), "weights": _weights(config.model.path, "vlm")}
    trained = None
    if name in demo.recipe.methods:
        inputs = {"data": data, "model": model, **_training_inputs(config, labels)}

        def train() -> None:
            with bar(f"Training {title}") as progress:
                fine_tune(config, progress, synthetic=True)

        # The evaluation writes into this folder, too, and into the adapter's card.
        kept = [adapter_weights(folder.adapter), folder.metrics]
        trained = stages.run(f"train_{name}", inputs, [folder.path], train, kept=kept)

    def evaluate() -> None:
        if not folder.predictions.exists():
            # Of answers with other settings, which were deleted.
            folder.reliance.unlink(missing_ok=True)
        with bar(f"Evaluating {title}") as progress:
            evaluate_run(config, folder.adapter if trained else None, progress)

    inputs = {"data": data, "model": model, "trained": trained, "evaluation": asdict(config.active_evaluation)}
    outputs = [
        folder.predictions,
        folder.maps,
        folder.results,
        *([folder.reliance] if config.evaluation.occlude else []),
    ]
    return stages.run(f"evaluate_{name}", inputs, outputs, evaluate)


def _training_inputs(config: RunConfig, labels: str) -> dict[str, Any]:
    """What a training depends on beside data and model. Without alignment its settings change nothing."""
    source = config.labels.source
    inputs = {"adapter": asdict(config.adapter), "training": asdict(config.training), "source": source}
    if source != "none":
        inputs |= {"alignment": asdict(config.alignment), "labels": labels if source == "weak" else None}
    return inputs


def _report(demo: Demo, out: Path, seconds: Mapping[str, float]) -> None:
    page = Page(
        "A3Tune demo", COMMAND, TITLES, TESTS, reference=REFERENCE, shown="a3tune", seconds=seconds, synthetic=True
    )
    write_report([config.output for config in demo.configs.values()], out, page, demo.configs["a3tune"])


def _announcement(demo: Demo, stages: Stages) -> Iterator[str]:
    about = demo.stages()
    left = {name: seconds for name, seconds in about.items() if not stages.finished(name)}
    yield "A tiny vision-language model learns to look where the question asks, on synthetic scans; LoRA beside it."
    yield f"Stages: {', '.join(about)}."
    minutes = math.ceil(sum(left.values()) / 60)
    yield f"About {minutes} min for the {len(left)} that are not finished, on 2 cores with the settings as shipped."
    yield "Ctrl-C stops it, and the same command goes on from there."


def _inputs(demo: Demo) -> Iterator[str]:
    """What can be had without looking, and how good the weak labels are."""
    train, test = (read_rows(demo.folder / "data" / f"{split}.jsonl") for split in ("train", "test"))
    prior = question_only(train, test).scores
    yield "Without the image (most frequent answer to the question): " + ", ".join(
        f"{describe(metric).title.lower()} {number(prior[metric].mean, metric)} %"
        for metric in ("open_recall", "closed_accuracy")
        if metric in prior
    )
    quality, top_k = label_quality_of(demo), demo.configs["a3tune"].labels.top_k
    yield (
        f"Weak labels: the true region is among the best {top_k} for {100 * quality.recall:.0f} % of the training "
        f"questions (at most {100 * quality.ceiling_recall:.0f} % with all segments); "
        f"mean best overlap {quality.best_iou:.2f}"
    )


def _table(numbers: Mapping[str, Any]) -> Iterator[str]:
    """Right answers by what the mark names, then attention; the difference from LoRA in brackets."""
    methods = numbers["methods"]
    tests = list(next(iter(methods.values()))["tests"])
    yield f"{'Right answers, %':22}" + "".join(f"{f'mark: {test}':>20}" for test in tests) + f"{'mass inside':>14}"
    for method, scores in methods.items():
        cells = [_in_brackets(scores["tests"][test]) for test in tests]
        inside = scores["attention_mass"]["mean"]
        mass = "-" if inside is None else number(inside, "attention_mass")
        yield f"{TITLES.get(method, method):22}" + "".join(f"{cell:>20}" for cell in cells) + f"{mass:>14}"


def _in_brackets(found: Mapping[str, Any]) -> str:
    change = found.get("paired_vs_lora", {}).get("difference")
    share = "-" if found["mean"] is None else f"{100 * found['mean']:.1f}"
    return share if change is None else f"{share} ({100 * change:+.1f})"


def label_quality_of(demo: Demo) -> Quality:
    """How well the weak labels of the demo find the true regions."""
    config = demo.configs["a3tune"]
    settings = fitting_settings(config.label_store, config.labels)
    samples = read_split(config.data, "train")
    quality = read_quality(config.label_store, settings.name, config.labels.top_k, samples)
    if quality is None or "all" not in quality:
        raise LabelError(f"{config.label_store}: is not whole; delete it and run the same command again")
    return quality["all"]


def _weights(path: str, asset: str) -> str:
    """Tells models apart: by their files, or by their name on the Hub."""
    folder = shipped(asset) if path == "tiny" else Path(path)
    return digest(folder) if folder.is_dir() else path
