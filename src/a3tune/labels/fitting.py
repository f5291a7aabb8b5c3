"""Which labels of a store a run means: what a user said, against what labels were made with. Makes no labels."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from a3tune.config import LabelsConfig
from a3tune.config.settings import LABEL_MAKING
from a3tune.errors import LabelError
from a3tune.labels.fetch import model_folder, pinned
from a3tune.labels.propose import default_settings
from a3tune.labels.stored import StoredSettings, none_found, stored_settings
from a3tune.machine import hub
from a3tune.models import folder_hash


def fitting_settings(
    folder: Path, labels: LabelsConfig, said: Collection[str] = LABEL_MAKING, *, by_name: bool = False
) -> StoredSettings:
    """The settings of a store's labels that do not contradict what was said.

    Args:
        labels: settings of a run; of `LABEL_MAKING` those in `said` count, the others are defaults that nobody chose.
        by_name: take a model for the one that labels were made with if it is called so: for settings that were adopted
            from this very store, whose model may have changed or gone since.

    Raises:
        LabelError: the folder holds no labels, none that fit, or several that do.
    """
    stored = stored_settings(folder)
    if not stored:
        raise none_found(folder)
    contradictions = [list(_contradictions(settings, labels, said, by_name)) for settings in stored]
    fitting = [settings for settings, against in zip(stored, contradictions, strict=True) if not against]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        nearest = min(contradictions, key=len)
        raise LabelError(
            f"{folder}: holds no labels of these settings: {'; '.join(nearest)}. Label with them, or leave out what "
            "differs to take the labels as they are"
        )
    raise LabelError(
        f"{folder}: holds labels of {len(fitting)} settings, say which: {' or '.join(_differences(fitting))}"
    )


def adopt(folder: Path, labels: LabelsConfig, said: Collection[str]) -> LabelsConfig:
    """The settings of a run with those that the labels in its store were made with, where the user said nothing.

    Raises what `fitting_settings` raises.
    """
    made = _made_with(fitting_settings(folder, labels, said))
    taken = {name: value for name, value in made.items() if name not in said}
    if taken.get("weights") is not None:
        taken["weights"] = Path(taken["weights"])
    return replace(labels, **taken)


def _made_with(stored: StoredSettings) -> dict[str, Any]:
    """Settings of `LABEL_MAKING`, as they were given; as far as they can be told of labels made in Python."""
    proposer = stored.settings["proposer"]
    defaults = default_settings(proposer.get("name", ""))
    proposal = {name: proposer[name] for name, value in defaults.items() if proposer.get(name, value) != value}
    known = {"proposer": proposer.get("name"), "proposal": proposal} if defaults else {}
    known |= {"visual_prompt": stored.settings["visual_prompt"], "query": stored.query}
    return known | {name: value for name, value in stored.given.items() if name in LABEL_MAKING}


def _contradictions(
    stored: StoredSettings, labels: LabelsConfig, said: Collection[str], by_name: bool
) -> Iterator[str]:
    """What was said and is not so, in words."""
    proposer, ranker = stored.settings["proposer"], stored.settings["ranker"]
    plain = {"proposer": proposer.get("name"), "visual_prompt": stored.settings["visual_prompt"], "query": stored.query}
    for name, made in plain.items():
        if name in said and getattr(labels, name) != made:
            yield f"labels.{name} is {getattr(labels, name)}, theirs were made with {made}"
    if "proposal" in said:
        # A number that is left out is the proposer's own: what counts is the value, not who wrote it down.
        numbers = default_settings(labels.proposer) | labels.proposal
        for name, value in numbers.items():
            if (name in proposer and proposer[name] != value) or (name not in proposer and name in labels.proposal):
                yield f"labels.proposal {name} is {value}, theirs were made with {proposer.get(name)}"
    contents = {"weights": proposer.get("weights"), "ranker": ranker.get("content")}
    for name, content in contents.items():
        model, given = getattr(labels, name), stored.given.get(name)
        named_alike = by_name and str(model) == str(given)
        if name in said and not named_alike and not _same(model, given, content):
            yield f"labels.{name} is {model}, which is not the model that theirs were made with" + (
                f" ({given})" if given else ""
            )


def _same(model: str | Path | None, given: str | None, content: str | None) -> bool:
    """Whether a model is the one that labels were made with: by its commit or content, or by its name where it is not
    here. Asks nobody."""
    if model is None or content is None:
        return given is None or content is None
    folder = model_folder(model, download=False)
    if folder.is_dir():
        commit = hub.named(str(model), "model") and pinned(model)  # stays as it is; a folder may have changed
        return (commit is not None and commit == given) or folder_hash(folder) == content
    return given is not None and str(model) in (given, given.partition("@")[0])


def _differences(stored: list[StoredSettings]) -> list[str]:
    """For each of some settings the overrides that choose it."""
    rows = [
        {name: settings.given.get(name) for name in LABEL_MAKING}
        | {"visual_prompt": settings.settings["visual_prompt"], "query": settings.query}
        for settings in stored
    ]
    differing = [name for name in LABEL_MAKING if len({str(row[name]) for row in rows}) > 1]
    return [" ".join(f"labels.{name}={_written(row[name])}" for name in differing) for row in rows]


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "'{" + ", ".join(f"{name}: {item}" for name, item in value.items()) + "}'"
    return f"'{value}'" if " " in str(value) or "{" in str(value) else str(value)
