"""Models that find and rank segments, as settings name them -> folders of this machine."""

import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from a3tune.errors import ModelError
from a3tune.labels.rank.kinds import BIOMEDCLIP_CONFIG, BIOMEDCLIP_WEIGHTS, SHIPPED
from a3tune.machine import hub
from a3tune.models import shipped

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_BESIDE = (".json", ".txt", ".model")


def model_folder(name: str | Path, *, download: bool = True) -> Path:
    """The folder of `labels.weights` or `labels.ranker`.

    `owner/name` and `owner/name@revision` (a branch, tag or commit) are models of the Hugging Face Hub: read in its
    cache, and downloaded where that lacks them. Everything else is a path, whether or not it is there. Without
    `download` a model that is not here is a path, too.

    Raises:
        ModelError: it cannot be downloaded, or has no weights that are read here.
    """
    if name == SHIPPED:
        return shipped("ranker")
    repository = hub.named(str(name), "model")
    if repository is None:
        return Path(name)
    found = hub.fetch(repository, _wanted, ModelError) if download else hub.cached(repository, _wanted)
    return found.folder if found else Path(name)


def pinned(name: str | Path) -> str:
    """The name of a model with its commit, if it is one of the Hub and here; else as it is."""
    return hub.pinned(str(name), "model", model_folder(name, download=False))


def _wanted(files: Sequence[str]) -> list[str]:
    """Patterns of the files that are read, of those of a repository; ValueError without weights."""
    if BIOMEDCLIP_CONFIG in files:
        weights = [name for name in BIOMEDCLIP_WEIGHTS if name in files][:1]
        wanted = f"{BIOMEDCLIP_CONFIG} and {' or '.join(BIOMEDCLIP_WEIGHTS)}"
    else:
        weights = [name for name in files if _WEIGHTS.fullmatch(name)]
        wanted = "model.safetensors"
    if not weights:
        others = ", ".join(name for name in files if name.endswith((".bin", ".pth", ".pt", ".safetensors"))) or "none"
        raise ValueError(
            f"expected {wanted} in it, it has these weights: {others:.150}; other forms can run code when they are "
            "read. Name a revision that has them (owner/name@refs/pr/1), or convert a copy"
        )
    beside = [name for name in files if "/" not in name and name.endswith(_BESIDE)]
    return [escape(name) for name in (*weights, *beside)]
