"""Q-MoE and K-MoE against slow, obvious loop versions of Eq. 4-7, in values and in gradients."""

import math
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from a3tune.adapters import KeyExperts, QueryExperts
from a3tune.adapters.experts import StackedExperts

Experts = TypeVar("Experts", bound=StackedExperts)
D_IN, D_OUT, RANK, ALPHA = 6, 5, 2, 3.0


def filled(module: Experts, seed: int = 0) -> Experts:
    """fp64, and B not zero, so that every path carries a value and a gradient."""
    torch.manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def query_experts(experts: int = 4, **more) -> QueryExperts:
    return filled(QueryExperts(D_IN, D_OUT, experts=experts, rank=RANK, alpha=ALPHA, router_hidden=7, **more))


def key_experts(experts: int = 5, top: int = 2, **more) -> KeyExperts:
    return filled(KeyExperts(D_IN, D_OUT, experts=experts, top=top, rank=RANK, alpha=ALPHA, router_hidden=7, **more))


def expert_delta(module: StackedExperts, o: int) -> Tensor:
    """E_o = B_o A_o, scaled as in LoRA, cut out of the stacks."""
    rows = slice(o * RANK, (o + 1) * RANK)
    return module.B.weight[:, rows] @ module.A.weight[rows] * (ALPHA / RANK)


def mlp(module: StackedExperts, state: Tensor) -> Tensor:
    first, last = module.router[0], module.router[2]
    hidden = first.weight @ state + first.bias
    return last.weight @ (hidden * torch.sigmoid(hidden)) + last.bias


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def loop_query(module: QueryExperts, x: Tensor, prompt_mask: Tensor) -> Tensor:
    """Eq. 4-5, one sample, one token, one expert at a time."""
    samples = []
    for states, mask in zip(x, prompt_mask, strict=True):
        prompt = [state for state, is_prompt in zip(states, mask, strict=True) if is_prompt]
        pooled = sum(prompt) / len(prompt) if prompt else torch.zeros(D_IN, dtype=x.dtype)
        alpha = softmax(mlp(module, pooled))
        delta_w = sum(alpha[o] * expert_delta(module, o) for o in range(module.experts))
        samples.append(torch.stack([delta_w @ state for state in states]))
    return torch.stack(samples)


def loop_key(module: KeyExperts, x: Tensor, image_mask: Tensor) -> Tensor:
    """Eq. 6-7, one token, one expert at a time."""
    samples = []
    for states, mask in zip(x, image_mask, strict=True):
        rows = []
        for state, is_image in zip(states, mask, strict=True):
            row = torch.zeros(D_OUT, dtype=x.dtype)
            if is_image or module.text_tokens:
                beta = softmax(mlp(module, state))
                best = sorted(range(module.experts), key=lambda o: -beta[o].item())[: module.top]
                for o in range(module.experts):
                    indicator = 1 if o in best else 0
                    row = row + indicator * beta[o] * (expert_delta(module, o) @ state)
            rows.append(row)
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def inputs(samples: int = 3, tokens: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(samples, tokens, D_IN, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(samples, tokens) > 0.5
    mask[-1] = False
    return x, mask


def assert_same(module: StackedExperts, x: Tensor, fast: Tensor, slow: Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    probe = torch.randn_like(fast)
    wanted = [x, *module.parameters()]
    for got, expected in zip(
        torch.autograd.grad((fast * probe).sum(), wanted),
        torch.autograd.grad((slow * probe).sum(), wanted),
        strict=True,
    ):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_query_experts_equal_the_loop():
    module = query_experts()
    x, prompt_mask = inputs()
    assert_same(module, x, module(x, module.gate(x, prompt_mask)), loop_query(module, x, prompt_mask))


@pytest.mark.parametrize("text_tokens", [False, True])
@pytest.mark.parametrize("top", [1, 2, 5])
def test_key_experts_equal_the_loop(top: int, text_tokens: bool):
    module = key_experts(top=top, text_tokens=text_tokens)
    x, image_mask = inputs()
    assert_same(module, x, module(x, image_mask), loop_key(module, x, image_mask))


def test_gradients_equal_finite_differences():
    query, key = query_experts(experts=3), key_experts(experts=4)
    x, mask = inputs(samples=2, tokens=4)
    assert torch.autograd.gradcheck(lambda x: query(x, query.gate(x, mask)), x)
    assert torch.autograd.gradcheck(lambda x: key(x, mask), x)


def test_text_tokens_get_no_key_delta_and_send_no_gradient():
    module = key_experts()
    x, image_mask = inputs()
    delta = module(x, image_mask)
    assert (delta[~image_mask] == 0).all() and (delta[image_mask] != 0).any()
    delta.sum().backward()
    assert (x.grad[~image_mask] == 0).all()


def test_no_image_token_in_the_input_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    module = key_experts()
    monkeypatch.setattr(StackedExperts, "mix", lambda *_: pytest.fail("computed a delta"))
    monkeypatch.setattr(StackedExperts, "probabilities", lambda *_: pytest.fail("computed a gate"))
    assert module(torch.randn(2, 1, D_IN), None) is None


@given(st.integers(1, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_gate_keeps_the_top_experts_as_they_are(experts: int, data: st.DataObject):
    top = data.draw(st.integers(1, experts))
    module = key_experts(experts=experts, top=top)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    gate, full = module.gate(x, torch.ones(2, 3, dtype=torch.bool)), module.probabilities(x)
    assert ((gate > 0).sum(-1) == top).all()
    assert torch.equal(gate[gate > 0], full[gate > 0])
    assert (gate.sum(-1) <= 1 + 1e-12).all() and (top == experts) == bool((gate.sum(-1) > 1 - 1e-12).all())


def test_padding_does_not_reach_the_gate_of_the_prompt():
    module = query_experts()
    x, _ = inputs(samples=1)
    mask = torch.ones(1, 7, dtype=torch.bool)
    padded = torch.cat([torch.full((1, 4, D_IN), 1e3, dtype=x.dtype), x], dim=1)
    padded_mask = torch.cat([torch.zeros(1, 4, dtype=torch.bool), mask], dim=1)
    torch.testing.assert_close(module.gate(padded, padded_mask), module.gate(x, mask), rtol=0, atol=1e-14)


def test_starts_as_the_base_model_like_lora():
    module = KeyExperts(D_IN, D_OUT, experts=3, top=2, rank=RANK, alpha=ALPHA, router_hidden=7)
    assert (module.B.weight == 0).all()
    assert 0 < module.A.weight.abs().max() <= 1 / math.sqrt(D_IN)


def test_load_counts_image_tokens_only():
    module = key_experts(experts=4, top=2)
    x, image_mask = inputs()
    module(x, image_mask)
    beta = module.probabilities(x)[image_mask]
    counts = torch.zeros(4, dtype=torch.float64)
    for row in beta:
        counts[row.topk(2).indices] += 1
    assert module.load is not None and not module.load.use.requires_grad and not module.load.entropy.requires_grad
    torch.testing.assert_close(module.load.use, counts / counts.sum())
    torch.testing.assert_close(module.load.entropy, -(beta * beta.log()).sum(-1).mean().detach())
    assert module.balance_term is None


def test_load_without_any_image_token_is_zero():
    module = key_experts()
    x, image_mask = inputs()
    module(x, torch.zeros_like(image_mask))
    assert module.load is not None and (module.load.use == 0).all() and module.load.entropy == 0


def test_balance_term_is_the_loop_of_switch_and_pushes_towards_balance():
    module = key_experts(experts=4, top=1, balance=True)
    x, image_mask = inputs(samples=4, tokens=30)
    module(x, image_mask)
    beta = module.probabilities(x)[image_mask]
    expected = 4 * sum((beta.argmax(-1) == o).double().mean() * beta[:, o].mean() for o in range(4))
    first = module.balance_term
    assert first is not None
    torch.testing.assert_close(first, expected)
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.05)
    for _ in range(40):
        module(x.detach(), image_mask)
        optimizer.zero_grad()
        module.balance_term.backward()
        optimizer.step()
    assert module.balance_term < first and module.balance_term < 1.1


def test_dropout_acts_on_the_experts_and_not_on_the_gate():
    module = query_experts(dropout=0.9)
    x, prompt_mask = inputs()
    alpha = module.train().gate(x, prompt_mask)
    assert torch.equal(alpha, module.eval().gate(x, prompt_mask))
    assert not torch.equal(module.train()(x, alpha), module.eval()(x, alpha))


def test_half_precision_softmax_is_fp32():
    module = key_experts().bfloat16()
    assert module.probabilities(torch.randn(2, D_IN, dtype=torch.bfloat16)).dtype == torch.float32


def test_masks_may_stand_on_another_device(monkeypatch: pytest.MonkeyPatch):
    """The layers of a model that `model.device_map` spreads over devices get the masks of the first one."""
    monkeypatch.setattr(StackedExperts, "record", lambda *_: None)  # autocast knows no device "meta"
    prompt_mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.device("meta"):
        experts = QueryExperts(8, 8, experts=2, rank=2, alpha=4, router_hidden=4)
        assert experts(torch.zeros(2, 5, 8), experts.gate(torch.zeros(2, 5, 8), prompt_mask)).is_meta
        keys = KeyExperts(8, 8, experts=2, rank=2, alpha=4, router_hidden=4, top=1)
        found = keys(torch.zeros(2, 5, 8), prompt_mask)
    assert found is not None and found.is_meta


def test_how_experts_are_used_is_counted_in_fp32_within_autocast():
    torch.manual_seed(0)
    keys = KeyExperts(8, 8, experts=3, rank=2, alpha=4, router_hidden=4, top=1)
    with torch.autocast("cpu", torch.bfloat16):
        keys(torch.randn(1, 3001, 8), torch.ones(1, 3001, dtype=torch.bool))
    assert keys.load is not None and float(keys.load.use.sum()) == pytest.approx(1, abs=1e-6)
