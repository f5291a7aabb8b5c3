"""Folders of models and adapters: what kind they are, their weights, a name for their content.

Knows the layouts of transformers and PEFT; torch is imported only where weights are loaded.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune import bases
from a3tune.claims import check_claims, check_header, check_shape
from a3tune.errors import AdapterError, ModelError, in_short, shown
from a3tune.machine.digests import DIGESTS, check_digests, check_present
from a3tune.machine.hashes import HASHING_THREADS, file_hashes, json_hash
from a3tune.machine.hub import named

if TYPE_CHECKING:
    import torch

A3MOE, LORA = "A3MOE", "LORA"
"""What the settings of an adapter that we load say as `peft_type`."""
_ADAPTER_SETTINGS = frozenset(
    {
        "peft_type",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "fan_in_fan_out",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
        "expert_rank",
        "expert_alpha",
        "query_experts",
        "key_experts",
        "top_experts",
        "router_hidden",
        "key_text_tokens",
        "balance",
        "control_ids",
        "layout_ids",
        "base",
    }
)
"""Of an adapter's settings those that may say something; `megatron_core` counts only with `megatron_config`."""
MAKE_AGAIN = f"make the model again; if you changed it yourself, delete {DIGESTS}"
"""What to do with a model's folder that is not as it was written."""
_ANEW = f"copy the adapter anew; if you changed it yourself, delete {DIGESTS}."
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model")
"""Endings of what segmenters and rankers read."""
_BASE = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of what `vlm.load_vlm` reads."""
_NOT_CONTENT = ("base_model_name_or_path", "inference_mode", "peft_version")
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
        own, of_run = (place / "adapter_config.json" for place in (folder, folder / "adapter"))
        if name == "config.json" and (own.is_file() or of_run.is_file()):
            raise ModelError(
                f"{folder}: expected the folder of a model, got an adapter; name it as the adapter, its base finds "
                "itself: a3tune.load(adapter=FOLDER), --adapter FOLDER"
            ) from error
        raise ModelError(f"{folder}: expected the folder of a model with a {name}, found none") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / name}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / name}: expected a JSON object, got a {type(config).__name__}")
    return config


def check_model(name: str) -> None:
    """What can be told of a model before anything slow is imported, or the Hugging Face Hub is asked.

    Raises:
        ModelError: it can only be a folder, and there is none, or the folder lacks a file, holds no model, or one to
            convert first.
    """
    folder = base_folder(name)
    if folder is not None:
        check_format(name, read_config(folder))
        check_present(folder, ModelError, MAKE_AGAIN)
    elif named(name, "model") is None:
        raise ModelError(
            f"model {name}: expected 'tiny', or a folder or Hub name (owner/model, owner/model@revision); there is no "
            "such folder"
        )


def check_format(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError, which tells how to convert it, for a checkpoint in the format of the original LLaVA code."""
    kind = str(config.get("model_type"))
    # One flat configuration: that of the language model, with the vision tower's settings among its own.
    if kind.startswith("llava") and "text_config" not in config and "hidden_size" in config:
        out = "models/" + Path(name.partition("@")[0]).name
        raise ModelError(
            f"model {name}: a {kind!r} of the original LLaVA code, which is to be converted once: `a3tune convert "
            f"{shlex.quote(name)} --out {shlex.quote(out)}`, then model.path={out}"
        )


def check_at_hand(name: str, where: Path) -> None:
    """A base model that settings beside an adapter name, read from `where`: nobody has asked for a download of it.

    Raises:
        ModelError: as `check_model`; or it is a name on the Hugging Face Hub, and not whole in the cache here.
    """
    check_model(name)
    if base_folder(name) is None:
        raise ModelError(
            f"{where}: names the base model {shown(name, 200)}, which is not on this machine, and nothing is "
            "downloaded because a file says so. If you want it from the Hugging Face Hub, say so: model.path=NAME "
            "(--model NAME with merge)"
        )


def base_folder(name: str) -> Path | None:
    """Folder of a base model: shipped (`tiny`), one's own, or of the cache of the Hugging Face Hub, if it is whole."""
    if name == "tiny":
        return shipped("vlm")
    return Path(name) if Path(name).is_dir() else bases.cached(name)


def head_total(name: str) -> int | None:
    """How many attention heads the language model of a model has, all layers together; None where its folder does not
    say: what is left out of config.json is as its family has it."""
    folder = base_folder(name)
    text = read_config(folder).get("text_config") if folder else None
    if not isinstance(text, dict):
        return None
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    return layers * heads if isinstance(layers, int) and isinstance(heads, int) else None


def read_adapter(folder: Path) -> dict[str, Any]:
    """The settings of the A3MoE or LoRA adapter in `folder`; its weights are only looked for.

    Raises:
        AdapterError: it holds no such adapter, or no weights that can be read without running code, or its settings are
            not those that were saved.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder}: expected an adapter folder with adapter_config.json, found none. Check the path."
        )
    check_digests(folder, AdapterError, _ANEW, (path.name,))  # what damage left is nobody's settings
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
    for name, value in settings.items():
        if name not in _ADAPTER_SETTINGS and _says_something(value):
            raise AdapterError(
                f"{path}: {shown(name)}: expected it empty, as a3tune and plain LoRA have it; other ways to adapt may "
                "read files, import modules or change the base model. Use PEFT to load it."
            )
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise AdapterError(
            f"{path}: init_lora_weights: expected true, false, gaussian or orthogonal, got "
            f"{shown(settings['init_lora_weights'])}: others change the base model. Use PEFT to load it."
        )
    if not adapter_weights(folder).is_file():
        there = ". Copy the adapter anew."
        if (folder / "adapter_model.bin").exists():
            there = ", only adapter_model.bin, which can run code when read. Save it with safe_serialization."
        raise AdapterError(f"{folder}: expected adapter_model.safetensors, found none{there}")
    try:
        check_header(adapter_weights(folder))
    except ModelError as error:
        raise AdapterError(str(error)) from None
    return settings


def _says_something(value: Any) -> bool:
    """Whether a setting of PEFT turns something on; some are objects whose own settings are all off."""
    return any(map(_says_something, value.values())) if isinstance(value, dict) else bool(value)


def check_adapter(folder: Path) -> dict[str, Any]:
    """As `read_adapter`; and settings and weights are those that were saved, as far as `DIGESTS` lies beside them.

    Raises:
        AdapterError: it holds no such adapter, or a file of it is damaged.
    """
    settings = read_adapter(folder)
    check_digests(folder, AdapterError, _ANEW, (adapter_weights(folder).name,))
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

    check_claims(folder)
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
    for name, content in _files(folder, _CONTENT).items():
        digest.update(name.encode() + bytes.fromhex(content))
    return digest.hexdigest()


def base_hashes(name: str) -> dict[str, str]:
    """The files that `vlm.load_vlm` reads of a model, by their content: name -> SHA-256.

    Empty for a name on the Hugging Face Hub that was not loaded here before.
    """
    folder = base_folder(name)
    return _files(folder, _BASE) if folder else {}


def weights_hash(model: Any) -> str:
    """SHA-256 over all weights of a model in memory, every value, and over the settings of its adapters."""
    tensors = model.state_dict()
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = pool.map(_tensor_hash, tensors.values())
        adapters = {name: _settings(config) for name, config in getattr(model, "peft_config", {}).items()}
        return json_hash([dict(zip(tensors, digests, strict=True)), adapters])


def _settings(adapter: Any) -> dict[str, str]:
    """Of an adapter; not where its base was, nor whether it may be trained."""
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in adapter.to_dict().items()}
    return {name: str(value) for name, value in settings.items() if name not in _NOT_CONTENT}


def _tensor_hash(tensor: Any) -> list[Any]:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return [str(tensor)]
    about = [str(tensor.dtype), list(tensor.shape)]
    if tensor.is_meta:  # offloaded to the disk or the memory: the files that it comes from are hashed
        return about
    values = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
    return [*about, hashlib.sha256(values.data).hexdigest()]


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, str]:
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    return {path.name: digest for path, digest in file_hashes(paths).items()}
