"""LLaVA in its three shapes: CLIP at 224 and (padded to a square) at 336 pixels, SigLIP."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from zoo.save import SHAPE, TEXT, save, vocabulary
from zoo.words import tokenizer

PATCH = 14
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _save(folder: Path, *, tower: str, size: int, images: Any) -> None:
    words = tokenizer("<image>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    clip = tower == "clip_vision_model"
    strategy = "default" if clip else "full"
    config = LlavaConfig(
        text_config=TEXT | vocabulary(words) | {"model_type": "llama"},
        vision_config=SHAPE | {"model_type": tower, "image_size": size, "patch_size": PATCH},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy=strategy,
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=CHAT_TEMPLATE,
    )
    save(LlavaForConditionalGeneration, config, processor, folder)


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


MODELS: dict[str, Callable[[Path], None]] = {
    "llava_clip_224": partial(
        _save,
        tower="clip_vision_model",
        size=224,
        images=CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=_square(224)),
    ),
    "llava_clip_336": partial(
        _save,
        tower="clip_vision_model",
        size=336,
        images=LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=_square(336), do_pad=True),
    ),
    "llava_siglip": partial(
        _save,
        tower="siglip_vision_model",
        size=60,
        images=SiglipImageProcessorPil(size=_square(60)),
    ),
}
