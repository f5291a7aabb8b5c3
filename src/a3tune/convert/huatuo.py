"""HuatuoGPT-Vision-7B (`llava_qwen2`): CLIP ViT-L/14 at 336 pixels, two-layer projector, Qwen2-7B.

Prompt and geometry of the published chatbot: images first, always padded to a square, no beginning token.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.convert.stream import Checkpoint

if TYPE_CHECKING:
    from a3tune.convert.llava import Plan

TITLE = "HuatuoGPT-Vision"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set texts = message.content | selectattr('type', 'equalto', 'text') %}"
    "{% if message.role == 'user' %}<|user|>\n"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{{ texts | map(attribute='text') | join | trim }}\n"
    "{% else %}<|assistant|>\n{{ texts | map(attribute='text') | join }} \n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava_qwen2"


def check(source: Path, base: Path | None) -> None:
    """It is whole by itself."""


def plan(source: Checkpoint, base: Checkpoint | None, tower: Path | None) -> "Plan":
    from transformers import Qwen2Config

    from a3tune.convert.llava import IMAGE, make_plan, read_tokenizer, renamed

    return make_plan(
        source,
        renamed(source.tensors),
        language=Qwen2Config,
        tokenizer=read_tokenizer(source.folder, image_token=IMAGE),
        chat_template=CHAT_TEMPLATE,
        tower=tower,
        pads_to_square=True,
        vision_layer=-2,
    )
