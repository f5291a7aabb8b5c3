"""The A3MoE tuner: injects the layers, installs the routing hooks, refuses what routing makes impossible."""

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from a3tune.adapters.config import A3MoEConfig, fingerprint
from a3tune.adapters.layer import RoutedKey, RoutedLinear, RoutedQuery, hand_call
from a3tune.adapters.routing import (
    NEEDS_CACHE,
    WHOLE_PROMPT,
    derive_routing,
    image_token_id,
    in_parts,
    without_cache,
)
from a3tune.compat.peft import LoraModel, check_target_module_exists, has_forward_pre_hook
from a3tune.errors import AdapterError

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers; here those of the language model."""
_NAMED_EXPERTS = re.compile(r"(\.lora_experts)\.[^.]+(\.(?:A|B|router\.\d+)\.(?:weight|bias))$")
ROUTED: dict[str, type[RoutedLinear]] = {"q_proj": RoutedQuery, "k_proj": RoutedKey}


def decoder_prefix(model: PreTrainedModel) -> str:
    """Path of the language model inside a VLM, with the last dot: `model.language_model.`."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    return f"{path}." if path else ""


def language_linears(model: PreTrainedModel, layers: Sequence[int] | None = None) -> str:
    """Regular expression of all linear layers of the language model: no vision tower, no projector, no output head.

    `layers` are the numbers of the decoder layers that are adapted; None is all of them.
    """
    names = {
        # Also right on a model that carries an adapter: its layers hold the adapted one as `base_layer`.
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    within = ".*" if layers is None else rf"layers\.(?:{'|'.join(map(str, layers))})\..*"
    return rf"{re.escape(decoder_prefix(model))}{within}\.(?:{'|'.join(sorted(map(re.escape, names)))})"


def without_adapter_name(key: str) -> str:
    """Key of an adapter's file without the adapter's name, which experts carried in files of earlier versions."""
    return _NAMED_EXPERTS.sub(r"\1\2", key)


class A3MoEModel(LoraModel):
    """PEFT's tuner for `A3MoEConfig`.

    As everywhere in PEFT, leaving `disable_adapter()` turns `requires_grad` of the active adapters on, also for an
    adapter loaded for inference: call `requires_grad_(False)` afterwards if that matters.
    """

    model: PreTrainedModel  # type: ignore[assignment]
    _hooks: list[RemovableHandle]
    _decoder: str
    """Path prefix of the language model's modules, with the last dot."""

    def _pre_injection_hook(self, model: nn.Module, config: A3MoEConfig, adapter_name: str) -> None:  # type: ignore[override]
        self._hooks = []
        self._decoder = decoder_prefix(self.model)

    def _check_new_adapter_config(self, config: A3MoEConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        image_token_id(self.model.config)
        check_base(config.base, self.model)

    def _prepare_adapter_config(self, peft_config: A3MoEConfig, model_config: dict) -> A3MoEConfig:  # type: ignore[override]
        peft_config.base = fingerprint(self.model.config)
        asked: Any = peft_config.target_modules
        if asked is None or (isinstance(asked, str) and asked.lower() == ALL_LINEAR):
            layers: Any = peft_config.layers_to_transform
            peft_config.target_modules = language_linears(self.model, [layers] if isinstance(layers, int) else layers)
            # The expression says it already, and PEFT takes no layers beside an expression when it reads the adapter.
            peft_config.layers_to_transform = None
        targets = {name for name, _ in self.model.named_modules() if check_target_module_exists(peft_config, name)}
        for matrix, experts in {"q_proj": peft_config.query_experts, "k_proj": peft_config.key_experts}.items():
            if experts and not any(self._routed_class(name) is ROUTED[matrix] for name in targets):
                raise AdapterError(
                    f"{type(self.model).__name__}: expected linear layers named {matrix!r} in its language model, "
                    "found none to adapt. Use an adapter without experts on that matrix, or plain LoRA."
                )
        return peft_config

    def _routed_class(self, path: str) -> type[RoutedLinear] | None:
        return ROUTED.get(path.rpartition(".")[2]) if path.startswith(self._decoder) else None

    def _prepare_model(self, peft_config: A3MoEConfig, model: nn.Module) -> None:  # type: ignore[override]
        super()._prepare_model(peft_config, model)
        self._install(self.model.base_model, self.route_pass)

    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:  # type: ignore[override]
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        if isinstance(getattr(parent, target_name), RoutedLinear):
            self._install(parent, hand_call)

    def _create_new_module(
        self, lora_config: A3MoEConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:  # type: ignore[override]
        # Layers that a later adapter may route are routed layers from the start: PEFT extends them adapter by adapter.
        routed = self._routed_class(kwargs["target_name"])
        if routed is not None:
            return routed(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def route_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # A plain LoRA adapter beside ours knows no markup and asks for no routing.
        configs = [self.peft_config[name] for name in self.active_adapters]
        if without_cache(kwargs) and self._pools_prompts:
            raise AdapterError(f"{type(self.model).__name__}: {NEEDS_CACHE}")
        control, layout = (
            sorted({index for config in configs for index in getattr(config, name, ())})
            for name in ("control_ids", "layout_ids")
        )
        return derive_routing(model, args, kwargs, control, layout)

    @property
    def _pools_prompts(self) -> bool:
        """Whether an active adapter has a Q-MoE, and is not switched off."""
        queries = (module for module in self.model.modules() if isinstance(module, RoutedQuery))
        return any(
            not layer.disable_adapters and layer.lora_experts.keys() & layer.active_adapters for layer in queries
        )

    def _install(self, module: nn.Module, hook: Any) -> None:
        if not has_forward_pre_hook(module, hook):
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _check_merge_allowed(self) -> None:
        routed = [name for name, config in self.peft_config.items() if getattr(config, "routed", False)]
        if routed:
            raise AdapterError(
                f"adapter {', '.join(map(repr, routed))}: cannot be merged, because its change of the query and key "
                "weights depends on the prompt and on the image token (Eq. 5, 7); one weight matrix cannot hold it. "
                "Keep the adapter beside the base model, or delete it before merging a plain one."
            )
        super()._check_merge_allowed()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Files do not name their adapter: PEFT takes the name out of its own layers, but not out of ours."""
        if f".lora_experts.{adapter_name}." in key:
            return without_adapter_name(key)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for key, value in state_dict.items():
            check_values(key, value)
        nameless = {without_adapter_name(key): value for key, value in state_dict.items()}
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, nameless)
        # PEFT starts what a file lacks at random; `PeftModel.load_adapter` does not even warn.
        ours = re.compile(rf"\.lora_\w+\.{re.escape(adapter_name)}(?:\.|$)")
        expected = {key for key in model.state_dict() if ours.search(key)}
        check_tensors(expected, {key for key in loaded if ".lora_" in key})
        return loaded

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        # Before PEFT installs its hooks, which an error of the pass itself would leave behind.
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("adapter_names: A3MoE adapters cannot be mixed within a batch. Use `set_adapter`.")
        if in_parts(*args[:1], **kwargs) and self._pools_prompts:
            raise AdapterError(f"{type(self.model).__name__}: would read a prompt in parts. {WHOLE_PROMPT}")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        routed = [name for name in adapters if getattr(self.peft_config.get(name), "routed", False)]
        if routed:
            raise AdapterError(
                f"adapter {', '.join(map(repr, routed))}: cannot be weighted into another adapter: its change of the "
                "query and key weights depends on the prompt and on the image token (Eq. 5, 7), and a sum would drop "
                "it. Combine plain LoRA adapters."
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        while self._hooks:
            self._hooks.pop().remove()
        return model  # type: ignore[return-value]


def name_markup(model: nn.Module, control_ids: Sequence[int], layout_ids: Sequence[int]) -> None:
    """Tell a model's A3MoE adapters that know no markup (`get_peft_model(model, A3MoEConfig())`) which tokens it is.

    A training keeps them out of the prompt, so `generate` must, too.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for config in configs.values() if isinstance(configs, dict) else ():
            if isinstance(config, A3MoEConfig) and not config.control_ids:
                config.control_ids, config.layout_ids = list(control_ids), list(layout_ids)


def check_values(key: str, values: Tensor) -> None:
    """AdapterError unless a tensor of an adapter's file holds floating-point numbers, all finite."""
    if not values.is_floating_point():
        raise AdapterError(f"{key}: expected floating-point weights, got {values.dtype}. Copy the adapter anew.")
    if not values.isfinite().all():
        raise AdapterError(f"{key} holds values that are no numbers. Copy the adapter anew.")


def check_tensors(expected: set[str], got: set[str]) -> None:
    """AdapterError unless an adapter's file holds exactly the tensors that its settings ask for."""
    if differing := sorted(expected ^ got):
        raise AdapterError(
            f"expected {len(expected)} tensors, as adapter_config.json asks for, got {len(got)} "
            f"(first difference: {differing[0]}). What is missing would be random: copy the adapter anew."
        )


def check_base(recorded: dict[str, Any] | None, model: PreTrainedModel) -> None:
    """AdapterError unless the recorded fingerprint, if any, is that of `model`."""
    present = fingerprint(model.config)
    if recorded is not None and recorded != present:
        differing = [name for name in present if recorded.get(name) != present[name]]
        was, now = ({name: side.get(name) for name in differing} for side in (recorded, present))
        raise AdapterError(
            f"adapter of another base model: expected {was}, but this model has {now}. Load the base model that the "
            "adapter was trained on, or train a new adapter from a fresh A3MoEConfig."
        )
