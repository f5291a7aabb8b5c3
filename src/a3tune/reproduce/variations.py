"""What a sweep compares: all combinations of the values given for some settings, beside LoRA without alignment.

Light: told before anything slow is imported. Knows validation data only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from a3tune.commands.checks import check_train
from a3tune.commands.settings import training_settings
from a3tune.config import DataConfig, RunConfig
from a3tune.config.settings import EXPERTS
from a3tune.data.rows import check_split
from a3tune.errors import ConfigError
from a3tune.machine.hashes import file_hash
from a3tune.metrics.catalogue import METRICS
from a3tune.reproduce.experiments import ANSWER

BASELINE = "LoRA, no alignment"
"""The first row of every sweep."""
DEFAULT_SCORES = (ANSWER, "attention_mass")
_NOT_VARIED = {
    "training.seed": "--seed does",
    "data": "all rows of a sweep learn from the same questions",
    "output": "--out does",
    "evaluation": "all rows of a sweep are measured alike",
    "labels.store": "make a sweep for each store",
}
"""Settings, or sections, that no sweep varies -> why, or what does."""
_OF_EXPERTS = {*(f"adapter.{name}" for name in EXPERTS), "training.load_balance"}


@dataclass(frozen=True, slots=True)
class Variation:
    """One row of a sweep."""

    title: str
    change: tuple[str, ...]
    """Overrides, after those of the whole sweep."""


def variations(vary: Sequence[str]) -> list[Variation]:
    """The baseline, then all combinations of `NAME=VALUE,VALUE,...`, the last of them fastest.

    Raises ConfigError for a text that is no such thing, or a setting that a sweep does not vary.
    """
    values: dict[str, list[str]] = {}
    for text in vary:
        key, equals, listed = text.partition("=")
        chosen = [value.strip() for value in listed.split(",")]
        if not equals or not key or not all(chosen):
            raise ConfigError(f"--vary {text}: expected NAME=VALUE,VALUE,..., such as alignment.weight=0.03,0.1,0.3")
        if reason := _NOT_VARIED.get(key) or _NOT_VARIED.get(key.partition(".")[0]):
            raise ConfigError(f"--vary {text}: {key} is not varied: {reason}")
        if key in values:
            raise ConfigError(f"--vary {text}: {key} is given twice; write all its values behind one")
        values[key] = list(dict.fromkeys(chosen))
    if not values:
        raise ConfigError("--vary: expected at least one setting with its values, such as alignment.weight=0.03,0.1")
    changes = [
        tuple(f"{key}={value}" for key, value in zip(values, chosen, strict=True))
        for chosen in product(*values.values())
    ]
    baseline = Variation(BASELINE, ("adapter.kind=lora", "labels.source=none"))
    return [baseline, *(Variation(", ".join(change), change) for change in changes)]


def settings_of(variation: Variation, config: Path | None, overrides: Sequence[str], seed: int, out: Path) -> RunConfig:
    """What a row is trained and answered with: the answered questions are those of `data.validation`.

    Attention is measured over the same heads and rows in all, those of the sweep's own settings. Raises ConfigError for
    settings that do not fit each other.
    """
    shared = [*overrides, f"training.seed={seed}", f"output={out}"]
    settings = training_settings(config, [*shared, *variation.change])
    data = settings.data
    return replace(
        settings,
        # A training that measures itself on the way (`training.eval_steps`) does so on the same rows.
        data=replace(data, validation=data.validation if settings.training.eval_steps else None, test=data.validation),
        evaluation=training_settings(config, shared).active_evaluation,
    )


def check_sweep(
    rows: Sequence[Variation], config: Path | None, overrides: Sequence[str], out: Path, scores: Sequence[str]
) -> None:
    """Raises what the first training, evaluation or table would raise."""
    unknown = [score for score in scores if score != ANSWER and score not in METRICS]
    if unknown:
        known = ", ".join((ANSWER, *METRICS))
        raise ConfigError(f"--score {unknown[0]}: expected one of {known}")
    chosen = [settings_of(row, config, overrides, 0, out / "runs" / "new") for row in rows]
    _check_differences(rows[1:], chosen[1:])
    _check_validation(training_settings(config, overrides).data)
    for settings in chosen:
        check_train(settings)


def _check_differences(rows: Sequence[Variation], chosen: Sequence[RunConfig]) -> None:
    """Raises what would be trained twice under two names: rows that are equal would look like a finding."""
    for position, settings in enumerate(chosen):
        if settings in chosen[:position]:
            twin = rows[chosen.index(settings)].title
            raise ConfigError(f"--vary: {rows[position].title} is the same as {twin}; leave one out")
    for key in (change.partition("=")[0] for change in rows[0].change):
        reasons = [_idle(key, settings) for settings in chosen]
        if all(reasons):
            raise ConfigError(f"--vary {key}: changes nothing, because {reasons[0]}")


def _idle(key: str, settings: RunConfig) -> str | None:
    """Why a setting changes nothing that is learnt, as far as that is a matter of other settings."""
    source, kind = settings.labels.source, settings.adapter.kind
    if key in _OF_EXPERTS and kind == "lora":
        return f"adapter.kind is {kind}, which has no experts"
    if key.startswith("alignment.") and source == "none":
        return f"labels.source is {source}, so nothing is aligned"
    if key.startswith("alignment.") and key != "alignment.weight" and settings.alignment.weight == 0:
        return "alignment.weight is 0, so nothing is aligned"
    if key.startswith("labels.") and key != "labels.source" and source != "weak":
        return f"labels.source is {source}, so no labels are used"
    return None


def _check_validation(data: DataConfig) -> None:
    """Raises what is wrong with rows to choose by."""
    if data.validation is None:
        raise ConfigError(
            "data.validation: expected a file of rows, got none; a sweep chooses on rows that are neither learnt from "
            "nor kept for the test: add data.validation=FILE.jsonl"
        )
    check_split(data, "validation")
    for split in ("train", "test"):
        other = getattr(data, split)
        if other is not None and _same(data.validation, other):
            raise ConfigError(f"data.validation: {data.validation} holds the rows of data.{split}; give others")


def _same(first: Path, second: Path) -> bool:
    if first.resolve() == second.resolve():
        return True
    return first.is_file() and second.is_file() and file_hash(first) == file_hash(second)
