"""AVISC (Woo et al. 2024): against only those image tokens that draw attention whatever is asked, the blind ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.attention.capture import CaptureRequest, stack
from a3tune.config.ranges import Count, Fraction, NonNegative, Share
from a3tune.decoding.base import Inputs, require_capture
from a3tune.decoding.branches import encode_images, image_columns, image_mask, zero_features
from a3tune.decoding.contrast import Contrast, contrast, cutoff
from a3tune.decoding.loop import Branch, run
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class Avisc:
    """Settings of the paper's Appendix B."""

    name: ClassVar[str] = "avisc"
    strategy: ClassVar[str] = "multinomial"
    alpha: NonNegative = 1.0
    """Weight of the contrast."""
    beta: Share = 0.1
    """Cutoff; see `contrast.cutoff`."""
    layer_share: Fraction = 0.5
    """gamma: the layers that look most at the image are averaged, until they have this share of what all look."""
    selector: Literal["topk", "std"] = "topk"
    """topk: the `tokens` most attended to are blind (the A3Tune paper). std: those more than one standard deviation
    above the mean (the published code)."""
    tokens: Count = 10

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError when attention cannot be captured."""
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
        encoded = encode_images(vlm, inputs)
        scorer = Contrast(vlm, self.negative(vlm, encoded), self.combine, config)
        return run(vlm, encoded, config, generator, scorer=scorer)

    def negative(self, vlm: Vlm, encoded: Inputs) -> Inputs:
        """Inputs of the negative branch: of the image tokens, the features of the blind ones alone.

        `encoded` is what `branches.encode_images` returns.
        """
        columns = image_columns(vlm, encoded)
        if columns.shape[1] == 0:
            return encoded
        last_row = torch.zeros(encoded["input_ids"].shape, device=columns.device)
        last_row[:, -1] = 1
        text = encoded["attention_mask"].bool() & ~image_mask(vlm, encoded)
        request = CaptureRequest(last_row, columns, text)
        outputs = Branch(vlm, encoded).prefill(capture=request, output_attentions=True)
        map_BLN = stack(outputs.attentions, request).map_BLHN.mean(2)
        blind_BN = self.blind(map_BLN, columns >= 0)
        return zero_features(encoded, blind_BN[columns >= 0])

    def blind(self, map_BLN: Tensor, real_BN: Tensor) -> Tensor:
        """Which image tokens are blind, bool `[B, N]`, by each layer's attention; those outside `real_BN` are not."""
        layer_BL = map_BLN.sum(-1)
        share_BL, order_BL = (layer_BL / layer_BL.sum(1, keepdim=True).clamp_min(1e-12)).sort(descending=True)
        # The layer that passes the threshold is the last to count.
        counts_BL = (share_BL.cumsum(1) - share_BL < self.layer_share).to(share_BL)
        chosen_BL = torch.zeros_like(share_BL).scatter(1, order_BL, counts_BL)
        mean_BN = (map_BLN * chosen_BL[..., None]).sum(1) / chosen_BL.sum(1, keepdim=True)
        if self.selector == "topk":
            best = mean_BN.masked_fill(~real_BN, -1).topk(min(self.tokens, mean_BN.shape[1])).indices
            return torch.zeros_like(real_BN).scatter(1, best, value=True) & real_BN
        count_B1 = real_BN.sum(1, keepdim=True)
        average_B1 = (mean_BN * real_BN).sum(1, keepdim=True) / count_B1.clamp_min(1)
        variance_B1 = ((mean_BN - average_B1) ** 2 * real_BN).sum(1, keepdim=True) / (count_B1 - 1).clamp_min(1)
        return (mean_BN > average_B1 + variance_B1.sqrt()) & real_BN

    def combine(self, positive_BV: Tensor, negative_BV: Tensor, step: int) -> Tensor:
        """Scores of the next token; see `contrast.Combine`."""
        return cutoff(contrast(positive_BV, negative_BV, self.alpha), positive_BV, self.beta)
