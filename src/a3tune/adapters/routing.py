"""Which tokens are prompt and which are image, on the way to the routed layers; and the gate alpha beside the KV cache.

Knows transformers' caches and forward keywords; knows no adapter.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from a3tune.compat.generation import CACHE
from a3tune.errors import AdapterError

WHOLE_PROMPT = (
    "Q-MoE reads the whole prompt in one pass: leave out prefill_chunk_size, start without a cached prefix, let no "
    "other model draft tokens; or, if these are no prompt, say so with routing=Routing(prompt_mask, image_mask)."
)
NEEDS_CACHE = (
    "Q-MoE keeps the gates of a prompt with its KV cache, and without one cannot tell the prompt from the answer: "
    "leave out use_cache=False and continuous batching, or pass routing=Routing(prompt_mask, image_mask) to each pass."
)
"""Both hold for Eq. 4, which pools over the prompt and nothing else."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The forward keyword `routing`: what each position of this pass is."""

    prompt_mask: Tensor
    """`[B, S]` bool: text of the prompt; no padding, no answer."""
    image_mask: Tensor | None
    """`[B, S]` bool: image tokens. None says there is none in the whole input, and K-MoE is skipped."""


def image_token_id(config: PreTrainedConfig) -> int:
    """Id of the image token of a VLM; AdapterError for a model without one."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise AdapterError(
        f"model of type {config.model_type!r}: expected a vision-language model whose configuration has "
        "`image_token_id`, found none. A3MoE routes image tokens; use plain LoRA on this model."
    )


def is_markup(input_ids: Tensor, image_mask: Tensor, control_ids: Sequence[int], layout_ids: Sequence[int]) -> Tensor:
    """`[B, S]` bool: what is neither text nor image: control tokens, and what lays out an image.

    The latter are `layout_ids` (line ends) that stand between two image tokens with nothing but such and control tokens
    around them; elsewhere the same tokens are text.
    """
    control, layout = (
        torch.isin(input_ids, torch.tensor(ids, dtype=torch.long, device=input_ids.device))
        for ids in (control_ids, layout_ids)
    )
    # Text cuts a row into pieces: in its own piece, layout has images before and behind it.
    piece = (~(image_mask | control | layout)).cumsum(1)
    images = image_mask.new_zeros(len(piece), piece.shape[1] + 1, dtype=torch.long)
    images.scatter_add_(1, piece, image_mask.long())
    in_piece = images.gather(1, piece)
    before = image_mask.cumsum(1) - (images.cumsum(1) - images).gather(1, piece)
    return control | (layout & (before > 0) & (before < in_piece))


def derive_routing(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    control_ids: Sequence[int] = (),
    layout_ids: Sequence[int] = (),
) -> tuple[tuple, dict[str, Any]]:
    """For a forward pre-hook of the inner VLM: make `routing` from `input_ids` when the caller gave none.

    As in `generate`. The prompt is then all of the input but padding, image tokens and markup (`is_markup`), so pass
    `routing` when the input holds an answer.
    """
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    routing = kwargs.get("routing")
    if input_ids is None:
        return args, kwargs
    if routing is None:
        image_mask = input_ids == image_token_id(model.config)  # type: ignore[arg-type]
        markup = is_markup(input_ids, image_mask, control_ids, layout_ids)
        prompt_mask = _is_token(kwargs.get("attention_mask"), input_ids) & ~image_mask & ~markup
        # One look at the values per pass lets every layer skip K-MoE at decoding steps. Training passes `routing`.
        routing = Routing(prompt_mask, image_mask if image_mask.any() else None)
    elif routing.prompt_mask.shape != input_ids.shape:
        raise AdapterError(
            f"routing: expected masks of the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(routing.prompt_mask.shape)}. Pass the masks of exactly the tokens of this forward pass."
        )
    return args, {**kwargs, "routing": routing}


def in_parts(input_ids: Tensor | None = None, **keywords: Any) -> bool:
    """Whether a call of the model, or of `generate`, would read a prompt in parts.

    The layers refuse several tokens against a filled cache; a single one looks like a token of the answer to them.
    """
    config = keywords.get("generation_config")
    cache = next((keywords[name] for name in (CACHE, "past_key_values") if keywords.get(name) is not None), None)
    if keywords.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
        return True
    more = input_ids is not None and input_ids.shape[1] > 1 and cache is not None and cache.get_seq_length() > 0
    return more and keywords.get("routing") is None


def without_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a pass is one of `generate(use_cache=False)`, whose input is a prompt and what was generated so far.

    Only `generate` gives positions to a pass without a cache that nobody takes gradients of.
    """
    generating = kwargs.get("position_ids") is not None and not torch.is_grad_enabled()
    return generating and kwargs.get("use_cache") is False and kwargs.get("routing") is None


def _is_token(attention_mask: Tensor | dict[str, Tensor] | None, input_ids: Tensor) -> Tensor:
    """`[B, S]` bool: not padding, from any form of mask that reaches the inner model."""
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.ndim == 2:
        return attention_mask[:, -input_ids.shape[1] :].bool()
    # [B, 1, S, T], bool or additive: a token sees itself, padding does not. (Prefill; later alpha is kept.)
    itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return itself if itself.dtype == torch.bool else itself == 0


class GateKeeper:
    """Mixed into the class of a KV cache: the alphas of Q-MoE belong to the cache and follow its batch dimension."""

    gates: dict[tuple[int, str], Tensor]
    """(layer, adapter) -> alpha `[B, O]` of the prompt that the cache holds."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.gates = {key: gate.index_select(0, beam_idx.to(gate.device)) for key, gate in self.gates.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.gates = {key: gate[indices] for key, gate in self.gates.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.gates = {key: gate.repeat_interleave(repeats, dim=0) for key, gate in self.gates.items()}

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.gates = {}

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.get_seq_length() == 0:  # type: ignore[attr-defined]
            self.gates = {}


@functools.cache
def _keeping(cache_class: type[Cache]) -> type[Cache]:
    return type(f"GateKeeping{cache_class.__name__}", (GateKeeper, cache_class), {})


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What a self-attention module was called with, for its query and key layers."""

    routing: Routing
    cache: Cache | None
    layer: int

    def kept_alpha(self, adapter: str) -> Tensor | None:
        """alpha of the prompt in the cache; None while there is no prompt yet.

        Raises AdapterError when the cache was filled without this adapter.
        """
        if self.cache is None:
            return None
        alpha = getattr(self.cache, "gates", {}).get((self.layer, adapter))
        if alpha is None and self.cache.get_seq_length(self.layer) > 0:
            raise AdapterError(
                f"adapter {adapter!r}: the KV cache holds a prompt that was read without this adapter, so its gate "
                "alpha is unknown. Start from an empty cache after switching adapters on or over."
            )
        return alpha

    def keep_alpha(self, adapter: str, alpha: Tensor) -> None:
        """Leave alpha with the cache, so that branches with separate (or deep-copied) caches never mix."""
        cache: Any = self.cache
        if cache is None:
            return
        if not isinstance(cache, GateKeeper):
            # The object stays the one its owner holds; only its class learns to carry the gates along.
            cache.__class__ = _keeping(type(cache))
            cache.gates = {}
        cache.gates[self.layer, adapter] = alpha
