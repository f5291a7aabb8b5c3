"""PAI (Liu et al. 2025): more attention on the image, and against the prompt without it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from a3tune.attention.boost import Boost
from a3tune.compat.generation import CACHE
from a3tune.config.ranges import Natural, NonNegative, Share
from a3tune.decoding.base import Inputs, require_capture
from a3tune.decoding.branches import image_columns, without_images
from a3tune.decoding.contrast import Contrast, cutoff
from a3tune.decoding.loop import run
from a3tune.vlm.load import Vlm

Guidance = Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Pai:
    """Settings of the paper's Appendix B."""

    name: ClassVar[str] = "pai"
    strategy: ClassVar[str] = "greedy"
    boost: NonNegative = 0.2
    """alpha: scores x of attention on the image become x + alpha |x|, in the row of the token before the next one."""
    gamma: Guidance = 1.1
    """Weight of the branch with the image; 1 is no contrast."""
    beta: Share = 0.1
    """Cutoff; see `contrast.cutoff`."""
    start_layer: Natural = 2
    end_layer: Natural = 32
    """The first layer that is not boosted any more."""
    variant: Literal["paper", "code"] = "paper"
    """paper: every token is boosted. code: not the first (the published code does not reach the prompt's pass)."""

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError when the model does not use our attention function."""
        require_capture(vlm, self.name)

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
        cache = DynamicCache(config=vlm.model.config.get_text_config(decoder=True))
        boost = Boost(
            columns=image_columns(vlm, inputs),
            strength=self.boost,
            layers=range(self.start_layer, self.end_layer),
            cache=cache,
            prompt=self.variant == "paper",
        )
        positive = inputs | {CACHE: cache}
        return run(vlm, positive, config, generator, scorer=scorer, forward={"boost": boost})

    def combine(self, positive_BV: Tensor, negative_BV: Tensor, step: int) -> Tensor:
        """gamma (lc - lu) + lu with the log-probabilities of both branches; see `contrast.Combine`."""
        positive_BV, negative_BV = positive_BV.log_softmax(-1), negative_BV.log_softmax(-1)
        return cutoff(self.gamma * (positive_BV - negative_BV) + negative_BV, positive_BV, self.beta)
