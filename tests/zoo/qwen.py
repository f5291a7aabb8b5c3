"""Random Qwen2-VL, Qwen2.5-VL and Qwen3-VL of some 100,000 weights, saved as their checkpoints are."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from a3tune.vlm.processor import image_only
from zoo.save import TEXT, save, vocabulary
from zoo.words import tokenizer

PATCH, MERGE = 4, 2
LIMITS = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
"""Fewest and most pixels of an image (the names are transformers')."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLACES = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
CONTROL = ("<|im_start|>", *PLACES.values())
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
VISION = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE}
TOWERS = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 2 * PATCH * MERGE,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    },
}
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}


def _save(family: str, folder: Path) -> None:
    make_config, make_model, make_processor = CLASSES[family]
    words = tokenizer(*CONTROL, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=LIMITS)
    processor = image_only(family, make_processor)(images, words, chat_template=CHAT_TEMPLATE)
    config = make_config(
        text_config=TEXT | ROPE | vocabulary(words),
        vision_config=VISION | TOWERS[family],
        **{name: words.convert_tokens_to_ids(token) for name, token in PLACES.items()},
    )
    save(make_model, config, processor, folder)
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": PATCH, "merge_size": MERGE}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


MODELS: dict[str, Callable[[Path], None]] = {family: partial(_save, family) for family in CLASSES}
