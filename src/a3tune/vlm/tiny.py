"""The small VLM of the demo and of the tests: a LLaVA with a CLIP tower and a Llama-family decoder, like LLaVA-Med.

Knows shapes and tokenizers, not how the shipped weights were trained (that is `recipes/tiny/`).
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 120
PATCH_SIZE = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "<image>", "</s>")
"""Their ids are their places. CLIP's text model reads an end token of id 2 as an old format: it must not be 2."""


def tiny_config(
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 640,
    image_size: int = IMAGE_SIZE,
) -> LlavaConfig:
    """Configuration of the tiny LLaVA; `kv_heads < heads` gives grouped-query attention."""
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        projection_dim=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=1024,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def random_vlm(seed: int = 0, **shape: int) -> LlavaForConditionalGeneration:
    """An untrained tiny LLaVA in fp32; `shape` goes to `tiny_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(tiny_config(**shape)).eval()


def train_tokenizer(texts: Iterable[str], vocab: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be asked, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, image, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        padding_side="left",
    )


def tiny_image_processor(image_size: int = IMAGE_SIZE) -> CLIPImageProcessorPil:
    """CLIP's usual resize of the shortest edge and centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def tiny_processor(tokenizer: PreTrainedTokenizerFast, image_size: int = IMAGE_SIZE) -> LlavaProcessor:
    """The processor of the tiny LLaVA."""
    return LlavaProcessor(
        image_processor=tiny_image_processor(image_size),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
