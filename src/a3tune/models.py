"""Model folders as transformers saves them: what kind they are, their weights, a name for their content."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from a3tune.errors import ModelError

_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model")
_SHOWN = 5
"""Missing weights that an error names."""


def shipped(name: str) -> Path:
    """Folder of a model shipped in the package: `vlm` or `ranker`."""
    return Path(str(files("a3tune") / "assets" / name))


def choose_device(device: str | None) -> torch.device:
    """Where a model goes: `device`, or for None and "auto" the first of cuda, mps and cpu that is there.

    Raises:
        ModelError: this machine has no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device in (None, "auto"):
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there.get(device.partition(":")[0]):
        available = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ModelError(f"device {device!r} is not there; this machine has: {available}.")
    return torch.device(device)


def read_pickled(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Tensors that are published as a pickled file only: nothing but tensors is read, and no code is run.

    Raises what torch raises on a damaged file.
    """
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)  # noqa: TID251


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: the folder or the file is missing, or it is no JSON object.
    """
    try:
        config = json.loads((folder / name).read_bytes())
    except OSError as error:
        raise ModelError(f"{folder}: expected the folder of a model with a {name}, found none") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / name}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / name}: expected a JSON object, got a {type(config).__name__}")
    return config


def load_model(kind: Any, folder: Path, **options: Any) -> Any:
    """A transformers model of class `kind` in fp32 from its folder's safetensors files, in evaluation mode.

    Raises:
        ModelError: the weights are missing, damaged, incomplete, or of another architecture.
    """
    try:
        model, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers raises what it likes on a damaged folder
        raise ModelError(f"{folder}: expected a {kind.__name__} with safetensors weights: {error}") from error
    check_complete(folder, found["missing_keys"], [])
    return model.eval()


def check_complete(folder: Path, missing: Any, unexpected: Any) -> None:
    """Weights that a model lacks would stay random, and those it does not know would be lost: both are refused.

    Raises:
        ModelError: naming them.
    """
    for what, keys in (("are missing", sorted(missing)), ("are unknown", sorted(unexpected))):
        if keys:
            shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
            raise ModelError(f"{folder}: {len(keys)} weights {what}: {shown}; get the complete, original checkpoint")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the model's own files: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _CONTENT:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
