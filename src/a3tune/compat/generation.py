"""How transformers generates: its loops, what it carries from pass to pass, and what its models call their cache."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

CACHE = "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"
"""Forward keyword of the KV cache: models took it as `past_key_values` until 5.23 and take it as `cache` since."""
CARRIED = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", CACHE, "use_cache")
"""What later passes take along of the inputs; the image is in the cache then."""
ENCODED = "mm_encoder_outputs"
"""Under this name models take images that have been through their vision tower and projector."""


def decoding_loop(model: Any, beams: int) -> Callable[..., Tensor]:
    """transformers' own loop, as `custom_generate` is called: one beam, or a search with several."""
    return model._beam_search if beams > 1 else model._sample


@contextmanager
def reading_prompt(model: Any, prefill: Callable[..., Any]) -> Iterator[None]:
    """While this is open, loops let `prefill` read the prompt, in place of the model's own first pass."""
    model._prefill = prefill
    try:
        yield
    finally:
        del model._prefill


@torch.no_grad()
def encoded_images(model: Any, inputs: Mapping[str, Any]) -> Any:
    """What the vision tower and projector make of the images of a batch, as models take it under `ENCODED`."""
    return model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))[ENCODED]


def first_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The positions of a prompt: families count differently."""
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


def first_pass(model: Any, inputs: Mapping[str, Any], **keywords: Any) -> dict[str, Any]:
    """Arguments of the pass that reads the prompt."""
    return model.prepare_inputs_for_generation(**inputs, is_first_iteration=True, **keywords)


def next_pass(model: Any, inputs: Mapping[str, Any], **keywords: Any) -> dict[str, Any]:
    """Arguments of a pass that reads the last token of `input_ids`."""
    return model.prepare_inputs_for_generation(**inputs, next_sequence_length=1, **keywords)


def after_pass(model: Any, outputs: Any, carried: dict[str, Any]) -> dict[str, Any]:
    """What the next pass takes along."""
    return model._update_model_kwargs_for_generation(outputs, carried)


def repeated(model: Any, times: int, input_ids: Tensor, carried: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Rows of a batch and what is carried, each row `times` times."""
    return model._expand_inputs_for_generation(expand_size=times, input_ids=input_ids, **carried)
