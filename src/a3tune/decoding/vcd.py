"""VCD (Leng et al. 2024): against the same image under heavy noise."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig

from a3tune.config.ranges import NonNegative, Share
from a3tune.decoding.base import Inputs
from a3tune.decoding.branches import DIFFUSION_STEPS, noisy
from a3tune.decoding.contrast import Contrast, contrast, cutoff
from a3tune.decoding.loop import run
from a3tune.vlm.load import Vlm

NoiseStep = Annotated[int, Field(strict=True, ge=0, lt=DIFFUSION_STEPS)]


@dataclass(frozen=True)
class Vcd:
    """Settings of the paper's Appendix B."""

    name: ClassVar[str] = "vcd"
    strategy: ClassVar[str] = "multinomial"
    alpha: NonNegative = 1.0
    """Weight of the contrast."""
    beta: Share = 0.1
    """Cutoff; see `contrast.cutoff`."""
    noise_step: NoiseStep = 500
    """How far the diffusion goes, 0 to 999."""

    def check(self, vlm: Vlm) -> None:
        """Nothing to check: any model can do it."""

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        scorer = Contrast(vlm, noisy(inputs, self.noise_step, seed), self.combine, config)
        return run(vlm, inputs, config, generator, scorer=scorer)

    def combine(self, positive_BV: Tensor, negative_BV: Tensor, step: int) -> Tensor:
        """Scores of the next token; see `contrast.Combine`."""
        return cutoff(contrast(positive_BV, negative_BV, self.alpha), positive_BV, self.beta)
