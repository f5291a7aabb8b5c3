"""Deletion curves: how fast an answer loses its probability as image tokens are hidden, most attended first.

Petsiuk et al. (2018) delete pixels; here tokens are hidden where attention is paid, in the language model: in every
layer no position attends to a hidden token but itself (`attention/hide.py`). So positions, texts and all else stay.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from a3tune.vlm.encode import Example
from a3tune.vlm.load import Vlm
from a3tune.vlm.look import look, model_inputs

Curves = tuple[tuple[float, ...], tuple[float, ...]]
"""Of one answer: in order of attention, and the mean over random orders."""
STEPS = 10
"""Of equal size, from no image token hidden to all of them."""
DRAWS = 3
"""Random orders that the order by attention is compared with."""


@torch.no_grad()
def deletion_curves(
    vlm: Vlm, answered: Sequence[Example], maps: Sequence[NDArray], seeds: Sequence[int]
) -> list[Curves]:
    """For each sample, mean log-probability (nats) of its answer's tokens at each of `STEPS` + 1 shares of its image
    tokens hidden: in order of attention, and the mean over `DRAWS` random orders.

    Only tokens with a place are hidden. It takes STEPS - 1 passes for each of 1 + DRAWS orders, and two for the ends.

    Args:
        answered: questions with answers.
        maps: float `[N]`, attention on each image token; of equals the earlier one goes first.
        seeds: of the random orders.
    """
    inputs, masks = model_inputs(vlm, answered, "right")
    places = [mask.nonzero().flatten() for mask in masks["placed_mask"]]
    orders_B = [
        list(_orders(map_N[~np.isnan(example.boxes[:, 0])], seed))
        for example, map_N, seed in zip(answered, maps, seeds, strict=True)
    ]

    def step(order: int, number: int) -> list[float]:
        hidden_BT = torch.zeros_like(masks["placed_mask"])
        for row, place in enumerate(places):
            first = orders_B[row][order][: round(number / STEPS * len(place))]
            hidden_BT[row, place[torch.from_numpy(first).to(place.device)]] = True
        return _log_probability(vlm, inputs, masks, hidden_BT)

    ends = [step(0, 0), step(0, STEPS)]
    curves_OB = []
    for order in range(1 + DRAWS):
        between = [step(order, number) for number in range(1, STEPS)]
        curves_OB.append(list(zip(ends[0], *between, ends[1], strict=True)))
    return [
        (curves_OB[0][row], tuple(np.mean([curves[row] for curves in curves_OB[1:]], axis=0).tolist()))
        for row in range(len(answered))
    ]


def _orders(map_N: NDArray, seed: int) -> Iterator[NDArray[np.int64]]:
    """Image tokens by attention, then in `DRAWS` random orders."""
    yield np.argsort(-map_N.astype(np.float64), kind="stable")
    random = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield random.permutation(len(map_N))


def _log_probability(vlm: Vlm, inputs: dict[str, Any], masks: dict[str, Tensor], hidden_BT: Tensor) -> list[float]:
    """Mean log-probability of the answer's tokens of each sample."""
    answer_BS = masks["answer_mask"]
    first = int(answer_BS.any(0).nonzero()[0])
    kept = answer_BS.shape[1] - first + 1
    logits = look(vlm.model, inputs, masks, hidden=hidden_BT, logits_to_keep=kept).logits[:, -kept:-1]
    tokens, counted = inputs["input_ids"][:, first:], answer_BS[:, first:]
    log_p = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return (log_p.masked_fill(~counted, 0.0).sum(1) / counted.sum(1)).tolist()
