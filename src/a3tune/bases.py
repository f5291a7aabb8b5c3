"""Base models that a user names on the Hugging Face Hub -> folders of this machine. Knows which files a model has.

What is read of a model is fetched: its weights as safetensors, and what describes it. Code of a repository never is.
"""

import json
import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from a3tune.errors import ModelError
from a3tune.machine import hub

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_BESIDE = (".json", ".txt", ".model", ".jinja")
"""Endings of configuration, tokenizer, templates and indices of shards."""


def cached(name: str) -> Path | None:
    """Folder of `owner/name` or `owner/name@revision` in the cache of the Hub on this machine; asks nobody.

    None unless all its weights are there: where the cache does not say what belongs to it, its index does.
    """
    repository = hub.named(name, "model")
    found = repository and hub.cached(repository, _whole)
    return found.folder if found and (found.whole or _has_all_shards(found.folder)) else None


def fetch(name: str, *, weights: bool = True, pickled: bool = False) -> Path:
    """As `cached`, and downloaded where it is not there.

    Args:
        name: a name that the user gave.
        weights: with them; else what describes the model only, a few megabytes.
        pickled: take `pytorch_model.bin` of one without safetensors, for those who read nothing but its tensors.

    Raises:
        ModelError: there is no such model, it cannot be reached, or it has no weights that are read here.
    """
    repository = hub.named(name, "model")
    if repository is None:
        raise ModelError(f"model {name}: expected a name of the Hugging Face Hub, owner/name or owner/name@revision")
    choose = (_published if pickled else _whole) if weights else _described
    return cached(name) or hub.fetch(repository, choose, ModelError).folder


def pinned(name: str) -> str:
    """A name with the commit that is in the cache, if it is one of the Hub and there; else as it is."""
    folder = cached(name)
    return name if folder is None else hub.pinned(name, "model", folder)


def hub_name(name: str) -> str | None:
    """`pinned`, if it is a name of the Hub."""
    return None if hub.named(name, "model") is None else pinned(name)


def _described(files: Sequence[str]) -> list[str]:
    if "config.json" not in files:
        raise ValueError("expected a model with a config.json, it has none; look for the right name on its page")
    return [escape(name) for name in files if "/" not in name and name.endswith(_BESIDE)]


def _whole(files: Sequence[str]) -> list[str]:
    weights = [name for name in files if _WEIGHTS.fullmatch(name)]
    if not weights:
        others = ", ".join(name for name in files if name.endswith((".bin", ".pth", ".pt", ".safetensors"))) or "none"
        raise ValueError(
            f"expected model.safetensors, or shards of it, it has these weights: {others:.150}; other forms can run "
            "code when they are read. Name a revision that has them (owner/name@refs/pr/1), or convert a copy"
        )
    return [*_described(files), *map(escape, weights)]


def _published(files: Sequence[str]) -> list[str]:
    if not any(_WEIGHTS.fullmatch(name) for name in files) and (found := list(filter(_PICKLED.fullmatch, files))):
        return [*_described(files), *map(escape, found)]
    return _whole(files)


def _has_all_shards(folder: Path) -> bool:
    try:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    except FileNotFoundError:
        shards = {"model.safetensors"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)
