"""LLaVA-NeXT and LLaVA-OneVision with tiles of about 30 pixels."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

from a3tune.vlm.processor import image_only
from zoo.save import SHAPE, TEXT, save, vocabulary
from zoo.words import tokenizer

PATCH, SIDE = 7, 4
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ message.content[0].text }}</s>{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ '\n' + part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _save_next(folder: Path) -> None:
    tile = PATCH * SIDE
    words = tokenizer("<image>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    pinpoints = [[tile * rows, tile * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    config = LlavaNextConfig(
        text_config=TEXT | vocabulary(words) | {"model_type": "mistral"},
        vision_config=SHAPE | {"model_type": "clip_vision_model", "image_size": tile, "patch_size": PATCH},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, words, PATCH, "default", chat_template=MISTRAL_TEMPLATE, num_additional_image_tokens=1
    )
    save(LlavaNextForConditionalGeneration, config, processor, folder)


def _save_onevision(folder: Path) -> None:
    tile = PATCH * SIDE + 2  # as in the real one, the patches do not fill a tile
    words = tokenizer("<|im_start|>", "<image>", "<video>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    pinpoints = [[tile * rows, tile * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = LlavaOnevisionConfig(
        text_config=TEXT | vocabulary(words) | {"model_type": "qwen2"},
        vision_config=SHAPE | {"model_type": "siglip_vision_model", "image_size": tile, "patch_size": PATCH},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints)
    processor = image_only("llava_onevision", LlavaOnevisionProcessor)(
        images,
        words,
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=QWEN_TEMPLATE,
    )
    save(LlavaOnevisionForConditionalGeneration, config, processor, folder)
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


MODELS: dict[str, Callable[[Path], None]] = {"llava_next": _save_next, "llava_onevision": _save_onevision}
