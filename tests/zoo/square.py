"""PaliGemma and Gemma 3 (MedGemma), the latter with a sliding window shorter than a prompt."""

from collections.abc import Callable
from pathlib import Path

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from zoo.save import SHAPE, TEXT, save, vocabulary
from zoo.words import tokenizer

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
WINDOW = 12
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _save_paligemma(folder: Path) -> None:
    words = tokenizer(**SPECIAL, named={"image_token": "<image>"})
    images = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, words)
    config = PaliGemmaConfig(
        text_config=TEXT | vocabulary(words) | {"model_type": "gemma"},
        vision_config=SHAPE | {"image_size": 56, "patch_size": 14, "vision_use_head": False, "projection_dim": 32},
        image_token_id=words.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    save(PaliGemmaForConditionalGeneration, config, processor, folder)


def _save_gemma3(folder: Path) -> None:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("<start_of_turn>", "<end_of_turn>", named=named, **SPECIAL)
    config = Gemma3Config(
        text_config=TEXT | vocabulary(words) | LAYERS,
        vision_config=SHAPE | {"image_size": 56, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=16,
        image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    processor = Gemma3Processor(images, words, chat_template=GEMMA_TEMPLATE, image_seq_length=16)
    save(Gemma3ForConditionalGeneration, config, processor, folder)


MODELS: dict[str, Callable[[Path], None]] = {"paligemma": _save_paligemma, "gemma3": _save_gemma3}
