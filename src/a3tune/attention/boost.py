"""Attention on the image made stronger for the next token (PAI, Liu et al. 2025). Knows tensors, no decoding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


@dataclass(frozen=True, eq=False)
class Boost:
    """The forward keyword `boost`: scores x of the last position on the image become x + strength * |x|."""

    columns: Tensor
    """`[B, N]` int64: key positions of the image tokens, -1 where padded. A sample may have several rows in a pass."""
    strength: float
    layers: range
    """Decoder layers whose scores change."""
    cache: Cache
    """The cache of the passes: it knows how many of the oldest keys a layer with a sliding window has dropped."""
    prompt: bool = True
    """Whether the pass that reads the prompt is boosted too, so that the first token is."""

    def row(
        self,
        module: nn.Module,
        query_BHSD: Tensor,
        key_BJTD: Tensor,
        value_BJTD: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor | None:
        """What the last position attends to, `[B, H, D]`; None where nothing changes.

        `mask` is bool (True is seen) or additive, `[B, 1 or H, S, T]`; None shows the last position everything.
        """
        layer: Any = module.layer_idx
        if layer not in self.layers or not (self.prompt or query_BHSD.shape[2] == 1):
            return None
        b, j, keys, d = key_BJTD.shape
        precision = torch.promote_types(query_BHSD.dtype, torch.float32)
        query_BJQD = query_BHSD[:, :, -1].to(precision).mul(scaling).view(b, j, -1, d)
        scores = (query_BJQD @ key_BJTD.to(precision).mT).flatten(1, 2)
        seen_BT = self._seen(layer, keys, scores.device)
        scores += self.strength * scores.abs() * seen_BT.repeat_interleave(b // len(seen_BT), dim=0)[:, None]
        if mask is not None:
            last = mask[:, :, -1]
            scores = scores.masked_fill(~last, -torch.inf) if last.dtype == torch.bool else scores + last
        attention = scores.softmax(-1).view(b, j, -1, keys)
        return (attention @ value_BJTD.to(precision)).flatten(1, 2).to(query_BHSD.dtype)

    def _seen(self, layer: int, keys: int, device: torch.device) -> Tensor:
        """`[B, T]` bool: the image's keys among those that this layer still has."""
        columns = self.columns.to(device) - (self.cache.get_seq_length(layer) - keys)
        marks = torch.zeros(len(columns), keys + 1, dtype=torch.bool, device=device)
        # Padded and dropped columns go to one place too many, which is then cut off.
        return marks.scatter_(1, columns.where((self.columns.to(device) >= 0) & (columns >= 0), keys), True)[:, :keys]
