"""Folders of models and adapters: what kind they are, their weights, a name for their content.

Knows the layouts of transformers and PEFT; torch is imported only where weights are loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.errors import AdapterError, ModelError, in_short
from a3tune.machine.digests import DIGESTS, check_digests

if TYPE_CHECKING:
    import torch

A3MOE, LORA = "A3MOE", "LORA"
"""What the settings of an adapter that we load say as `peft_type`."""
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model")
_LARGEST = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 1000,
    "num_key_value_heads": 1000,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "vocab_size": 10**7,
    "image_size": 10**5,
    "patch_size": 10**4,
    "image_token_id": 10**9,
    "image_token_index": 10**9,
}
"""Fields of a model's configuration -> far beyond any model that there is."""
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
    """What can be told of a model before anything slow is imported. A name on the Hugging Face Hub may be anything.

    Raises:
        ModelError: it can only be a folder, and there is none, or the folder holds no model.
    """
    if name == "tiny":
        return
    if Path(name).is_dir():
        read_config(Path(name))
    elif Path(name).is_absolute() or name.count("/") > 1 or name.startswith((".", "~")):
        raise ModelError(
            f"model {name}: expected 'tiny', or a folder or Hugging Face Hub name; there is no such folder"
        )


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
            f"{path}: expected a JSON object, got something else ({in_short(error)}). Copy the adapter anew."
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


def check_shape(name: str, config: Mapping[str, Any]) -> None:
    """The counts and sizes of a model's configuration, at any depth: what it is built from before its weights are seen.

    Raises:
        ModelError: one is no whole number, or none that a model can have.
    """
    for field, value in config.items():
        if isinstance(value, Mapping):
            check_shape(name, value)
        elif field in _LARGEST and value is not None:
            for number in value if isinstance(value, list | tuple) else [value]:
                if type(number) is not int or not 1 <= number <= _LARGEST[field]:
                    raise ModelError(
                        f"{name}: config.json: {field}: expected an integer from 1 to {_LARGEST[field]:,}, "
                        f"got {str(value)[:80]!r}; get the complete, original checkpoint"
                    )


def check_adapter(folder: Path) -> dict[str, Any]:
    """As `read_adapter`; and settings and weights are those that were saved, as far as `DIGESTS` lies beside them.

    Raises:
        AdapterError: it holds no such adapter, or a file of it is damaged.
    """
    settings = read_adapter(folder)
    names = ("adapter_config.json", adapter_weights(folder).name)
    hint = f"copy the adapter anew; if you changed it yourself, delete {DIGESTS}."
    check_digests(folder, AdapterError, hint, names)
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

    check_shape(str(folder), read_config(folder))
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
        raise ModelError(f"{folder}: expected a {kind.__name__} with safetensors weights: {in_short(error)}") from error
    check_complete(folder, model.state_dict(), loading["missing_keys"], [])
    return model.eval()


def check_complete(folder: Path, weights: "Mapping[str, torch.Tensor]", missing: Any, unexpected: Any) -> None:
    """Weights that a model lacks would stay random, those it does not know would be lost, and some are no numbers.

    Raises:
        ModelError: naming them.
    """
    for what, keys in (("are missing", sorted(missing)), ("are unknown", sorted(unexpected))):
        if keys:
            shown = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
            raise ModelError(f"{folder}: {len(keys)} weights {what}: {shown}; get the complete, original checkpoint")
    try:
        check_finite(weights)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}; get the complete, original checkpoint") from error


def check_finite(tensors: "Mapping[str, torch.Tensor]") -> None:
    """Weights that are no numbers answer with nonsense. Costs one pass over their memory.

    Raises:
        ValueError: naming the first such tensor.
    """
    import torch

    for name, values in tensors.items():
        if values.is_meta or not values.is_floating_point() or not values.numel():
            continue
        if values.dtype.itemsize < torch.float16.itemsize:  # torch compares no 8 bits
            values = values.to(torch.float16)
        if not torch.stack(torch.aminmax(values)).isfinite().all():
            raise ValueError(f"{name} holds values that are no numbers")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the model's own files: names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _CONTENT:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
