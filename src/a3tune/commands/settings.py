"""Whose settings hold: what the user says, over those of the run or the label store that a command builds on.

Light: told before anything slow is imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from a3tune.config import Override, RunConfig, load_config, load_given
from a3tune.config.ranges import check_head_count
from a3tune.config.settings import LABEL_MAKING
from a3tune.models import check_at_hand, head_total
from a3tune.run.folder import RunFolder
from a3tune.run.neighbour import LEFT_OUT, taken_over

Model = tuple[Path | None, RunConfig]
"""An adapter, or None for the base model alone, and its settings."""


def label_settings(config: Path | None, overrides: Sequence[Override]) -> tuple[RunConfig, set[str]]:
    """Settings, and the names of those of labels that the user said."""
    settings, given = load_given(config, overrides)
    return settings, {key.removeprefix("labels.") for key in given if key.startswith("labels.")}


def training_settings(config: Path | None, overrides: Sequence[Override]) -> RunConfig:
    """Settings of a training.

    What the user does not say of the labels is as in the run in the output folder, if there is one, else as the labels
    in the store were made.
    """
    settings, said = label_settings(config, overrides)
    if settings.active_alignment.weight:
        check_head_count("alignment.heads", settings.alignment.heads, head_total(settings.model.path))
    if settings.labels.source != "weak" or not settings.label_store.is_dir():
        return settings
    begun = RunFolder(settings.output).config
    if begun.is_file():
        earlier = load_config(begun).labels
        kept = {name: getattr(earlier, name) for name in LABEL_MAKING if name not in said}
        return replace(settings, labels=replace(settings.labels, **kept))
    from a3tune.labels.fitting import adopt  # knows proposers and rankers: only where there is a store

    return replace(settings, labels=adopt(settings.label_store, settings.labels, said))


def model_settings(
    adapters: Sequence[Path | None],
    config: Path | None,
    overrides: Sequence[Override],
    say: Callable[[str], None],
    *,
    labels: bool = False,
) -> list[Model]:
    """Models to ask, with the settings of `config`, else those that each adapter was trained with, else the defaults.

    A base model beside adapters is measured over the heads and rows that the first of them was trained on. `labels`:
    whether the command makes labels.
    """
    models = _models(adapters, config, overrides, say, labels)
    for _, settings in models:
        check_head_count("evaluation.heads", settings.active_evaluation.heads, head_total(settings.model.path))
    return models


def _models(
    adapters: Sequence[Path | None],
    config: Path | None,
    overrides: Sequence[Override],
    say: Callable[[str], None],
    labels: bool,
) -> list[Model]:
    if config is not None:
        settings = load_config(config, overrides)
        return [(adapter, settings) for adapter in adapters]
    models = [(adapter, _trained_with(adapter, overrides, say, labels)) for adapter in adapters]
    trained = next((settings for adapter, settings in models if adapter is not None), None)
    if trained is None or {"alignment.heads", "alignment.rows"} & load_given(None, overrides)[1]:
        return models
    return [
        (adapter, settings if adapter is not None else replace(settings, alignment=trained.alignment))
        for adapter, settings in models
    ]


def _trained_with(
    adapter: Path | None, overrides: Sequence[Override], say: Callable[[str], None], labels: bool
) -> RunConfig:
    """Settings beside an adapter may be a stranger's: `run.neighbour` says which of them hold."""
    given, said = load_given(None, overrides)
    run = RunFolder.of_adapter(adapter) if adapter is not None else None
    if run is None:
        if adapter is not None and adapter.is_dir():
            say(f"{adapter}: has no config.yaml of its run beside it: the default settings hold, model.path among them")
        return given
    settings, left_out = taken_over(load_config(run.config, overrides), given, labels=labels)
    if left_out:
        say(f"{run.config}: {', '.join(left_out)} left out: {LEFT_OUT}")
    if "model.path" not in said:
        check_at_hand(settings.model.path, run.config)
    return settings
