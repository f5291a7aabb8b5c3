"""PEFT's tuners and registries: what a new kind of adapter is made of."""

from collections.abc import Sequence
from typing import Any

from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

__all__ = ["Linear", "LoraLayer", "LoraModel", "check_target_module_exists", "disable_input_dtype_casting", "register"]

OVERRIDDEN = {
    LoraModel: (
        "_pre_injection_hook",
        "_check_new_adapter_config",
        "_prepare_adapter_config",
        "_prepare_model",
        "_create_and_replace",
        "_create_new_module",
        "_remove_adapter_name_from_key",
        "_remap_adapter_state_dict_for_load",
        "_enable_peft_forward_hooks",
        "_check_merge_allowed",
        "_unload_and_optionally_merge",
    ),
    Linear: ("update_layer", "supports_lora_conversion", "_cast_input_dtype", "_move_adapter_to_device_of_base_layer"),
}
"""Methods of PEFT that ours override or call; under other names they would never be called."""


def register(kind: str, config: type, tuner: type) -> None:
    """Make an adapter type known. PEFT's own `register_peft_method` accepts only the names in its enum."""
    mappings: Any = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for mapping, value in zip(mappings, (config, tuner, tuner.prefix), strict=True):
        mapping[kind] = value


def has_forward_pre_hook(module: nn.Module, hook: Any) -> bool:
    """Whether a function is among the forward pre-hooks of a module; torch has no public way to ask."""
    return hook in module._forward_pre_hooks.values()


def is_adapted(module: nn.Module) -> bool:
    """Whether a module stands in the place of one that it adapts."""
    return isinstance(module, BaseTunerLayer)


def take_out(model: nn.Module, hooks: Sequence[Any]) -> None:
    """Every adapted module's own module in its place again, and forward pre-hooks of these functions removed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__func__", hook) in hooks:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if hasattr(model, "peft_config"):
        del model.peft_config
