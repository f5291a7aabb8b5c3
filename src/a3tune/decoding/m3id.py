"""M3ID (Favero et al. 2024): against the prompt without its image, the more the longer the answer."""

from dataclasses import dataclass
from math import exp, log
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.config.ranges import Fraction, NonNegative, Share
from a3tune.decoding.base import Inputs
from a3tune.decoding.branches import without_images
from a3tune.decoding.contrast import Contrast, cutoff
from a3tune.decoding.loop import run
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class M3id:
    """Settings of the paper's Appendix B."""

    name: ClassVar[str] = "m3id"
    strategy: ClassVar[str] = "multinomial"
    decay: NonNegative = 0.02
    """lambda of gamma_t = exp(-lambda t): how fast the image is forgotten."""
    max_weight: NonNegative | None = None
    """Largest weight of the contrast. (1 - gamma_t) / gamma_t is 1 at token 35 and 54 at token 200; None: no limit."""
    variant: Literal["code", "original"] = "code"
    """code: a cutoff (the form published with AVISC). original: no cutoff, but a contrast only where the model is
    unsure."""
    beta: Share = 0.1
    """Cutoff of the variant "code"; see `contrast.cutoff`."""
    confidence: Fraction = 0.3
    """Of the variant "original": no contrast where the most likely token is at least this likely (our value)."""

    def check(self, vlm: Vlm) -> None:
        """Any model can do it: every language model reads a prompt without an image."""

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        scorer = Contrast(vlm, without_images(vlm, inputs), self.combine, config)
        return run(vlm, inputs, config, generator, scorer=scorer)

    def combine(self, positive_BV: Tensor, negative_BV: Tensor, step: int) -> Tensor:
        """Scores of the next token; see `contrast.Combine`."""
        positive_BV, negative_BV = positive_BV.log_softmax(-1), negative_BV.log_softmax(-1)
        gamma = exp(-self.decay * step)
        weight = (1 - gamma) / gamma
        if self.max_weight is not None:
            weight = min(weight, self.max_weight)
        added_BV = weight * (positive_BV - negative_BV)
        if self.variant == "code":
            return cutoff(positive_BV + added_BV, positive_BV, self.beta)
        unsure_B1 = positive_BV.amax(-1, keepdim=True) < log(self.confidence)
        return positive_BV + added_BV * unsure_B1
