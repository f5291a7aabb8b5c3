"""The original LLaVA-Med: differences from LLaMA-7B, a linear projector; CLIP ViT-L/14 at 224 pixels is elsewhere.

Prompt of the published evaluation (`--conv-mode simple`) with the answer's turn opened as the published chat does; the
image comes after the question, and an answer ends with `###`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3tune.convert.stream import HEAD, Checkpoint, LazyTensor
from a3tune.errors import ModelError

if TYPE_CHECKING:
    import torch

    from a3tune.convert.llava import Plan

TITLE = "LLaVA-Med (delta weights)"
PATCH, START, END = "<im_patch>", "<im_start>", "<im_end>"
STOP = "###"
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions.###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###"
)
CHAT_TEMPLATE = (
    "SYSTEM{% for message in messages %}{% set texts = message.content | selectattr('type', 'equalto', 'text') %}"
    "{% if message.role == 'user' %}Human: "
    "{{ texts | map(attribute='text') | join | trim }}"
    "{% for part in message.content if part.type == 'image' %}{{ '\n' }}IMAGE{% endfor %}###"
    "{% else %}Assistant: {{ texts | map(attribute='text') | join }}###{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SAME_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
"""What a base must share with the delta; `rms_norm_eps` tells LLaMA from Llama 2, whose shapes are the same."""


def matches(config: Mapping[str, Any]) -> bool:
    # transformers' own LLaVA has the same model type, but keeps its language model in `text_config`.
    return config.get("model_type") == "llava" and "text_config" not in config and "hidden_size" in config


def check(source: Path, base: Path | None) -> None:
    if base is None:
        raise ModelError(
            f"{source}: holds only the differences from LLaMA-7B. Give the folder of LLaMA-7B in transformers' "
            "format as the base."
        )


def plan(source: Checkpoint, base: Checkpoint | None, tower: Path | None) -> "Plan":
    from transformers import LlamaConfig

    from a3tune.convert.llava import make_plan, read_tokenizer, renamed

    assert base is not None
    marked = bool(source.config.get("mm_use_im_start_end", False))
    tokenizer = read_tokenizer(source.folder, image_token=PATCH, more=(START, END) if marked else ())
    image = f"{START}{PATCH}{END}" if marked else PATCH
    # `SYSTEM` and `IMAGE` stand for literal texts: a template language inside a format string is hard to read.
    template = CHAT_TEMPLATE.replace("SYSTEM", SYSTEM).replace("IMAGE", image)
    return make_plan(
        source,
        renamed(added(source, base)),
        language=LlamaConfig,
        tokenizer=tokenizer,
        chat_template=template,
        tower=tower,
        pads_to_square=source.config.get("image_aspect_ratio") == "pad",
        vision_layer=-1,
        stop_strings=[STOP],
    )


def added(delta: Checkpoint, base: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor of the delta with the base's added to it; the projector, which LLaMA lacks, as it is.

    The vocabulary matrices of the delta have more rows: the base is added to those it has. Raises `ModelError` when the
    base is not the one the delta was made from, as far as configuration, names and shapes tell.
    """
    differing = [
        f"{name} {base.config.get(name)} instead of {delta.config[name]}"
        for name in SAME_SHAPE
        if name in delta.config and base.config.get(name) != delta.config[name]
    ]
    if differing:
        raise ModelError(f"{base.folder}: not the base of {delta.folder}: it has {', '.join(differing)}.")
    return {
        name: tensor if name.startswith("model.mm_projector.") else _sum(tensor, base)
        for name, tensor in delta.tensors.items()
        if not name.endswith(".inv_freq")
    }


def _sum(delta: LazyTensor, base: Checkpoint) -> LazyTensor:
    other = base.tensors.get(delta.name)
    if other is None:
        raise ModelError(f"{base.folder}: not the base of this delta: it lacks {delta.name}.")
    more_rows = delta.name in ("model.embed_tokens.weight", HEAD) and delta.shape[0] >= other.shape[0]
    if delta.shape[1:] != other.shape[1:] or not (more_rows or delta.shape == other.shape):
        raise ModelError(
            f"{base.folder}: not the base of this delta: its {delta.name} has shape {list(other.shape)}, "
            f"the delta's {list(delta.shape)}."
        )

    def read() -> "torch.Tensor":
        values = delta.read().clone()
        values[: other.shape[0]] += other.read().to(values.dtype)
        return values

    return LazyTensor(delta.name, delta.shape, delta.dtype, read)
