"""PEFT's tuners and registries: what a new kind of adapter is made of."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
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


def own_module(module: nn.Module) -> nn.Module | None:
    """The model's own module that this one adapts, or trains a copy of; None where a module stands for itself."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):  # of `modules_to_save`
        return module.original_module
    return None


def present_names(model: nn.Module, config: Any, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Tensors of an adapter's file and their shapes, by the names that this release of transformers has for the layers.

    Its language models moved (`language_model.model.layers` is `model.language_model.layers` now); PEFT renames alike.
    """
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    renamed = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    return {key: list(tensor.shape) for key, tensor in renamed.items()}


def take_out(model: nn.Module, hooks: Sequence[Any]) -> None:
    """Every adapted or trained module's own in its place again, and forward pre-hooks of these functions removed."""
    for path, module in list(model.named_modules()):
        own = own_module(module)
        if own is not None and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, own)
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__func__", hook) in hooks:
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if hasattr(model, "peft_config"):
        del model.peft_config
