"""How well attention lands on the region of interest, at the patch grid (Appendix D.2, and common others).

Knows maps and regions over image tokens; not how they were made. Every function takes the attention M, `map_BN` float
[B, N] >= 0, and the region B of Appendix D.2, `region_BN` [B, N] of zeros and ones (or bool), as arrays or CPU tensors,
and returns float64 [B]. NaN means undefined: no region in the model's view, or no attention on the image at all.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from a3tune.errors import ConfigError

Normalisation = Literal["max", "sum", "min-max"]
Array = NDArray[np.float64]


def attention_metrics(
    map_BN: ArrayLike, region_BN: ArrayLike, *, tau: float = 0.15, normalisation: Normalisation = "max"
) -> dict[str, Array]:
    """All metrics of this file by name, each [B]."""
    return {
        "coverage": coverage(map_BN, region_BN, tau=tau, normalisation=normalisation),
        "intensity": intensity(map_BN, region_BN, normalisation=normalisation),
        "attention_mass": attention_mass(map_BN, region_BN),
        "pointing": pointing(map_BN, region_BN),
        "patch_auroc": patch_auroc(map_BN, region_BN),
    }


def coverage(
    map_BN: ArrayLike, region_BN: ArrayLike, *, tau: float = 0.15, normalisation: Normalisation = "max"
) -> Array:
    """Share of the region whose normalised attention is at least tau (Appendix D.2 a)."""
    map_BN, region_BN = _arrays(map_BN, region_BN)
    scaled_BN = normalise(map_BN, normalisation)
    reached_BN = np.where(np.isnan(scaled_BN), np.nan, scaled_BN >= tau)
    return _ratio((region_BN * reached_BN).sum(-1), region_BN.sum(-1))


def intensity(map_BN: ArrayLike, region_BN: ArrayLike, *, normalisation: Normalisation = "max") -> Array:
    """Mean normalised attention inside the region (Appendix D.2 b)."""
    map_BN, region_BN = _arrays(map_BN, region_BN)
    return _ratio((region_BN * normalise(map_BN, normalisation)).sum(-1), region_BN.sum(-1))


def attention_mass(map_BN: ArrayLike, region_BN: ArrayLike) -> Array:
    """Share of the attention on the image that falls inside the region: the ratio of Eq. 10."""
    map_BN, region_BN = _arrays(map_BN, region_BN)
    inside_B = np.where(region_BN.any(-1), (region_BN * map_BN).sum(-1), np.nan)
    return _ratio(inside_B, map_BN.sum(-1))


def pointing(map_BN: ArrayLike, region_BN: ArrayLike) -> Array:
    """Pointing game: 1 if the token with the most attention lies in the region; of equals, the share that does."""
    map_BN, region_BN = _arrays(map_BN, region_BN)
    defined_B1 = region_BN.any(-1, keepdims=True) & map_BN.any(-1, keepdims=True)
    top_BN = (map_BN == map_BN.max(-1, keepdims=True)) & defined_B1
    return _ratio((region_BN * top_BN).sum(-1), top_BN.sum(-1))


def patch_auroc(map_BN: ArrayLike, region_BN: ArrayLike) -> Array:
    """Probability that a token of the region gets more attention than one outside; equals count half.

    Undefined as well when the region is the whole view.
    """
    from scipy.stats import rankdata  # slow to import, and records need only the names in this file

    map_BN, region_BN = _arrays(map_BN, region_BN)
    inside_B = region_BN.sum(-1)
    outside_B = region_BN.shape[-1] - inside_B
    # Mann-Whitney's U: ranks of the region's tokens, less those they would have among themselves.
    wins_B = (region_BN * rankdata(map_BN, axis=-1)).sum(-1) - inside_B * (inside_B + 1) / 2
    return _ratio(np.where(map_BN.any(-1), wins_B, np.nan), inside_B * outside_B)


def normalise(map_BN: ArrayLike, how: Normalisation) -> Array:
    """Scale each map; the paper does not say how it does.

    `max`: the largest value becomes 1. `sum`: the values sum to 1. `min-max`: they span 0 to 1. A map that is zero, or
    for `min-max` constant, becomes NaN. Raises ConfigError for another name.
    """
    values = np.asarray(map_BN, dtype=np.float64)
    if how not in get_args(Normalisation):
        raise ConfigError(f"normalisation: expected one of {', '.join(get_args(Normalisation))}, got {how!r}")
    if how == "min-max":
        values = values - values.min(-1, keepdims=True)
    scale = values.sum(-1, keepdims=True) if how == "sum" else values.max(-1, keepdims=True)
    return _ratio(values, np.broadcast_to(scale, values.shape))


def _arrays(map_BN: ArrayLike, region_BN: ArrayLike) -> tuple[Array, Array]:
    maps, regions = np.asarray(map_BN, dtype=np.float64), np.asarray(region_BN, dtype=np.float64)
    if maps.shape != regions.shape or maps.ndim != 2:
        raise ValueError(f"expected map and region of one shape [B, N], got {maps.shape} and {regions.shape}")
    return maps, regions


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Numerator / denominator, NaN where the denominator is zero."""
    undefined = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
