"""Random Idefics3, SmolVLM and InternVL of some 60,000 weights, saved as their checkpoints are."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from a3tune.vlm.processor import image_only
from zoo.save import SHAPE, TEXT, save, vocabulary
from zoo.words import tokenizer

TILE, PATCH, SIDE = 32, 4, 4
"""Pixels of a tile and of a patch along one side; tokens of a tile along one side (of 2 x 2 patches each)."""
IDEFICS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
LONG = {"max_position_embeddings": 2048}
IDEFICS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
}


def idefics_processor(images: Any, bos: str = "<|im_start|>") -> Idefics3Processor:
    """The processor of Idefics3, and of SmolVLM where there are no packages for videos."""
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    control = ("<fake_token_around_image>", "<image>", "<global-img>", *tags)
    words = tokenizer(*control, bos_token=bos, eos_token="<end_of_utterance>", pad_token="<pad>")
    images.max_image_size = {"longest_edge": TILE}
    return Idefics3Processor(images, words, image_seq_len=SIDE**2, chat_template=IDEFICS_TEMPLATE)


def internvl_processor(fewest: int, most: int) -> Any:
    """InternVL's processor, which cuts an image into `fewest` to `most` tiles."""
    words = tokenizer("<|im_start|>", named=INTERNVL_TOKENS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, min_patches=fewest, max_patches=most)
    make = image_only("internvl", InternVLProcessor)
    return make(images, words, image_seq_length=SIDE**2, chat_template=INTERNVL_TEMPLATE)


def _save_idefics(family: str, folder: Path) -> None:
    make_config, make_model, make_images = IDEFICS[family]
    bos = "<|im_start|>" if family == "smolvlm" else "<|begin_of_text|>"
    processor = idefics_processor(make_images(size={"longest_edge": 3 * TILE}), bos)
    config = make_config(
        text_config=TEXT | LONG | vocabulary(processor.tokenizer) | {"model_type": "llama"},
        vision_config=SHAPE | {"image_size": TILE, "patch_size": PATCH},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    save(make_model, config, processor, folder)


def _save_internvl(folder: Path) -> None:
    processor = internvl_processor(1, 6)
    config = InternVLConfig(
        text_config=TEXT | LONG | vocabulary(processor.tokenizer) | {"model_type": "qwen2"},
        vision_config=SHAPE | {"image_size": [TILE, TILE], "patch_size": [PATCH, PATCH]},
        image_token_id=processor.image_token_id,
        image_seq_length=SIDE**2,
    )
    save(InternVLForConditionalGeneration, config, processor, folder)
    video = {"video_processor_type": "InternVLVideoProcessor", "size": {"height": TILE, "width": TILE}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


MODELS: dict[str, Callable[[Path], None]] = {
    **{family: partial(_save_idefics, family) for family in IDEFICS},
    "internvl": _save_internvl,
}
