"""LLaVA-Med v1.5 (`llava_mistral`): CLIP ViT-L/14 at 336 pixels, two-layer projector, Mistral-7B-Instruct v0.2.

Prompt of the published evaluation (`--conv-mode mistral_instruct`), images first, padded to a square.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.convert.stream import Checkpoint

if TYPE_CHECKING:
    from a3tune.convert.llava import Plan

TITLE = "LLaVA-Med v1.5"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set texts = message.content | selectattr('type', 'equalto', 'text') %}"
    "{% if message.role == 'user' %}[INST] "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{{ texts | map(attribute='text') | join | trim }} [/INST]"
    "{% else %} {{ texts | map(attribute='text') | join }} {{ eos_token }}{% endif %}{% endfor %}"
)


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava_mistral"


def check(source: Path, base: Path | None) -> None:
    """It is whole by itself."""


def plan(source: Checkpoint, base: Checkpoint | None, tower: Path | None) -> "Plan":
    from transformers import MistralConfig

    from a3tune.convert.llava import IMAGE, make_plan, read_tokenizer, renamed

    return make_plan(
        source,
        renamed(source.tensors),
        language=MistralConfig,
        tokenizer=read_tokenizer(source.folder, image_token=IMAGE),
        chat_template=CHAT_TEMPLATE,
        tower=tower,
        pads_to_square=source.config.get("image_aspect_ratio") == "pad",
        vision_layer=-2,
    )
