"""Canaries: a release of transformers or PEFT that moves a name that we use fails here, and says which."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

import a3tune
from a3tune.compat import attention, autograd, generation, peft, processing, training
from a3tune.vlm.tiny import random_vlm

SOURCE = Path(str(a3tune.__file__)).parent
UNSETTLED = ("transformers.", "peft.")
SETTLED = ("transformers.utils.logging", "peft.utils")
"""Submodules that their documentation names."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for owner in (peft, training) for kind, names in owner.OVERRIDDEN.items() for name in names],
)
def test_what_we_override_is_there(kind: type, name: str) -> None:
    assert callable(getattr(kind, name, None)), f"{kind.__name__}.{name} is gone: what ours overrides is never called"


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


def test_private_names_stand_in_one_room() -> None:
    """No other room imports from inside these libraries."""
    strays = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.is_relative_to(SOURCE / "compat") or path.parent.name == "scripts":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if module.startswith(UNSETTLED) and not module.startswith(SETTLED):
                strays.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {module}")
    assert not strays
