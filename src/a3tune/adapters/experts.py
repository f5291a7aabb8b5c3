"""Q-MoE and K-MoE (section 4.2.1, Eq. 4-7) as plain modules. Knows nothing of PEFT, attention or caches.

All experts of a matrix are stacked: A is `[O*r, d_in]`, B is `[d_out, O*r]`, and the gate scales the O*r channels
between them. sum_o gate_o B_o A_o x is then two matrix products, whatever the number of experts, and the gate's
gradients are exact.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from a3tune.compat.autograd import in_backward


@dataclass(frozen=True, slots=True, eq=False)
class GateLoad:
    """How the experts of one matrix were used by the last forward pass; detached, on the device of the model."""

    use: Tensor
    """`[O]`, sums to 1. Q-MoE: mean of alpha over the samples. K-MoE: share of the top-B places each expert got."""
    entropy: Tensor
    """`[]`, nats: mean entropy of the gate before top-B. log(O) is no routing at all, 0 is one expert each time."""


class StackedExperts(nn.Module):
    """O experts of rank r on one linear layer, and the router that weighs them.

    `alpha / rank` scales the sum as in LoRA. As there, B starts at zero and A like `nn.Linear`. `router_hidden` is the
    width of the MLP in Eq. 4 and 6. With `balance`, each pass leaves a Switch-style term in `balance_term`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        experts: int,
        rank: int,
        alpha: float,
        router_hidden: int,
        dropout: float = 0.0,
        balance: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.rank, self.scaling, self.balance = experts, rank, alpha / rank, balance
        self.A = nn.Linear(in_features, experts * rank, bias=False)
        self.B = nn.Linear(experts * rank, out_features, bias=False)
        nn.init.zeros_(self.B.weight)
        self.router = nn.Sequential(nn.Linear(in_features, router_hidden), nn.SiLU(), nn.Linear(router_hidden, experts))
        self.dropout = nn.Dropout(dropout)
        self.load: GateLoad | None = None
        self.balance_term: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, brings no pass along: graphs cannot be copied."""
        return {**self.__dict__, "load": None, "balance_term": None}

    def probabilities(self, x: Tensor) -> Tensor:
        """softmax(MLP(x)) over the experts, `[..., D] -> [..., O]`, in fp32 or better (Eq. 4 and 6)."""
        logits = self.router(x)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def mix(self, x: Tensor, gate: Tensor) -> Tensor:
        """sum_o gate_o B_o A_o x, `[B, S, D]` and `[B, S or 1, O] -> [B, S, d_out]` (Eq. 5 and 7)."""
        middle = self.A(self.dropout(x)).unflatten(-1, (self.experts, self.rank))
        middle = middle * (gate * self.scaling).unsqueeze(-1).to(middle.dtype)
        return self.B(middle.flatten(-2))

    def record(self, gate_MO: Tensor, share_MO: Tensor, weight_M: Tensor) -> None:
        """Remember how M routed items were spread; `share` sums to 1 per item, items of weight 0 do not count."""
        total = weight_M.sum().clamp(min=1)
        with torch.autocast(gate_MO.device.type, enabled=False):  # sums over thousands of tokens
            with torch.no_grad():
                use = weight_M @ share_MO / total
                entropy = weight_M @ torch.special.entr(gate_MO).sum(-1) / total
            # Made in passes that activation checkpointing replays, too: they must save what the first one saved.
            term = self.experts * (use @ (weight_M @ gate_MO / total)) if self.balance else None
        # Kept only on request: it holds the autograd graph of the pass. A pass that activation checkpointing
        # replays has handed its term out already, and a second one would hold on to all that is recomputed.
        if not in_backward():
            self.balance_term = term
        self.load = GateLoad(use, entropy)


class QueryExperts(StackedExperts):
    """Q-MoE: every expert, weighed once per sample by what the prompt says (Eq. 4-5)."""

    def gate(self, x: Tensor, prompt_mask: Tensor) -> Tensor:
        """alpha `[B, O]` from the mean of the prompt's states: `x [B, S, D]`, `prompt_mask [B, S]` bool (Eq. 4).

        A sample without prompt tokens is routed by the zero state.
        """
        prompt_mask = prompt_mask.to(x.device)  # the layers of a large model may stand on several devices
        count = prompt_mask.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=1)
        pooled = torch.einsum("bs,bsd->bd", prompt_mask.to(x), x) / count
        alpha = self.probabilities(pooled.to(x.dtype))
        self.record(alpha, alpha, alpha.new_ones(len(alpha)))
        return alpha

    def forward(self, x: Tensor, alpha_BO: Tensor) -> Tensor:
        """Delta W_q x for every token of each sample, `[B, S, D] -> [B, S, d_out]` (Eq. 5)."""
        return self.mix(x, alpha_BO.unsqueeze(1))


class KeyExperts(StackedExperts):
    """K-MoE: the top-B experts of each image token, weighed by their probabilities as they are (Eq. 6-7).

    Text tokens get no delta, unless `text_tokens` routes them like image tokens.
    """

    def __init__(self, *features: int, top: int, text_tokens: bool = False, **stacked: Any) -> None:
        super().__init__(*features, **stacked)
        self.top, self.text_tokens = top, text_tokens

    def gate(self, x: Tensor, image_mask: Tensor | None) -> Tensor:
        """beta `[B, S, O]` after top-B, not renormalised; zero where a token has no delta (Eq. 6-7)."""
        beta = self.probabilities(x)
        top = beta.topk(self.top, dim=-1)
        kept = torch.zeros_like(beta).scatter(-1, top.indices, top.values)
        if image_mask is None:
            return kept
        weight = image_mask.to(beta)
        self.record(beta.flatten(0, 1), (kept > 0).to(beta.dtype).flatten(0, 1) / self.top, weight.flatten())
        return kept if self.text_tokens else kept * weight.unsqueeze(-1)

    def forward(self, x: Tensor, image_mask: Tensor | None) -> Tensor | None:
        """Delta W_k^c x_c per token, `[B, S, D] -> [B, S, d_out]` (Eq. 7).

        `image_mask [B, S]` bool, or None when the input holds no image token: then there is nothing to compute and the
        answer is None, unless text tokens are routed too.
        """
        if image_mask is None and not self.text_tokens:
            return None
        return self.mix(x, self.gate(x, image_mask))
