"""Image -> candidate segments (S* in section 4.1). Knows pixels, not questions.

A new proposer is one class with the members of `Proposer`, best on top of `Filters`, and one line in `PROPOSERS`.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

from a3tune.errors import ConfigError
from a3tune.labels.propose.boxes import LiteMedSam, MedSam
from a3tune.labels.propose.filters import Filters
from a3tune.labels.propose.sam import Sam
from a3tune.labels.propose.superpixels import Superpixels
from a3tune.types import Segment

__all__ = ["PROPOSERS", "Filters", "LiteMedSam", "MedSam", "Proposer", "Sam", "Superpixels", "make_proposer"]


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


PROPOSERS: dict[str, Any] = {proposer.name: proposer for proposer in (Superpixels, Sam, MedSam, LiteMedSam)}
"""Name -> class of a proposer: a dataclass of its settings, with `weights` and `device` where it has a model."""


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
    if name not in PROPOSERS:
        raise ConfigError(f"proposer: expected one of {', '.join(PROPOSERS)}, got {name!r}")
    takes = {field.name for field in fields(PROPOSERS[name])}
    arguments: dict[str, Any] = dict(settings or {})
    known = sorted(takes - {"weights", "device"})
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigError(f"{name}: no such setting: {', '.join(unknown)}; expected some of {', '.join(known)}")
    if "device" in takes:
        arguments["device"] = device
    if "weights" in takes:
        if weights is None:
            raise ConfigError(f"{name}: expected the folder of its model, got none")
        arguments["weights"] = weights
    elif weights is not None:
        raise ConfigError(f"{name}: needs no weights, got {weights}")
    return PROPOSERS[name](**arguments)
