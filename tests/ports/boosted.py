"""PAI's attention as eager attention: `boosted_eager`, which reads `PLACE`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

PLACE: dict[str, Any] = {}
"""What the eager function below has to know: image positions and the first row to boost."""


def boosted_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
    """The definition: all scores of all rows."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * options["scaling"]
    if PLACE and module.layer_idx in PLACE["layers"]:
        part = scores[:, :, PLACE["from"] :, PLACE["image"]]
        scores[:, :, PLACE["from"] :, PLACE["image"]] = part + PLACE["strength"] * part.abs()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("boosted_eager", boosted_eager)
AttentionMaskInterface.register("boosted_eager", sdpa_mask)
