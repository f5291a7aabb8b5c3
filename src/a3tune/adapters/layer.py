"""The linear layers that Q-MoE and K-MoE adapt, in PEFT's shape: a base layer and, per adapter name, its experts."""

from typing import Any

from torch import Tensor, nn

from a3tune.adapters.config import A3MoEConfig
from a3tune.adapters.experts import KeyExperts, QueryExperts, StackedExperts
from a3tune.adapters.routing import WHOLE_PROMPT, AttentionCall
from a3tune.compat.generation import CACHE
from a3tune.compat.peft import Linear, LoraLayer
from a3tune.errors import AdapterError


class RoutedLinear(Linear):
    """A LoRA layer some of whose adapters are mixtures of experts; those with zero experts are plain LoRA here.

    The self-attention module's pre-hook (`hand_call`) leaves the `AttentionCall` of each pass in `call`.
    """

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_experts")

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: A3MoEConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = self.is_target_conv_1d_layer = False
        self.lora_experts = nn.ModuleDict()
        self.call: AttentionCall | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **kwargs)

    def make_experts(self, config: A3MoEConfig) -> StackedExperts | None:
        """The experts that `config` asks for on this matrix; None for plain LoRA."""
        raise NotImplementedError

    def delta(self, adapter: str, x: Tensor, call: AttentionCall) -> Tensor | None:
        """What the experts of one adapter add to the projection of `x [B, S, D]`; None for nothing."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: A3MoEConfig, **kwargs: Any) -> None:  # type: ignore[override]
        experts = self.make_experts(config)
        if experts is None:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
            return
        self.lora_experts[adapter_name] = experts
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call, self.call = self.call, None
        result = super().forward(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter not in self.lora_experts:
                continue
            if call is None:
                raise AdapterError(
                    f"adapter {adapter!r}: expected `input_ids`, from which the routing is derived, got none. Call the "
                    "model, or `generate`, with input_ids; a forward pass over inputs_embeds alone takes "
                    "routing=Routing(prompt_mask, image_mask), which `generate` does not."
                )
            dtype = next(self.lora_experts[adapter].parameters()).dtype
            delta = self.delta(adapter, self._cast_input_dtype(x, dtype), call)
            if delta is not None:
                result = (result + delta).to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.lora_experts and super().supports_lora_conversion(adapter_name)

    def _stacked(self, config: A3MoEConfig) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": config.expert_rank,
            "alpha": config.expert_alpha,
            "router_hidden": config.router_hidden,
            "dropout": config.lora_dropout,
            "balance": config.balance,
        }


class RoutedQuery(RoutedLinear):
    """`q_proj` with Q-MoE. alpha is computed when the prompt is read, and kept with the KV cache from then on."""

    def make_experts(self, config: A3MoEConfig) -> QueryExperts | None:
        if config.query_experts == 0:
            return None
        return QueryExperts(experts=config.query_experts, **self._stacked(config))

    def delta(self, adapter: str, x: Tensor, call: AttentionCall) -> Tensor:
        experts: QueryExperts = self.lora_experts[adapter]  # type: ignore[assignment]
        alpha = call.kept_alpha(adapter)
        if alpha is not None and x.shape[1] > 1 and call.routing.prompt_mask.any():
            raise AdapterError(
                f"adapter {adapter!r}: the KV cache holds the gates of a prompt, and {x.shape[1]} more tokens of one "
                f"come at once. {WHOLE_PROMPT}"
            )
        if alpha is None:
            alpha = experts.gate(x, call.routing.prompt_mask)
            call.keep_alpha(adapter, alpha)
        elif len(alpha) != len(x):
            raise AdapterError(
                f"adapter {adapter!r}: the KV cache keeps gates for {len(alpha)} samples, the input has {len(x)}. "
                "Change the batch through the cache's own methods (reorder_cache, batch_select_indices, ...)."
            )
        return experts(x, alpha)


class RoutedKey(RoutedLinear):
    """`k_proj` with K-MoE."""

    def make_experts(self, config: A3MoEConfig) -> KeyExperts | None:
        if config.key_experts == 0:
            return None
        return KeyExperts(
            experts=config.key_experts,
            top=config.top_experts,
            text_tokens=config.key_text_tokens,
            **self._stacked(config),
        )

    def delta(self, adapter: str, x: Tensor, call: AttentionCall) -> Tensor | None:
        return self.lora_experts[adapter](x, call.routing.image_mask)


def hand_call(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a self-attention module: take `routing` out and hand it to the query and key layers.

    It travels as a keyword because activation checkpointing replays the module with its keywords, long after any
    context of the first pass is gone.
    """
    kwargs = dict(kwargs)
    routing = kwargs.pop("routing", None)
    if CACHE not in kwargs:
        # Taken for a pass without a cache, every decoding step would route by its own token alone.
        raise AdapterError(
            f"{type(attention).__name__}: expected its KV cache, or None, as the keyword {CACHE!r}, got "
            f"{', '.join(kwargs) or 'no keywords'}. Install a version of transformers that a3tune allows."
        )
    call = routing and AttentionCall(routing, kwargs[CACHE], attention.layer_idx)  # type: ignore[arg-type]
    for layer in attention.children():
        if isinstance(layer, RoutedLinear):
            layer.call = call
    return args, kwargs
