"""ControlMLLM (Wu et al. 2024): before the answer, image tokens are tuned so that the text looks at a given region."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.attention.capture import CaptureRequest, stack
from a3tune.compat.generation import ENCODED, first_pass, first_positions
from a3tune.config.ranges import Natural, NonNegative, Positive, Share, Switch
from a3tune.decoding.base import Inputs, require_capture
from a3tune.decoding.branches import encode_images, image_columns, image_mask
from a3tune.decoding.loop import run
from a3tune.errors import DataError
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class ControlMllm:
    """Settings of the paper's Appendix B, for LLaVA-Med; with LLaVA-Med-1.5 it takes `learning_rate` 1.

    The model is frozen; what is learnt, for one answer only, is an addition to the projected image tokens.
    """

    name: ClassVar[str] = "controlmllm"
    strategy: ClassVar[str] = "greedy"
    needs_regions: ClassVar[bool] = True
    alpha: Positive = 400.0
    """Weight of the loss."""
    beta: Share = 0.5
    """Share of the newest addition in its moving average, which is what the model sees."""
    learning_rate: NonNegative = 4.0
    steps: Natural = 5
    accumulate: Switch = False
    """Let the additions of all steps add up in the image tokens, as a slip in the published code does."""

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
        return run(vlm, self.control(vlm, inputs, regions_BN), config, generator)

    def control(self, vlm: Vlm, inputs: Inputs, regions_BN: Tensor | None) -> Inputs:
        """The inputs with tuned features of the images in the place of their pixels.

        Samples whose region is empty, or unknown and therefore all zero, are left as they are. Raises DataError when
        there are no regions, or not one weight per image token.
        """
        columns = image_columns(vlm, inputs)
        if regions_BN is None or regions_BN.shape != columns.shape:
            got = "none" if regions_BN is None else list(regions_BN.shape)
            raise DataError(
                f"{self.name}: needs the true regions, one weight per image token {list(columns.shape)}, got {got}"
            )
        inputs = encode_images(vlm, inputs)
        regions_BN = regions_BN.to(vlm.device, torch.float32)
        if not regions_BN.any():
            return inputs
        features = _parts(inputs[ENCODED]["image"].pooler_output)
        prompts = [torch.zeros_like(part, dtype=torch.float32, requires_grad=True) for part in features]
        average = prompts
        for _ in range(self.steps):
            with torch.enable_grad():
                current = self._mix(prompts, average)
                loss = self.loss(self._attention(vlm, _add(inputs, features, current), columns), regions_BN)
                gradients = torch.autograd.grad(loss, prompts)
            average = [part.detach() for part in current]
            if self.accumulate:
                features = [part + new.to(part) for part, new in zip(features, average, strict=True)]
            updates = zip(prompts, gradients, strict=True)
            prompts = [(part - self.learning_rate * grad).detach().requires_grad_() for part, grad in updates]
        return _add(inputs, features, [part.detach() for part in self._mix(prompts, average)])

    def loss(self, attention_BN: Tensor, regions_BN: Tensor) -> Tensor:
        """alpha * (1 - share of the attention on the image that falls into the region)^2, summed over the samples."""
        inside_B = (attention_BN * regions_BN).sum(1) / attention_BN.sum(1).clamp_min(1e-12)
        return self.alpha * ((1 - inside_B) ** 2 * regions_BN.any(1)).sum()

    def _mix(self, prompts: list[Tensor], average: list[Tensor]) -> list[Tensor]:
        return [self.beta * new + (1 - self.beta) * old for new, old in zip(prompts, average, strict=True)]

    def _attention(self, vlm: Vlm, inputs: Inputs, columns: Tensor) -> Tensor:
        """Attention on the image `[B, N]`, mean over layers, heads, and the text after the last image token."""
        image_BS = image_mask(vlm, inputs)
        ahead = image_BS.flip(1).cumsum(1).flip(1)
        rows = inputs["attention_mask"].bool() & (ahead == 0)
        request = CaptureRequest(rows / rows.sum(1, keepdim=True).clamp_min(1), columns, rows)
        model: Any = vlm.model
        positions = first_positions(model, inputs)
        prepared = first_pass(model, inputs, position_ids=positions, use_cache=False, logits_to_keep=1)
        outputs = model(**prepared, capture=request, output_attentions=True)
        return stack(outputs.attentions, request).map_BLHN.mean((1, 2))


def _parts(features: Any) -> list[Tensor]:
    """`pooler_output` is one tensor, or one per image."""
    return [features] if isinstance(features, Tensor) else list(features)


def _add(inputs: Inputs, features: list[Tensor], prompts: list[Tensor]) -> Inputs:
    """The inputs with `features + prompts` as those of their images."""
    encoded = copy.copy(inputs[ENCODED]["image"])
    added = [part + new.to(part.dtype) for part, new in zip(features, prompts, strict=True)]
    encoded.pooler_output = added[0] if isinstance(encoded.pooler_output, Tensor) else added
    return inputs | {ENCODED: {"image": encoded}}
