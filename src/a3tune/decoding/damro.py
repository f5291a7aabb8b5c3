"""DAMRO (Gong et al. 2024): against only those image tokens that the vision tower's class token attends to most."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from a3tune.config.ranges import Count, NonNegative, Share
from a3tune.decoding.base import Inputs
from a3tune.decoding.branches import encode_images, keep_features, zero_features
from a3tune.decoding.contrast import Contrast, contrast, cutoff
from a3tune.decoding.loop import run
from a3tune.errors import ModelError
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class Damro:
    """Settings of the paper's Appendix B."""

    name: ClassVar[str] = "damro"
    strategy: ClassVar[str] = "multinomial"
    alpha: NonNegative = 0.5
    """Weight of the contrast."""
    beta: Share = 0.1
    """Cutoff; see `contrast.cutoff`."""
    tokens: Count = 10
    """How many image tokens the negative branch has."""
    variant: Literal["official", "medheval"] = "official"
    """official: attention of the layer that gives the features, as one head of the full width; the negative branch has
    the chosen tokens alone, the most attended to first. medheval: attention of the last layer, mean over its heads; the
    others are zeroed."""

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError for a model other than a LLaVA with a CLIP tower whose image tokens are its patches."""
        config: Any = vlm.model.config
        tower = config.vision_config.model_type
        if config.model_type != "llava" or tower != "clip_vision_model":
            raise ModelError(
                f"{self.name}: needs the attention of a CLIP tower's class token, and one image token per patch, as "
                f"LLaVA has; {vlm.name} is a {config.model_type} with the tower {tower}. Choose another method"
            )
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise ModelError(
                f"{self.name}: expected image tokens of one layer without the class token (vision_feature_layer an "
                f"integer, vision_feature_select_strategy 'default'), got {config.vision_feature_layer!r} and "
                f"{config.vision_feature_select_strategy!r} in {vlm.name}"
            )

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        positive, negative = self.branches(vlm, inputs)
        scorer = Contrast(vlm, negative, self.combine, config)
        return run(vlm, positive, config, generator, scorer=scorer)

    def branches(self, vlm: Vlm, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """Inputs of both branches, images encoded once."""
        if "pixel_values" not in inputs:
            return inputs, inputs
        attention = self._tower_layer(vlm)
        with _output(attention.q_proj) as query, _output(attention.k_proj) as key:
            encoded = encode_images(vlm, inputs)
        heads = 1 if self.variant == "official" else attention.num_heads
        from_class_IN = class_attention(query[0], key[0], heads)
        best_IK = from_class_IN.topk(min(self.tokens, from_class_IN.shape[1])).indices
        if self.variant == "official":
            return encoded, keep_features(vlm, encoded, best_IK)
        keep_IN = torch.zeros_like(from_class_IN, dtype=torch.bool).scatter(1, best_IK, value=True)
        return encoded, zero_features(encoded, keep_IN.flatten())

    def combine(self, positive_BV: Tensor, negative_BV: Tensor, step: int) -> Tensor:
        """Scores of the next token; see `contrast.Combine`."""
        return cutoff(contrast(positive_BV, negative_BV, self.alpha), positive_BV, self.beta)

    def _tower_layer(self, vlm: Vlm) -> Any:
        """The self-attention of the vision tower whose class token decides."""
        model: Any = vlm.model
        layers = model.get_encoder(modality="image").encoder.layers
        if self.variant == "medheval":
            return layers[-1].self_attn
        feature = model.config.vision_feature_layer
        # Hidden state 0 is before the first layer, so state k is the output of layer k - 1; -1 is the last one's.
        return layers[feature if feature < 0 else feature - 1].self_attn


@contextmanager
def _output(module: nn.Module) -> Iterator[list[Any]]:
    """A list that takes what the module puts out."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def class_attention(query_ISD: Tensor, key_ISD: Tensor, heads: int) -> Tensor:
    """Post-softmax attention of the class token (position 0) on the patches, mean over `heads`: fp32 `[images, N]`.

    Queries and keys are unscaled, `[images, 1 + N, D]`, all heads side by side.
    """
    query_IHD = query_ISD[:, 0].float().unflatten(-1, (heads, -1))
    key_ISHD = key_ISD.float().unflatten(-1, (heads, -1))
    scores_IHS = torch.einsum("ihd,ishd->ihs", query_IHD, key_ISHD) * query_IHD.shape[-1] ** -0.5
    return scores_IHS.softmax(-1).mean(1)[:, 1:]
