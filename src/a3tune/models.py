"""Folders of models and adapters: what kind they are, their weights, a name for their content.

Knows the layouts of transformers and PEFT; torch is imported only where weights are loaded.
"""

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.errors import AdapterError, ModelError

if TYPE_CHECKING:
    import torch

A3MOE, LORA = "A3MOE", "LORA"
"""What the settings of an adapter that we load say as `peft_type`."""
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHOWN = 5
"""Missing weights that an error names."""


def shipped(name: str) -> Path:
    """Folder of a model shipped in the package: `vlm` or `ranker`."""
    return Path(str(files("a3tune") / "assets" / name))


def choose_device(device: str | None) -> "torch.device":
    """Where a model goes: `device`, or for None and "auto" the first of cuda, mps and cpu that is there.

    Raises:
        ModelError: this machine has no such device.
    """
    import torch

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
    import torch

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


def check_model(name: str) -> None:
    """What can be told of a model before anything slow is imported, or the Hugging Face Hub is asked.

    Raises:
        ModelError: it can only be a folder, and there is none, or the folder holds no model.
    """
    if name == "tiny":
        return
    if Path(name).is_dir():
        read_config(Path(name))
    elif not _HUB_NAME.fullmatch(name) or Path(name).parent.is_dir():
        raise ModelError(
            f"model {name}: expected 'tiny', or a folder or Hub name (owner/model); there is no such folder"
        )


def head_total(name: str) -> int | None:
    """How many attention heads the language model of a model has, all layers together; None where its folder does not
    say: what is left out of config.json is as its family has it."""
    folder = shipped("vlm") if name == "tiny" else Path(name)
    text = read_config(folder).get("text_config") if folder.is_dir() else None
    if not isinstance(text, dict):
        return None
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    return layers * heads if isinstance(layers, int) and isinstance(heads, int) else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """The settings of the A3MoE or LoRA adapter in `folder`, as they stand there; its weights are only looked for.

    Raises:
        AdapterError: it holds no such adapter, or no weights that can be read without running code.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder}: expected an adapter folder with adapter_config.json, found none. Check the path."
        )
    try:
        settings = json.loads(path.read_text())
        peft_type = settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"{path}: expected a JSON object, got something else ({error}). Copy the adapter anew."
        ) from error
    if peft_type not in (A3MOE, LORA):
        raise AdapterError(
            f"{path}: expected an adapter of type {A3MOE} or {LORA}, got {peft_type!r}. Use PEFT to load it."
        )
    if not adapter_weights(folder).is_file():
        pickled = (
            ", only adapter_model.bin, which can run code when read" if (folder / "adapter_model.bin").exists() else ""
        )
        raise AdapterError(
            f"{folder}: expected adapter_model.safetensors, found none{pickled}. Save it with safe_serialization."
        )
    return settings


def adapter_weights(folder: Path) -> Path:
    """File of an adapter's weights."""
    return folder / "adapter_model.safetensors"


def load_model(kind: Any, folder: Path, **options: Any) -> Any:
    """A transformers model of class `kind` in fp32 from its folder's safetensors files, in evaluation mode.

    Raises:
        ModelError: the weights are missing, damaged, incomplete, or of another architecture.
    """
    import torch

    try:
        model, loading = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers raises what it likes on a damaged folder
        raise ModelError(f"{folder}: expected a {kind.__name__} with safetensors weights: {error}") from error
    check_complete(folder, loading["missing_keys"], [])
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
