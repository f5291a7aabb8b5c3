"""What contrastive decoding makes of two rows of scores, and the scorer that asks the second branch for its own.

Knows scores, no images; how the second branch differs from the first is the business of `branches`.
"""

from collections.abc import Callable
from math import log

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.decoding.base import Inputs
from a3tune.decoding.loop import Branch
from a3tune.vlm.load import Vlm

Combine = Callable[[Tensor, Tensor, int], Tensor]
"""(scores with the image `[B, V]`, those of the negative branch, number of the step from 1) -> scores."""


def contrast(positive_BV: Tensor, negative_BV: Tensor, alpha: float) -> Tensor:
    """(1 + alpha) l - alpha c: what the image adds to the scores, amplified (VCD, Eq. 3)."""
    return (1 + alpha) * positive_BV - alpha * negative_BV


def cutoff(scores_BV: Tensor, positive_BV: Tensor, beta: float) -> Tensor:
    """Only tokens at least `beta` times as likely as the most likely one, WITH the image, stay (VCD, Eq. 4).

    `beta` 0 keeps all. Without the cutoff a token that neither branch would say can win the contrast.
    """
    if beta == 0:
        return scores_BV
    return scores_BV.masked_fill(positive_BV < positive_BV.amax(-1, keepdim=True) + log(beta), -torch.inf)


class Contrast:
    """A `loop.Scorer`: the model's scores against those of a negative branch that reads the same chosen tokens."""

    def __init__(self, vlm: Vlm, negative: Inputs, combine: Combine, config: GenerationConfig) -> None:
        """`negative` are the inputs of the negative branch, one row per sample."""
        self.beams: int = config.num_beams or 1
        self.branch = Branch(vlm, negative, self.beams)
        self.combine = combine
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.steps == 0:
            negative_BV = self.branch.prefill().logits[:, -1].repeat_interleave(self.beams, dim=0)
        else:
            negative_BV = self.branch.step(input_ids[:, -1]).logits[:, -1]
        self.steps += 1
        combined_BV = self.combine(scores, negative_BV.to(scores), self.steps)
        # Beams add scores up over steps, so they have to be log-probabilities.
        return combined_BV.log_softmax(-1) if self.beams > 1 else combined_BV

    def reorder(self, beam_B: Tensor) -> None:
        self.branch.reorder(beam_B)
