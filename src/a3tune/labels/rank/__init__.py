"""Segments and prompts -> cosine similarity, top-K (Eq. 3). Knows CLIP-style models, no VLM.

A new visual prompt is a function and a line in `VISUAL_PROMPTS`; a new ranker is a class with the members of `Ranker`
and a line in `RANKERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image

from a3tune.errors import ConfigError, ModelError
from a3tune.labels.rank.choose import top_k
from a3tune.labels.rank.kinds import BIOMEDCLIP_CONFIG, CLIP_TYPES
from a3tune.labels.rank.query import format_query
from a3tune.labels.rank.visual import VISUAL_PROMPTS, show_each
from a3tune.machine.registry import Registry

__all__ = [
    "RANKERS",
    "VISUAL_PROMPTS",
    "Ranker",
    "check_ranker",
    "check_visual_prompt",
    "format_query",
    "make_ranker",
    "show_each",
    "top_k",
]


class Ranker(Protocol):
    """Embeds images and texts in one space, where a segment is near to the prompts that mean it."""

    name: ClassVar[str]

    def settings(self) -> Mapping[str, object]:
        """Everything the embeddings depend on, as JSON values: the label store ranks again when it changes."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors float32 [M, E] of RGB images of any sizes; M may be 0."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [P, E] of texts."""
        ...


RANKERS: Registry[Callable[[Path, str | None], Ranker]] = Registry(
    {
        "config.json": "a3tune.labels.rank.clip:ClipRanker",
        BIOMEDCLIP_CONFIG: "a3tune.labels.rank.biomedclip:BiomedClipRanker",
    }
)
"""File that gives a kind of ranker away -> class of the ranker of (folder, device); what was added last is looked for
first, since most folders of models also have a config.json."""


def check_ranker(folder: Path) -> str:
    """The file in a local folder, of those of `RANKERS`, that gives its kind of ranker away. Loads nothing.

    Raises:
        ModelError: the folder holds no ranker that is known.
    """
    for file in reversed(list(RANKERS)):
        if (folder / file).is_file():
            return file
    raise ModelError(
        f"{folder}: expected the folder of a ranker, with {BIOMEDCLIP_CONFIG} (BiomedCLIP) or config.json "
        f"(model_type {', '.join(CLIP_TYPES)}); found neither"
    )


def check_visual_prompt(name: str) -> None:
    """Raises ConfigError when there is no such visual prompt."""
    if name not in VISUAL_PROMPTS:
        raise ConfigError(f"visual_prompt: expected one of {', '.join(VISUAL_PROMPTS)}, got {name!r}")


def make_ranker(folder: Path, device: str | None = None) -> Ranker:
    """The ranker in a local folder, of whatever kind its files say: BiomedCLIP, CLIP, SigLIP, SigLIP 2, MedSigLIP.

    Raises:
        ModelError: the folder holds no ranker that is known.
    """
    return RANKERS[check_ranker(folder)](folder, device)
