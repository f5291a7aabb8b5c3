"""Activation checkpointing replays a layer after its forward pass is over: in every family it does the same again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3tune.adapters import add_adapter, balance_loss
from a3tune.adapters.experts import StackedExperts
from a3tune.attention.capture import capture_request, stack
from a3tune.config import AdapterConfig
from a3tune.errors import AdapterError
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import look
from zoo import ZOO
from zoo.checks import ADAPTER, batch, load


def learn(vlm: Vlm, *, reentrant: bool | None = None) -> dict[str, Tensor]:
    """Gradients of a loss that all we add has a part in; `reentrant`: None is without checkpointing."""
    torch.manual_seed(3)
    model = add_adapter(vlm.model, AdapterConfig(**ADAPTER, dropout=0.4), balance=True).train()
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    if reentrant is not None:
        base: Any = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    inputs, masks = batch(vlm)
    request = capture_request("after_image", **masks)
    outputs = look(model, inputs, masks, request)
    aligned = stack(outputs.attentions, request).map_BLHN.square().sum()
    (outputs.loss + aligned + balance_loss(model)).backward()
    experts = [module for module in model.modules() if isinstance(module, StackedExperts)]
    assert all(module.balance_term is None for module in experts), "what was replayed is held on to"
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ZOO)
def test_a_replayed_pass_is_the_same_pass(name: str, tmp_path: Path) -> None:
    ZOO[name](tmp_path)
    expected, found = learn(load(tmp_path)), learn(load(tmp_path), reentrant=False)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6, msg=key)


def test_a_balance_term_that_reaches_no_router_is_refused(tmp_path: Path) -> None:
    ZOO[next(iter(ZOO))](tmp_path)
    with pytest.raises(AdapterError, match=r"no gradient reaches the routers.*use_reentrant"):
        learn(load(tmp_path), reentrant=True)
