"""4-bit and 8-bit weights of the language model (bitsandbytes), and what training on top of them needs.

Knows modules and their types; not which adapters are trained.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from a3tune.errors import ModelError

Quantization = Literal["4bit", "8bit"]


def quantization_config(bits: Quantization, config: PreTrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `from_pretrained` is to quantise a model with this configuration; `dtype` is that of the computation.

    4 bits are QLoRA's: NF4 with quantised constants. Only the linear layers of the language model are quantised: the
    vision tower and the projector are small, and the output head may be tied to the embeddings. Raises `ModelError`
    without bitsandbytes, and for another number of bits.
    """
    if bits not in get_args(Quantization):
        raise ModelError(f"quantization: expected one of {', '.join(get_args(Quantization))}, got {bits!r}.")
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {bits!r} needs the package bitsandbytes, which is not installed. Install a3tune[quantize]."
        )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    skipped = list(_beside(model, model.get_decoder()))
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def quantised_weights(model: PreTrainedModel) -> int:
    """How many weights would be in 4 or 8 bits: those of the linear layers of the language model."""
    return sum(layer.weight.numel() for layer in model.get_decoder().modules() if isinstance(layer, nn.Linear))


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights are in 4 or 8 bits, as loaded here or as the checkpoint has them."""
    return getattr(model, "hf_quantizer", None) is not None


def prepare_for_training(model: PreTrainedModel) -> None:
    """Make a quantised model ready for adapters, in place: frozen, normalisation layers of the decoder in fp32.

    In place of PEFT's `prepare_model_for_kbit_training`, which turns on reentrant activation checkpointing (the
    alignment loss would then have no gradient, without an error) and copies tied embeddings to fp32. Non-reentrant
    checkpointing, the Trainer's default, needs no gradients at the embeddings.
    """
    model.requires_grad_(False)
    for module in model.get_decoder().modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such processors bitsandbytes packs 4-bit weights anew at the first inference, and gradients through
            # packed weights are wrong. A training may begin with inference: heads are calibrated so.
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
        if "norm" in type(module).__name__.lower():
            module.to(torch.float32)


def _beside(module: nn.Module, decoder: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of the largest modules that do not touch the decoder."""
    for name, child in module.named_children():
        if child is decoder:
            continue
        if any(inner is decoder for inner in child.modules()):
            yield from _beside(child, decoder, f"{path}{name}.")
        else:
            yield path + name
