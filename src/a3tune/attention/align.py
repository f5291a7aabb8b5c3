"""The averaged visual attention map and how far it misses the segments (section 4.2.3).

Knows maps and memberships of image tokens, not where they come from nor how the loss is weighted.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from a3tune.errors import ConfigError

Variant = Literal["paper", "code"]


def averaged_map(map_BLHN: Tensor, heads_LH: Tensor) -> Tensor:
    """The mean attention on each image token over the chosen heads (Eq. 9; with all heads, Eq. 2).

    `map_BLHN` [B, L, H, N] or [B, L, H, G, N], `heads_LH` bool. Returns [B, N] or [B, G, N]; zero if no head is chosen.
    """
    weights_LH = heads_LH.to(map_BLHN.dtype) / heads_LH.sum().clamp_min(1)
    with torch.autocast(map_BLHN.device.type, enabled=False):  # a training loop of one's own may stand in it
        return torch.einsum("blh...,lh->b...", map_BLHN, weights_LH)


def alignment_loss(map_BN: Tensor, segments_BKN: Tensor, variant: Variant = "paper") -> Tensor:
    """How much of the attention on the image misses each segment, squared and summed over segments: [B] (Eq. 10).

    `segments_BKN`: float, how far each image token lies in each segment, in [0, 1]; an all-zero segment is padding. A
    sample without segments, or without any attention on the image, has loss 0 and gradient 0. `variant`: `paper` takes
    the map averaged over rows, [B, N], and makes one ratio of it; `code`, as published, takes one map per row,
    [B, G, N], and averages the squares over the rows (all-zero maps are padding).

    Raises ConfigError for another variant.
    """
    if variant not in get_args(Variant):
        raise ConfigError(f"alignment: expected one of {', '.join(get_args(Variant))}, got {variant!r}")
    axes = {"paper": 2, "code": 3}[variant]
    if map_BN.ndim != axes:
        raise ValueError(f"alignment {variant!r} takes a map of {axes} axes, got shape {list(map_BN.shape)}")
    map_BGN = map_BN[:, None] if variant == "paper" else map_BN
    segments_BKN = segments_BKN.to(map_BGN)
    total_BG = map_BGN.sum(-1)
    seen_BG = total_BG > 0
    # The division must be safe itself: masking a NaN afterwards would still leave NaN in the gradient.
    with torch.autocast(map_BGN.device.type, enabled=False):  # as above
        inside_BGK = torch.einsum("bgn,bkn->bgk", map_BGN, segments_BKN)
    inside_BGK = inside_BGK / torch.where(seen_BG, total_BG, 1.0)[..., None]
    counted_BGK = seen_BG[..., None] & _present(segments_BKN)[:, None]
    misses_BGK = torch.where(counted_BGK, (1 - inside_BGK).square(), 0.0)
    return misses_BGK.sum((1, 2)) / seen_BG.sum(1).clamp_min(1)


def labelled(segments_BKN: Tensor) -> Tensor:
    """Which samples have a segment at all, bool [B]: those that the alignment loss can teach."""
    return _present(segments_BKN).any(-1)


def inside_share(map_BN: Tensor, segments_BKN: Tensor) -> Tensor:
    """The share of each sample's attention on the image that falls into the union of its segments, [B].

    A map per row, [B, G, N], counts with the mean of its rows. Without segments or without attention the share is 0.
    """
    if map_BN.ndim == 3:
        map_BN = map_BN.mean(1)
    union_BN = segments_BKN.amax(1) if segments_BKN.shape[1] else torch.zeros_like(map_BN)
    return (map_BN * union_BN).sum(-1) / map_BN.sum(-1).clamp_min(torch.finfo(map_BN.dtype).tiny)


def _present(segments_BKN: Tensor) -> Tensor:
    return segments_BKN.gt(0).any(-1)
