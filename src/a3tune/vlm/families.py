"""The supported model families, and what differs between them.

Knows names and functions of families; a new one is a line in `FAMILIES` (docs/families.md tells how).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from a3tune.errors import ModelError
from a3tune.vlm.grids.anyres import llava_next_boxes, llava_onevision_boxes
from a3tune.vlm.grids.llava import WITH_CLASS_TOKEN, complete_llava, llava_boxes
from a3tune.vlm.grids.qwen import qwen_boxes
from a3tune.vlm.grids.square import gemma3_boxes, paligemma_boxes
from a3tune.vlm.grids.tiles import idefics_boxes, internvl_boxes

PATCHES = (*WITH_CLASS_TOKEN, "siglip_vision_model")
"""Vision towers that give one token per patch."""

LINE_ENDS = ("\n", "\n\n")
"""After a row of tiles, and before the whole image."""


@dataclass(frozen=True)
class Family:
    """What differs between model families."""

    boxes: Callable[[Any, Any, int, int], np.ndarray]
    """(model config, processor, height, width) -> boxes of the image tokens; see `grids.token_boxes`."""
    vision: tuple[str, ...] | None = None
    """Model types of the vision towers whose tokens are patches of that grid; None where a family has only one."""
    complete: Callable[[Any, Any], None] = lambda processor, config: None
    """(processor, model config): fill in what the processors of older checkpoints leave out."""
    chat: bool = True
    """Whether prompts go through a chat template; without one they follow their images as they are."""
    layout: tuple[str, ...] = ()
    """Texts, no control tokens, that the processor writes between the parts of an image."""
    answer_type: int = 0
    """What the answer's tokens are in the model's `token_type_ids` (or `mm_token_type_ids`), where it takes them."""


FAMILIES: dict[str, Family] = {
    "gemma3": Family(gemma3_boxes),
    "idefics3": Family(idefics_boxes, layout=LINE_ENDS),
    "internvl": Family(internvl_boxes),
    "llava": Family(llava_boxes, vision=PATCHES, complete=complete_llava),
    "llava_next": Family(llava_next_boxes, vision=PATCHES, complete=complete_llava),
    "llava_onevision": Family(llava_onevision_boxes, vision=PATCHES),
    "paligemma": Family(paligemma_boxes, chat=False, answer_type=1),
    "qwen2_5_vl": Family(qwen_boxes),
    "qwen2_vl": Family(qwen_boxes),
    "qwen3_vl": Family(qwen_boxes),
    "smolvlm": Family(idefics_boxes, layout=LINE_ENDS),
}
"""By `model_type`. A new one is a line here and a function in `grids`."""

REFUSED = {
    "gemma2": "its language model caps attention scores, which the attention function of a3tune does not (PaliGemma 2)",
    "mllama": "its images enter through cross-attention, so no image tokens stand in the self-attention to align",
}
"""Families and language models that cannot be supported, by `model_type`, with the reason."""


def family_of(config: Any, name: str) -> Family:
    """The family of a model with this configuration; `ModelError`, which calls the model `name`, if there is none."""
    kind = config.model_type
    for part in (kind, config.get_text_config().model_type):
        if part in REFUSED:
            raise ModelError(
                f"{name}: model_type {part!r} cannot be used: {REFUSED[part]}. Choose one of: {_supported()}."
            )
    if kind not in FAMILIES:
        raise ModelError(f"{name}: model_type {kind!r} is not supported; supported: {_supported()}.")
    family, vision = FAMILIES[kind], config.vision_config.model_type
    if family.vision is not None and vision not in family.vision:
        raise ModelError(
            f"{name}: a {kind} with vision tower {vision!r} is not supported; "
            f"supported towers: {', '.join(family.vision)}."
        )
    return family


def _supported() -> str:
    return ", ".join(sorted(FAMILIES))
