"""The published way to tune attention, written anew and plainly, as the reference of `step_cost.py` and `experts.py`.

Eager attention with `output_attentions=True`, so that every layer keeps its full [B, H, S, S] map until the backward
pass; a loop over samples and experts in each query and key layer; a loop over samples, layers and heads in the loss;
the image at one place that all samples share. The formulas are the paper's (Eq. 4-10), as in a3tune, so that both ways
give the same loss from the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Positions:
    """Where things stand in the batch at hand; all layers share one object."""

    image: slice
    """The image tokens of every sample."""
    prompt_end: int
    """Where every sample's answer starts."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample, without padding on the right."""

    def prompt(self, x_SD: Tensor) -> Tensor:
        """The prompt's text out of one sample's states."""
        return torch.cat([x_SD[1 : self.image.start], x_SD[self.image.stop : self.prompt_end]])

    def rows(self, sample: int) -> slice:
        """The text after the image, up to the last position that predicts something."""
        return slice(self.image.stop, self.lengths[sample] - 1)


class Expert(nn.Module):
    """One LoRA expert, B A x."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))


class Looped(nn.Module):
    """A frozen linear layer with experts beside it, one module each."""

    def __init__(
        self, base: nn.Linear, positions: Positions, *, experts: int, rank: int, alpha: float, router_hidden: int
    ) -> None:
        super().__init__()
        self.base, self.positions, self.scaling = base, positions, alpha / rank
        width = base.in_features
        self.experts = nn.ModuleList(Expert(width, base.out_features, rank) for _ in range(experts))
        self.router = nn.Sequential(nn.Linear(width, router_hidden), nn.SiLU(), nn.Linear(router_hidden, experts))

    def delta(self, x_SD: Tensor) -> Tensor:
        """What the experts add to one sample's projection."""
        raise NotImplementedError

    def forward(self, x_BSD: Tensor) -> Tensor:
        deltas = [self.delta(x_SD) for x_SD in x_BSD]
        result = self.base(x_BSD)
        return result + (torch.stack(deltas) * self.scaling).to(result.dtype)

    @torch.no_grad()
    def take(self, A_weight: Tensor, B_weight: Tensor, router: nn.Module) -> None:
        """Copy stacked weights, A [O*r, d_in] and B [d_out, O*r], and a router's."""
        count = len(self.experts)
        experts: Any = self.experts
        for expert, A, B in zip(experts, A_weight.chunk(count, 0), B_weight.chunk(count, 1), strict=True):
            expert.A.weight.copy_(A)
            expert.B.weight.copy_(B)
        self.router.load_state_dict(router.state_dict())


class LoopedQuery(Looped):
    """Q-MoE: every expert on every token, weighed by the prompt (Eq. 4-5)."""

    def delta(self, x_SD: Tensor) -> Tensor:
        alpha = self.router(self.positions.prompt(x_SD).mean(0)).softmax(-1)
        total = torch.zeros((), dtype=x_SD.dtype)
        for number, expert in enumerate(self.experts):
            total = total + alpha[number] * expert(x_SD)
        return total


class LoopedKey(Looped):
    """K-MoE: the top experts of each image token (Eq. 6-7), expert by expert."""

    def __init__(self, *args, top: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.top = top

    def delta(self, x_SD: Tensor) -> Tensor:
        image = x_SD[self.positions.image]
        beta = self.router(image).softmax(-1)
        chosen = beta.topk(self.top, dim=-1).indices
        total = x_SD.new_zeros(len(x_SD), self.base.out_features)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).any(-1).nonzero().squeeze(-1)
            added = beta[tokens, number, None] * expert(image[tokens])
            total = total.index_add(0, tokens + self.positions.image.start, added.to(total.dtype))
        return total


def alignment_loss(attentions: Sequence[Tensor], positions: Positions, segments_BKN: Tensor, heads: int) -> Tensor:
    """L_align of each sample (Eq. 8-10), [B], from the full maps [B, H, S, S] of all layers."""
    maps: list[list[Tensor]] = []
    ratios: list[list[Tensor]] = []
    for sample in range(len(segments_BKN)):
        maps.append([])
        ratios.append([])
        for attention in attentions:
            for head in range(attention.shape[1]):
                row = attention[sample, head, positions.rows(sample)].mean(0).float()
                visual = row[positions.image]
                text = row[1 : positions.image.start].sum() + row[positions.image.stop : positions.prompt_end].sum()
                maps[-1].append(visual)
                ratios[-1].append(visual.sum() / (visual.sum() + text))
    mean_ratio = torch.stack([torch.stack(own) for own in ratios]).mean(0)
    chosen = mean_ratio.topk(heads).indices.tolist()
    losses = []
    for own, segments_KN in zip(maps, segments_BKN, strict=True):
        averaged = torch.stack([own[head] for head in chosen]).mean(0)
        inside = [(averaged * segment).sum() / averaged.sum() for segment in segments_KN]
        losses.append(torch.stack([(1 - share).square() for share in inside]).sum())
    return torch.stack(losses)
