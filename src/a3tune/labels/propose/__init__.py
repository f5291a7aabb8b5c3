"""Image -> candidate segments (S* in section 4.1). Knows pixels, not questions.

A new proposer is one class with the members of `Proposer`, best on top of `Filters`, and one line in `PROPOSERS`.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

from a3tune.errors import ConfigError
from a3tune.labels.propose.filters import Filters
from a3tune.machine.registry import Registry
from a3tune.models import read_config
from a3tune.types import Segment

__all__ = ["PROPOSERS", "Filters", "Proposer", "check_proposer", "check_segmenter", "default_settings", "make_proposer"]


class Proposer(Protocol):
    """Finds the segments of an image that a question could be about."""

    name: ClassVar[str]
    """Key in `PROPOSERS`."""

    def settings(self) -> Mapping[str, object]:
        """Everything the segments depend on, as JSON values: the label store runs an image again when it changes."""
        ...

    def __call__(self, image: Image.Image) -> list[Segment]:
        """Segments of an RGB image in its own pixels, best score first; the same image gives the same segments."""
        ...


_HERE = "a3tune.labels.propose"
PROPOSERS: Registry[Any] = Registry(
    {
        "superpixels": f"{_HERE}.superpixels:Superpixels",
        "regions": f"{_HERE}.regions:Regions",
        "sam": f"{_HERE}.sam:Sam",
        "medsam": f"{_HERE}.boxes:MedSam",
        "litemedsam": f"{_HERE}.boxes:LiteMedSam",
    }
)
"""Name -> class of a proposer: a dataclass of its settings, with `weights` and `device` where it has a model."""


HAVE_MODELS = {"superpixels": False, "regions": False, "sam": True, "medsam": True, "litemedsam": False}
"""Which of ours take `weights`, told before they are imported."""


def check_proposer(name: str, weights: Path | str | None) -> None:
    """Raises ConfigError for a name that is not known, and for weights that are missing or useless.

    `weights`: a folder, or a name of the Hugging Face Hub; neither is looked for.
    """
    if name not in PROPOSERS:
        raise ConfigError(f"proposer: expected one of {', '.join(PROPOSERS)}, got {name!r}")
    if name in HAVE_MODELS:
        _check_given(name, HAVE_MODELS[name], weights)


def check_segmenter(name: str, weights: Path) -> None:
    """Raises ModelError for a folder that holds no model of a proposer; of one of others, that is not there."""
    if HAVE_MODELS.get(name) or not weights.exists():
        read_config(weights)


def _check_given(name: str, has_model: bool, weights: Path | str | None) -> None:
    if has_model and weights is None:
        raise ConfigError(f"{name}: expected the folder of its model, got none")
    if weights is not None and not has_model:
        raise ConfigError(f"{name}: needs no weights, got {weights}")


def default_settings(name: str) -> dict[str, Any]:
    """A proposer's own numbers where nobody gives others; empty for a name that is not known here."""
    if name not in PROPOSERS:
        return {}
    return {field.name: field.default for field in fields(PROPOSERS[name]) if isinstance(field.default, int | float)}


def make_proposer(
    name: str, weights: Path | None = None, settings: Mapping[str, object] | None = None, device: str | None = None
) -> Proposer:
    """A proposer by its name.

    Args:
        name: key of `PROPOSERS`.
        weights: folder of its model, for those that need one.
        settings: any of its numbers by name; the rest keep their defaults.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.

    Raises:
        ConfigError: the name or a setting is not known, a setting is out of range, or weights are missing or useless.
        ModelError: the folder holds no such model, or an optional package is missing.
    """
    check_proposer(name, weights)
    takes = {field.name for field in fields(PROPOSERS[name])}
    arguments: dict[str, Any] = dict(settings or {})
    known = sorted(takes - {"weights", "device"})
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigError(f"{name}: no such setting: {', '.join(unknown)}; expected some of {', '.join(known)}")
    if "device" in takes:
        arguments["device"] = device
    _check_given(name, "weights" in takes, weights)
    if "weights" in takes:
        arguments["weights"] = weights
    return PROPOSERS[name](**arguments)
