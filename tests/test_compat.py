"""Canaries: a release of transformers or PEFT that moves a name that we use fails here, and says which."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    DynamicCache,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2VLForConditionalGeneration,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

import a3tune
from a3tune.adapters.layer import RoutedKey, RoutedQuery
from a3tune.adapters.model import A3MoEModel
from a3tune.compat import attention, autograd, generation, peft, processing, training
from a3tune.training.trainer import A3Trainer
from a3tune.vlm.tiny import random_vlm

SOURCE = Path(str(a3tune.__file__)).parent
UNSETTLED = ("transformers.", "peft.", "accelerate.")
SETTLED = ("transformers.utils.logging", "peft.utils", "accelerate.utils")
"""Submodules that their documentation names."""
OVERRIDDEN = peft.OVERRIDDEN | training.OVERRIDDEN
PRIVATE = {
    "adapters/model.py": set(peft.OVERRIDDEN[peft.LoraModel]),
    "attention/capture.py": {"_softmax_backward_data"},  # PyTorch's own derivative of softmax: test_capture.py
    "data/pictures.py": {"_replace"},  # of named tuples, documented
    "machine/signals.py": {"_exit"},  # of `os`, documented
    "machine/workers.py": {"_exit"},
    "training/checkpoint.py": {"_save_checkpoint"},
    "training/counting.py": {"_get_num_items_in_batch"},
    "training/mixin.py": {"_load_optimizer_and_scheduler"},
}
"""Private names of others that stand outside `compat/`: what overrides them calls them, or a test watches them."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in OVERRIDDEN.items() for name in names],
)
def test_what_we_override_is_there(kind: type, name: str) -> None:
    assert callable(getattr(kind, name, None)), f"{kind.__name__}.{name} is gone: what ours overrides is never called"


@pytest.mark.parametrize("ours", [A3MoEModel, RoutedQuery, RoutedKey, A3Trainer])
def test_all_that_we_override_is_listed(ours: type) -> None:
    bases = [kind for kind in ours.__mro__ if not kind.__module__.startswith("a3tune.")]
    named = {name for kind in ours.__mro__ if kind not in bases for name in vars(kind) if not name.startswith("__")}
    overridden = {name for name in named if any(callable(vars(kind).get(name)) for kind in bases)}
    listed = {name for kind, names in OVERRIDDEN.items() if issubclass(ours, kind) for name in names}
    # PEFT documents these.
    assert overridden - {"add_weighted_adapter", "forward"} <= listed


@pytest.mark.parametrize(
    "name",
    [
        "_beam_search",
        "_sample",
        "_prefill",
        "_prepare_multimodal_encoder_kwargs_for_generation",
        "_prepare_position_ids_for_generation",
        "_update_model_kwargs_for_generation",
        "_expand_inputs_for_generation",
        "prepare_inputs_for_generation",
    ],
)
def test_models_generate_by_the_names_we_call(name: str) -> None:
    assert callable(getattr(random_vlm(layers=1, heads=2, kv_heads=2, hidden=16), name, None))


def test_attention_and_decoder_call_the_cache_alike() -> None:
    for forward in (LlamaAttention.forward, LlamaModel.forward):
        assert generation.CACHE in inspect.signature(forward).parameters
    taken = inspect.signature(DynamicCache.update).parameters
    assert {"key_states", "value_states", "layer_idx"} <= taken.keys()


def test_passes_carry_the_kinds_of_tokens_by_these_names() -> None:
    assert "token_type_ids" in inspect.signature(Gemma3ForConditionalGeneration.forward).parameters
    assert "mm_token_type_ids" in inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters
    assert {"token_type_ids", "mm_token_type_ids"} <= set(generation.CARRIED)


def test_the_inner_model_takes_what_routing_is_derived_from() -> None:
    inner = random_vlm(layers=1, heads=2, kv_heads=2, hidden=16).base_model
    assert {"input_ids", "attention_mask"} <= inspect.signature(inner.forward).parameters.keys()


@pytest.mark.parametrize("kind", [MistralConfig, Gemma3TextConfig])
def test_attention_functions_are_told_what_we_read(kind: type[PreTrainedConfig]) -> None:
    told: list[dict[str, Any]] = []

    def tell(module: torch.nn.Module, *args: Any, **keywords: Any) -> Any:
        told.append(keywords)
        return attention.sdpa_attention_forward(module, *args, **keywords)  # type: ignore[arg-type]

    AttentionInterface.register("told", tell)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = kind(**shape, num_hidden_layers=1, head_dim=8, vocab_size=8, sliding_window=4, pad_token_id=0)
    AutoModel.from_config(config, attn_implementation="told")(torch.tensor([[1, 2, 3]]))
    assert told[0]["scaling"] > 0
    assert told[0]["sliding_window"] == 4
    assert {"scaling", "is_causal"} <= inspect.signature(attention.sdpa_attention_forward).parameters.keys()


def test_a_pass_leaves_its_cache_under_the_name_that_the_next_one_takes() -> None:
    model = random_vlm(layers=1, heads=2, kv_heads=2, hidden=16)
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    carried = {"attention_mask": inputs["attention_mask"], generation.CACHE: cache, "use_cache": True}
    positions = generation.first_positions(model, inputs)
    arguments = generation.first_pass(model, {"input_ids": inputs["input_ids"], **carried, "position_ids": positions})
    outputs = model(**arguments, return_dict=True)
    assert cache.get_seq_length() == 3
    carried = generation.after_pass(model, outputs, carried)
    assert carried[generation.CACHE] is cache and carried["attention_mask"].shape == (1, 4)
    again = generation.next_pass(model, {"input_ids": torch.tensor([[1, 5, 6, 7]]), **carried})
    assert again["input_ids"].tolist() == [[7]]


def test_attention_functions_and_processors_are_where_we_take_them_from() -> None:
    model = random_vlm(layers=1, heads=2, kv_heads=2, hidden=16)
    assert attention.attention_implementation(model) == model.config.text_config._attn_implementation
    assert processing.processor_class(model.config).__name__ == "LlavaProcessor"
    assert processing.smart_resize(100, 100, factor=28) == (112, 112)


def test_autograd_tells_a_replayed_pass_from_a_first_one() -> None:
    found = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(autograd.in_backward())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    for reentrant in (False, True):
        torch.utils.checkpoint.checkpoint(note, x, use_reentrant=reentrant).sum().backward()
    assert found == [False, True] * 2 and not autograd.in_backward()


def test_a_training_on_several_devices_is_told_to_take_one() -> None:
    args = TrainingArguments(use_cpu=True, report_to=[])
    assert args.n_gpu <= 1
    args._n_gpu = 2
    assert args.n_gpu == 2
    training.one_device(args)
    assert args.n_gpu == 1


def outside() -> list[tuple[str, ast.AST]]:
    """Every node of our code that is not in `compat/`, with its file."""
    paths = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py"))]
    ours = [path for path in paths if path.parts[0] != "compat" and path.parent.name != "scripts"]
    return [(path.as_posix(), node) for path in ours for node in ast.walk(ast.parse((SOURCE / path).read_text()))]


def test_modules_inside_these_libraries_are_imported_by_one_room() -> None:
    imported = {(path, getattr(node, "module", None) or "") for path, node in outside()}
    strays = {(path, module) for path, module in imported if module.startswith(UNSETTLED)}
    assert not {(path, module) for path, module in strays if not module.startswith(SETTLED)}


def test_private_names_of_others_stand_in_one_room() -> None:
    ours = {"self", "cls", "other"}
    strays = [
        f"{path}:{node.lineno}: {node.attr}"
        for path, node in outside()
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ours)
        if node.attr not in PRIVATE.get(path, ())
    ]
    assert not strays
