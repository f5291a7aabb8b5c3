"""Settings and names of models as others may see them: without the folders of this machine."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from a3tune.config.settings import RunConfig

_MODELS = {"model.path", "labels.ranker"}
_PATHS = {"data.train", "data.validation", "data.test", "labels.store", "evaluation.weights"}


def public_settings(config: RunConfig) -> dict[str, str]:
    """Dotted setting -> value, fit for others' eyes: without paths, local models by the name of their folder."""
    shown: dict[str, str] = {}
    for section in fields(config):
        group = getattr(config, section.name)
        if isinstance(group, Path):
            continue
        for setting in fields(group):
            value = getattr(group, setting.name)
            key = f"{section.name}.{setting.name}"
            if isinstance(value, Path) or key in _PATHS:
                continue
            shown[key] = public_name(value) if key in _MODELS else _plain(value)
    return shown


def public_name(model: str) -> str:
    """A model's name on the Hub as it is; of a local folder the last part only."""
    return model if is_hub_name(model) else Path(model).name or "local folder"


def is_hub_name(model: str) -> bool:
    """Whether this reads as `owner/name` of the Hugging Face Hub, perhaps with `@revision`, rather than a local folder
    or `tiny`."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(@\w[\w./-]*)?", model) is not None and not Path(model).exists()


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
