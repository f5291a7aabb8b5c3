"""A plain LoRA adapter merged into its base: a whole model, which any program for models of transformers can serve.

Knows weights and files; not how the adapter was trained. Holds one copy of the model in memory, on the processor.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.bases import pinned
from a3tune.config import RunConfig
from a3tune.config.public import public_name
from a3tune.convert.stream import writing
from a3tune.errors import AdapterError, ModelError, OutputError
from a3tune.machine.digests import write_digests
from a3tune.machine.files import replacing_folder
from a3tune.machine.hashes import file_hash
from a3tune.machine.hub import named
from a3tune.models import A3MOE, adapter_weights, check_at_hand, check_model, read_adapter
from a3tune.run.folder import RunFolder

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from a3tune.vlm.load import Vlm

MARKER = "merged.json"
"""File of a merged model: the version that merged, the base by its public name, SHA-256 of the adapter's weights."""
ADAPTER_CARD = "ADAPTER.md"
"""The adapter's own model card, which tells what it was trained on."""
SHARD_SIZE = "5GB"
Card = Callable[[str, RunConfig | None], str]
"""The base model as `load_vlm` takes it, and the settings of the adapter's run where they are known -> a model card."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` wrote."""

    folder: Path
    base: str
    """As `load_vlm` takes it."""
    nbytes: int
    """Of the weights."""


def merge(adapter: Path, out: Path, card: Card, *, base: str | None = None, force: bool = False) -> Merged:
    """Add a plain LoRA adapter to the weights of its base; `out` is then a whole model, or not there at all.

    The model keeps the base's number format, and its processor as `load_vlm` completes it.

    Args:
        adapter: folder of an adapter (`adapter.kind=lora`, trained with or without the alignment loss).
        out: the new folder.
        card: writes its README.md.
        base: the base model; None is the one in the settings of the adapter's run, or in the adapter's own.
        force: take the place of a merged model that is there.

    Raises:
        AdapterError: the adapter is routed, damaged, belongs to another base, or names none.
        ModelError: the base cannot be read, has quantised weights, or its processor cannot be read whole.
        OutputError: `out` is there already, or cannot be written.
        RunError: another merge into `out` is under way.
    """
    name, run = check(adapter, out, base=base, force=force)
    from a3tune.vlm.load import load_vlm

    with replacing_folder(out, partial(_refuse_to_overwrite, out, force)) as folder:
        vlm = load_vlm(name, device="cpu", dtype="stored", attention=False)
        _check_base(vlm)
        nbytes = _write(_merged(vlm, adapter), vlm.processor, folder)
        _describe(folder, adapter, pinned(name), run, card)
        with writing(out):
            write_digests(folder)
    return Merged(out, name, nbytes)


def check(adapter: Path, out: Path, *, base: str | None = None, force: bool = False) -> tuple[str, RunFolder | None]:
    """The base of `merge`'s arguments, and the adapter's run where it is known.

    Raises what `merge` raises, as far as that can be told before anything slow is imported.
    """
    settings = read_adapter(adapter)
    _refuse_routed(adapter, settings)
    run = RunFolder.of_adapter(adapter)
    name = base or (run.read_config().model.path if run else _base_of(settings))
    if not name:
        raise AdapterError(f"{adapter}: names no base model, and there is no run's config.yaml beside it; give --model")
    if base is None:
        check_at_hand(str(name), run.config if run else adapter / "adapter_config.json")
    else:
        check_model(name)
    _refuse_to_overwrite(out, force)
    return name, run


def _base_of(settings: Mapping[str, Any]) -> str | None:
    """The base that an adapter names, at the commit that it names."""
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    return f"{name}@{revision}" if name and revision and named(str(name), "model") else name


def _refuse_routed(adapter: Path, settings: Mapping[str, Any]) -> None:
    if settings["peft_type"] == A3MOE and any(settings.get(name) != 0 for name in ("query_experts", "key_experts")):
        raise AdapterError(
            f"{adapter}: an A3MoE adapter cannot be merged: its change of the query and key weights depends on the "
            "prompt and on the image token (Eq. 5, 7), and one matrix cannot hold it. Serve it with the base model and "
            "a3tune, or train with adapter.kind=lora: the alignment loss is the same, and the adapter can be merged"
        )


def _refuse_to_overwrite(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise OutputError(f"{out}: is there already. Choose another folder, or replace it with --force")
    if not (out / MARKER).is_file():
        raise OutputError(f"{out}: holds no {MARKER}: it is not a merged model, so it is not replaced. Choose another")


def _check_base(vlm: "Vlm") -> None:
    from transformers import ProcessorMixin

    from a3tune.compat.processing import processor_class
    from a3tune.vlm.quantize import is_quantized

    if is_quantized(vlm.model):
        raise ModelError(
            f"{vlm.name}: its weights are quantised; what an adapter adds may be smaller than their steps and is then "
            "rounded away. Give the full weights that it was made from with --model"
        )
    whole = processor_class(vlm.model.config) or ProcessorMixin
    if absent := set(whole.get_attributes()) - set(vlm.processor.get_attributes()):
        raise ModelError(
            f"{vlm.name}: its {', '.join(sorted(absent))} cannot be read here, and a server may need it. "
            "Install torchvision (and num2words for SmolVLM)"
        )


def _merged(vlm: "Vlm", adapter: Path) -> Any:
    """The model of `vlm`, changed in place, layer by layer."""
    from a3tune.adapters import load_adapter

    model: Any = load_adapter(vlm.model, adapter)
    _untie(model.get_base_model())
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # a weight that is no number; a bias for a layer that has none
        raise AdapterError(f"{adapter}: cannot be merged: {error}") from error


def _untie(model: Any) -> None:
    """The output head gets weights of its own where it shares them with the embeddings and one of the two is adapted.

    What is merged into a shared matrix would change both.
    """
    from torch.nn import Parameter

    from a3tune.compat.peft import own_module

    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and (own_module(words) or own_module(head)):
        plain: Any = own_module(head) or head
        plain.weight = Parameter(plain.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _write(model: Any, processor: Any, folder: Path) -> int:
    """Weights, configurations and processor; returns the bytes of the weights."""
    _drop_unused_sampling(model.generation_config)
    with writing(folder):
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _drop_unused_sampling(generation: "GenerationConfig") -> None:
    """Settings of sampling that a greedy model ignores, and transformers refuses to write."""
    if not generation.do_sample:
        for name in _SAMPLING:
            setattr(generation, name, None)


def _describe(folder: Path, adapter: Path, base: str, run: RunFolder | None, card: Card) -> None:
    content = file_hash(adapter_weights(adapter))
    about = {"a3tune": version("a3tune"), "base": public_name(base), "adapter_sha256": content}
    with writing(folder):
        (folder / "README.md").write_text(card(base, run.read_config() if run else None), encoding="utf-8")
        (folder / MARKER).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        # The card of a checkpoint, or without a run, is another program's, and may name folders of this machine.
        # Nor is a link followed: the model may be passed on, with whatever file a stranger's link leads to.
        own = adapter / "README.md"
        if run and run.path == adapter.resolve().parent and own.is_file() and not own.is_symlink():
            shutil.copyfile(own, folder / ADAPTER_CARD)
