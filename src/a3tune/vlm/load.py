"""Weights, processor, device, dtype and attention implementation of a vision-language model.

Knows which families are supported (`FAMILIES`); not how they cut images (`grids.py`) or what attention is captured for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from a3tune.attention.capture import use_capture
from a3tune.errors import ModelError
from a3tune.vlm.grids import llava_boxes
from a3tune.vlm.tiny import shipped


@dataclass(frozen=True)
class Family:
    """What differs between model families."""

    boxes: Callable[[Any, Any, int, int], np.ndarray]
    """(model config, processor, height, width) -> boxes of the image tokens; see `grids.token_boxes`."""
    vision: tuple[str, ...]
    """Model types of the vision towers whose tokens are patches of that grid."""


FAMILIES: dict[str, Family] = {
    "llava": Family(boxes=llava_boxes, vision=("clip_vision_model", "siglip_vision_model")),
}
"""Supported families by `model_type`. A new one is a line here and a function in `grids.py`."""

REFUSED = {
    "mllama": "its images enter through cross-attention, so no image tokens stand in the self-attention to align",
}
"""Families that cannot be supported, with the reason."""


@dataclass(frozen=True)
class Vlm:
    """A model, its processor, and what is known about its family."""

    model: PreTrainedModel
    processor: Any
    """Its `ProcessorMixin`, with a tokenizer and an image processor."""
    name: str
    """As given to `load_vlm`: "tiny", a folder, or a name on the Hugging Face Hub."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return _family(self.model.config, self.name)

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_vlm(
    path: str | Path, *, device: str | None = None, dtype: torch.dtype | str | None = None, attention: bool = True
) -> Vlm:
    """Load a model and its processor, in evaluation mode.

    Only safetensors are read and no code of the checkpoint is run.

    Args:
        path: "tiny" (shipped in the package), a local folder, or a name on the Hugging Face Hub.
        device: "cuda", "cuda:1", "mps" or "cpu"; None or "auto" takes the first of cuda, mps and cpu that is there.
        dtype: None or "auto": bfloat16 on cuda, float32 elsewhere.
        attention: let attention be captured in the language model; the vision tower stays on sdpa.

    Raises `ModelError` when the family is not supported, or the checkpoint cannot be read or does not hold all weights.
    """
    name = str(path)
    source = str(shipped("vlm")) if name == "tiny" else name
    place = _place(device)
    if dtype in (None, "auto"):
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with _readable(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    _family(config, name)
    with _readable(name):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} weights are not in the checkpoint, for example {missing[0]}. "
            "It is incomplete, or its layout is not that of transformers: convert or download it again."
        )
    _complete_processor(processor, config, name)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.eval().to(place)
    if attention:
        use_capture(model)
    return Vlm(model=model, processor=processor, name=name)


def _place(device: str | None) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None or device == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if not there.get(device.partition(":")[0]):
        available = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ModelError(f"device {device!r} is not there; this machine has: {available}.")
    return torch.device(device)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what transformers raises on a broken or missing checkpoint into a `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"model {name}: expected 'tiny', or a folder or Hugging Face Hub name with config.json, processor files "
            f"and *.safetensors; reading it failed: {first}"
        ) from error


def _family(config: Any, name: str) -> Family:
    kind = config.model_type
    if kind in REFUSED:
        raise ModelError(f"{name}: model_type {kind!r} cannot be used: {REFUSED[kind]}. Choose one of: {_supported()}.")
    if kind not in FAMILIES:
        raise ModelError(f"{name}: model_type {kind!r} is not supported; supported: {_supported()}.")
    family, vision = FAMILIES[kind], config.vision_config.model_type
    if vision not in family.vision:
        raise ModelError(
            f"{name}: a {kind} with vision tower {vision!r} is not supported; "
            f"supported towers: {', '.join(family.vision)}."
        )
    return family


def _supported() -> str:
    return ", ".join(sorted(FAMILIES))


def _complete_processor(processor: Any, config: Any, name: str) -> None:
    """Fill in what older checkpoints leave out: a pad token, and how many tokens an image takes."""
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{name}: expected a processor with a tokenizer and an image processor, got {type(processor).__name__}."
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        # Padding is masked everywhere, so any existing token will do; a new one would change the vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if config.model_type == "llava":
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
