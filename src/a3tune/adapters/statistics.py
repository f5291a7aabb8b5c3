"""What the routed layers did in the last pass: use and entropy of the experts, and the optional balance term."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from a3tune.adapters.experts import GateLoad, KeyExperts, QueryExperts, StackedExperts
from a3tune.adapters.layer import RoutedLinear
from a3tune.errors import AdapterError

KINDS: dict[str, type[StackedExperts]] = {"query": QueryExperts, "key": KeyExperts}


def active_experts(model: nn.Module) -> Iterator[StackedExperts]:
    """The experts of all active adapters, first layer first."""
    for module in model.modules():
        if isinstance(module, RoutedLinear) and not module.disable_adapters:
            yield from (module.lora_experts[name] for name in module.active_adapters if name in module.lora_experts)  # type: ignore[misc]


def gate_loads(model: nn.Module) -> dict[str, GateLoad]:
    """`{"query" | "key": GateLoad}` with a leading layer axis: `use [L, O]`, `entropy [L]`.

    Of the last pass that computed gates (decoding steps reuse alpha and hold no image token). Detached and left on the
    device: reading them costs no synchronisation. A kind without experts, or before any pass, is missing. With several
    active adapters their layers follow one another and must have the same number of experts.
    """
    by_kind = {}
    for kind, cls in KINDS.items():
        loads = [experts.load for experts in active_experts(model) if isinstance(experts, cls) and experts.load]
        if loads:
            by_kind[kind] = GateLoad(_stack([load.use for load in loads]), _stack([load.entropy for load in loads]))
    return by_kind


def balance_loss(model: nn.Module) -> Tensor:
    """Load-balance term O * sum_o f_o P_o of the last pass, averaged over the routed matrices; 1 is perfect balance.

    f is the share of uses and P the mean gate of each expert (Switch Transformers, Eq. 4-6). Each pass's term is handed
    out once, since it holds the pass's graph. Raises AdapterError unless the adapter was made with `balance=True` and
    the model has just run, or if a term cannot reach its router: reentrant activation checkpointing cuts it off.
    """
    terms = []
    for experts in active_experts(model):
        if experts.balance_term is not None:
            learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in experts.router.parameters())
            if learns and not experts.balance_term.requires_grad:
                raise AdapterError(
                    "balance_loss: no gradient reaches the routers, so their load would not be balanced. Reentrant "
                    'activation checkpointing does this: set activation_checkpointing_kwargs={"use_reentrant": False}.'
                )
            terms.append(experts.balance_term)
            experts.balance_term = None
    if not terms:
        raise AdapterError(
            "balance_loss: expected an adapter made with balance=True, after a forward pass; found no term. "
            "Set balance=True, and call balance_loss once per pass."
        )
    return _stack(terms).mean()


def _stack(tensors: list[Tensor]) -> Tensor:
    """On the device of the first layer: the layers of a large model may stand on several."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
