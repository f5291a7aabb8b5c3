"""Whose settings hold: what the user says, over those of the run or the label store that a command builds on.

Light: told before anything slow is imported.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from a3tune.config import RunConfig, given_settings, load_config
from a3tune.config.settings import LABEL_MAKING
from a3tune.run.folder import RunFolder

Model = tuple[Path | None, RunConfig]
"""An adapter, or None for the base model alone, and its settings."""


def training_settings(config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """Settings of a training.

    What the user does not say of the labels is as in the run in the output folder, if there is one, else as the labels
    in the store were made.
    """
    settings = load_config(config, overrides)
    if settings.labels.source != "weak" or not settings.label_store.is_dir():
        return settings
    given = given_settings(config, overrides)
    said = {key.removeprefix("labels.") for key in given if key.startswith("labels.")}
    begun = RunFolder(settings.output).config
    if begun.is_file():
        earlier = load_config(begun).labels
        kept = {name: getattr(earlier, name) for name in LABEL_MAKING if name not in said}
        return replace(settings, labels=replace(settings.labels, **kept))
    from a3tune.labels.fitting import adopt  # knows proposers and rankers: only where there is a store

    return replace(settings, labels=adopt(settings.label_store, settings.labels, said))


def model_settings(
    adapter: Path | None, config: Path | None, overrides: Sequence[str], say: Callable[[str], None]
) -> Model:
    """A model to ask, with the settings of `config`, else those that its adapter was trained with, else the defaults.

    Settings beside an adapter may be a stranger's: of them no folder is taken that programs are started from.
    """
    if adapter is None or config is not None:
        return adapter, load_config(config, overrides)
    trained_with = _settings_beside(adapter)
    if trained_with is None and adapter.is_dir():
        say(f"{adapter}: has no config.yaml of its run beside it: the default settings hold, model.path among them")
    settings = load_config(trained_with, overrides)
    if settings.evaluation.weights and "evaluation.weights" not in given_settings(None, overrides):
        say(f"{trained_with}: evaluation.weights is left out, since programs are started from it; give it yourself")
        settings = replace(settings, evaluation=replace(settings.evaluation, weights={}))
    return adapter, settings


def measured_alike(models: Sequence[Model], given: Collection[str]) -> list[Model]:
    """A base model beside adapters is measured over the heads and rows that the first of them was trained on."""
    trained = next((settings for adapter, settings in models if adapter is not None), None)
    if trained is None or {"alignment.heads", "alignment.rows"} & set(given):
        return list(models)
    return [
        (adapter, settings if adapter is not None else replace(settings, alignment=trained.alignment))
        for adapter, settings in models
    ]


def _settings_beside(adapter: Path) -> Path | None:
    """The settings of the run that an adapter, or a checkpoint of it, lies in; a link is followed."""
    place = adapter.resolve()
    runs = [place.parent, *([place.parents[1]] if place.parent.name == "checkpoints" else [])]
    return next((RunFolder(run).config for run in runs if RunFolder(run).config.is_file()), None)
