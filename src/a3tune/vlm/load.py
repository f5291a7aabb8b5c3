"""Weights, processor, device, dtype and attention implementation of a vision-language model.

Knows checkpoints; not what differs between families (`families.py`) or what attention is captured for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from a3tune import bases
from a3tune.attention.capture import use_capture
from a3tune.claims import check_claims, check_shape
from a3tune.compat.peft import has_forward_pre_hook
from a3tune.errors import A3TuneError, ModelError, in_short
from a3tune.machine.digests import check_digests
from a3tune.machine.trial import template_ends
from a3tune.models import (
    MAKE_AGAIN,
    base_folder,
    check_finite,
    check_format,
    check_model,
    choose_device,
    read_config,
)
from a3tune.vlm.checks import check_generation, check_images
from a3tune.vlm.families import FAMILIES, Family, family_of
from a3tune.vlm.processor import load_processor
from a3tune.vlm.quantize import Quantization, is_quantized, quantization_config


@dataclass(frozen=True)
class Vlm:
    """A model, its processor, and what is known about its family."""

    model: PreTrainedModel
    processor: Any
    """Its `ProcessorMixin`, with a tokenizer and an image processor."""
    name: str
    """As given to `load_vlm`: "tiny", a folder, or a name on the Hugging Face Hub, perhaps with its revision."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return family_of(self.model.config, self.name)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that are no text: ends of turns, borders of images, padding, ..."""
        added = self.tokenizer.added_tokens_decoder
        return tuple(sorted(index for index, token in added.items() if token.special))

    @property
    def layout_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that are no text between two tokens of an image; an adapter keeps those of its training."""
        trained_with = getattr(getattr(self.model, "active_peft_config", None), "layout_ids", None)
        if trained_with is not None:
            return tuple(trained_with)
        ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.family.layout)
        return tuple(sorted({index for found in ids for index in found}))

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_vlm(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    attention: bool = True,
    quantization: Quantization | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Vlm:
    """Load a model and its processor, in evaluation mode.

    Only safetensors are read and no code of the checkpoint is run.

    Args:
        path: "tiny" (shipped in the package), a local folder, or a name on the Hugging Face Hub, `owner/name` or
            `owner/name@revision`; what its cache here lacks is downloaded, once the model is known to be supported.
        device: "cuda", "cuda:1", "mps" or "cpu"; None or "auto" takes the first of cuda, mps and cpu that is there.
        dtype: None or "auto": bfloat16 on cuda, float32 elsewhere; "stored": as the checkpoint has it.
        attention: let attention be captured in the language model; the vision tower stays on sdpa.
        quantization: "4bit" or "8bit" weights in the language model (`vlm.quantize`); needs bitsandbytes.
        device_map: "auto", or module path -> device, spreads a large model over devices; `device` is then left out.

    Raises `ModelError` when the family is not supported, or the checkpoint cannot be read or does not hold all weights.
    """
    name, source = str(path), _source(path)
    if device_map is not None and device not in (None, "auto"):
        raise ModelError(f"device_map {device_map!r} places the whole model; leave out device ({device!r}).")
    place = choose_device(device)
    if dtype in (None, "auto"):
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    elif dtype == "stored":
        dtype = "auto"  # as transformers calls it
    check_digests(source, ModelError, MAKE_AGAIN)
    config, processor = _described(source, name)
    if (whole := _source(path, weights=True)) != source:  # a branch that moved meanwhile
        source, (config, processor) = whole, _described(whole, name)
    spread: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if quantization is not None:
        compute = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        spread["quantization_config"] = quantization_config(quantization, config, compute)
        spread.setdefault("device_map", {"": place})
    with _readable(name):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **spread,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} weights are not in the checkpoint, for example {missing[0]}. "
            "It is incomplete, or its layout is not that of transformers: convert or download it again."
        )
    with _readable(name):
        check_finite(model.state_dict())
    check_generation(model.generation_config, name)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.eval()
    if device_map is None and not is_quantized(model):
        model.to(place)
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    if attention:
        use_capture(model)
    return Vlm(model=model, processor=processor, name=name)


def wrap_vlm(model: Any, processor: Any) -> Vlm:
    """A model and its processor that somebody else has loaded, so that its attention can be captured.

    Both are changed in place: the language model takes our attention function, whatever it had before, and the
    processor what older checkpoints leave out. The model may carry an adapter. Raises `ModelError` for a family that is
    not supported, a processor without tokenizer or images, or a model whose attention cannot be captured.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"model: expected one of transformers, with or without an adapter, got {type(model).__name__}; give the "
            "`model` of what a3tune.load returns, and compile or wrap a model afterwards"
        )
    name = base.name_or_path or type(base).__name__
    family = family_of(base.config, name)
    _complete_processor(processor, name)
    with _readable(name):
        family.complete(processor, base.config)
    head: Any = base.get_output_embeddings()
    if not has_forward_pre_hook(head, _in_one_piece):
        head.register_forward_pre_hook(_in_one_piece)
    use_capture(base)
    adapted: Any = model  # a PeftModel passes on what a model is asked
    return Vlm(model=adapted, processor=processor, name=name)


def describe(path: str | Path) -> tuple[Any, Any]:
    """Configuration and processor of a model, without reading its weights. Raises as `load_vlm`."""
    return _described(_source(path), str(path))


def load_boxes(path: str | Path) -> Callable[[int, int], np.ndarray]:
    """(height, width) -> `grids.token_boxes` of a model, without reading its weights. Raises as `load_vlm`."""
    config, processor = describe(path)
    return partial(family_of(config, str(path)).boxes, config, processor)


def load_bare(path: str | Path) -> Vlm:
    """A model without weights, and its processor: for all that asks its configuration only. Raises as `load_vlm`."""
    config, processor = describe(path)
    with torch.device("meta"), _readable(str(path)):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    return Vlm(model=model, processor=processor, name=str(path))


def _source(path: str | Path, *, weights: bool = False) -> Path:
    """Where a model is read: what the cache of the Hub holds whole is read there, and the Hub is not asked for news."""
    check_model(str(path))
    return base_folder(str(path)) or bases.fetch(str(path), weights=weights)


def _described(source: Path, name: str) -> tuple[Any, Any]:
    """Configuration and completed processor of a supported model."""
    check_format(name, read_config(source))
    check_claims(source)
    with _readable(name):
        check_shape(name, read_config(source))  # transformers may stumble over what it reads
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_shape(name, config.to_dict())
    family = family_of(config, name)
    with _readable(name):
        processor = load_processor(str(source), config)
    _complete_processor(processor, name)
    if name != "tiny":
        _check_templates(processor, name)
    with _readable(name):
        check_images(processor.image_processor, name)
        family.complete(processor, config)
    return config, processor


def _in_one_piece(head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Models hand their head a slice, the last positions, and torch multiplies a slice sample by sample.

    On a processor that copies the head's matrix for each: 70 times as long in bfloat16, 1.7 times in float32 (measured
    on 4 x 20 positions, 32,000 words).
    """
    return (inputs[0].contiguous(),)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what transformers raises on a broken or missing checkpoint into a `ModelError`."""
    try:
        yield
    except A3TuneError:
        raise
    except Exception as error:  # transformers raises what it likes on a damaged folder
        first = in_short(next(iter(str(error).strip().splitlines()), type(error).__name__))
        raise ModelError(
            f"model {name}: expected 'tiny', or a folder or Hugging Face Hub name with config.json of a supported "
            f"family ({', '.join(FAMILIES)}), processor files and *.safetensors; reading it failed: {first}"
        ) from error


def _complete_processor(processor: Any, name: str) -> None:
    """Check that it is one of a VLM, and give it the pad token that older checkpoints leave out."""
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{name}: expected a processor with a tokenizer and an image processor, got {type(processor).__name__}."
        )
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: tokenizer_config.json: eos_token: expected the token that ends an answer, got none; get the "
            "complete, original checkpoint"
        )
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so any existing token will do; a new one would change the vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _check_templates(processor: Any, name: str) -> None:
    for owner in (processor, processor.tokenizer):
        templates = getattr(owner, "chat_template", None)
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if isinstance(template, str) and not template_ends(template):
                raise ModelError(
                    f"{name}: its chat template does not end, or takes more than a gigabyte, for one short question. "
                    "Get the original checkpoint"
                )
