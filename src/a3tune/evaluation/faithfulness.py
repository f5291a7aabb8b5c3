"""Deletion curves: how fast an answer loses its probability as image tokens are hidden, most attended first.

Petsiuk et al. (2018) delete pixels; here tokens are hidden where attention is paid, in the language model: in every
layer no position attends to a hidden token but itself (`attention/hide.py`). So positions, texts and all else stay.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from a3tune.vlm.encode import Example
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import look, model_inputs

Curves = tuple[tuple[float, ...], tuple[float, ...]]
"""Of one answer: in order of attention, and at random."""
STEPS = 10
"""Of equal size, from no image token hidden to all of them."""


@torch.no_grad()
def deletion_curves(
    vlm: Vlm, answered: Sequence[Example], maps: Sequence[NDArray], seeds: Sequence[int]
) -> list[Curves]:
    """For each sample, mean log-probability (nats) of its answer's tokens at each of `STEPS` + 1 shares of its image
    tokens hidden, the most attended first; and the same of as many drawn anew at each step.

    Only tokens with a place are hidden. It takes 2 STEPS passes.

    Args:
        answered: questions with answers.
        maps: float `[N]`, attention on each image token; of equals the earlier one goes first.
        seeds: of what is drawn.
    """
    inputs, masks = model_inputs(vlm, answered, "right")
    places = [mask.nonzero().flatten() for mask in masks["placed_mask"]]
    draws = [np.random.default_rng(seed) for seed in seeds]
    by_attention = [
        np.argsort(-map_N[~np.isnan(example.boxes[:, 0])].astype(np.float64), kind="stable")
        for example, map_N in zip(answered, maps, strict=True)
    ]

    def step(number: int, orders: Sequence[NDArray[np.int64]]) -> list[float]:
        hidden_BT = torch.zeros_like(masks["placed_mask"])
        for row, (place, order) in enumerate(zip(places, orders, strict=True)):
            first = torch.from_numpy(order[: round(number / STEPS * len(place))]).to(place.device)
            hidden_BT[row, place[first]] = True
        return _log_probability(vlm, inputs, masks, hidden_BT)

    def at_random(number: int) -> list[float]:
        return step(number, [draw.permutation(len(place)) for draw, place in zip(draws, places, strict=True)])

    none, everything = step(0, by_attention), step(STEPS, by_attention)
    between = range(1, STEPS)
    attended = zip(none, *(step(number, by_attention) for number in between), everything, strict=True)
    drawn = zip(none, *map(at_random, between), everything, strict=True)
    return list(zip(attended, drawn, strict=True))


def _log_probability(vlm: Vlm, inputs: dict[str, Any], masks: dict[str, Tensor], hidden_BT: Tensor) -> list[float]:
    """Mean log-probability of the answer's tokens of each sample."""
    answer_BS = masks["answer_mask"]
    first = int(answer_BS.any(0).nonzero()[0])
    kept = answer_BS.shape[1] - first + 1
    logits = look(vlm.model, inputs, masks, hidden=hidden_BT, logits_to_keep=kept).logits[:, -kept:-1]
    tokens, counted = inputs["input_ids"][:, first:], answer_BS[:, first:]
    log_p = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return (log_p.masked_fill(~counted, 0.0).sum(1) / counted.sum(1)).tolist()
