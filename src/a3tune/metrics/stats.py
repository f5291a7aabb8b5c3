"""How sure one can be of a mean or of a difference: bootstrap intervals, permutation tests.

Knows numbers and which of them belong together, not what they measure. Questions about one image (or patient) are not
independent, so everything resamples whole groups. NaN (an undefined metric) leaves a value out; `count` says how many
stayed. Everything is deterministic in `seed`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

Groups = Sequence[Hashable]
"""For each value, the image or patient it belongs to; None: every value stands for itself."""
_BLOCK = 4_000_000
"""Random numbers drawn at a time: bounds the memory."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its confidence interval; NaN when there was nothing to average."""

    mean: float
    low: float
    high: float
    count: int
    """Values averaged."""


def mean_interval(
    values: ArrayLike, groups: Groups | None = None, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` [n] with its bootstrap interval, resampling groups.

    The interval is that of percentiles, stretched about the mean as far as Student's t is from the normal: few groups
    show too little of their spread (Hesterberg 2015, "What teachers should know about the bootstrap"). It stays within
    the values. One group alone shows no spread: its interval is NaN.
    """
    return seeds_interval(np.asarray(values, dtype=np.float64)[None], groups, level=level, draws=draws, seed=seed)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of `first - second`, two runs [n] (or [seeds, n]) on the same samples, with its bootstrap interval."""
    difference = np.atleast_2d(_paired(first, second))
    return seeds_interval(difference, groups, level=level, draws=draws, seed=seed)


def seeds_interval(
    values: ArrayLike, groups: Groups | None = None, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over training seeds and samples, `values` [seeds, n], with an interval that holds both kinds of chance.

    Hierarchical bootstrap: each draw resamples the seeds and, crossed with them, the groups of samples; stretched as in
    `mean_interval`, with Satterthwaite's degrees of freedom for both. One seed is taken as given.
    """
    values_SN = np.asarray(values, dtype=np.float64)
    index_N, size = _indices(groups, values_SN.shape[-1])
    sums_SG, counts_SG = _per_group(values_SN, index_N, size)
    present_G = counts_SG.any(0)
    sums_SG, counts_SG = sums_SG[:, present_G], counts_SG[:, present_G]
    count = int(counts_SG.sum())
    if count == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean = float(sums_SG.sum() / count)
    seeds, size = sums_SG.shape
    if size == 1 and seeds == 1:
        return Estimate(mean, np.nan, np.nan, count)
    random, means = np.random.default_rng(seed), []
    per_block = max(1, _BLOCK // (seeds * size))
    for start in range(0, draws, per_block):
        block = min(per_block, draws - start)
        drawn_DS = random.integers(seeds, size=(block, seeds))
        drawn_DG = random.integers(size, size=(block, size))
        total_D = sums_SG[drawn_DS[:, :, None], drawn_DG[:, None]].sum((1, 2))
        number_D = counts_SG[drawn_DS[:, :, None], drawn_DG[:, None]].sum((1, 2))
        means.append(np.divide(total_D, number_D, out=np.full(block, np.nan), where=number_D > 0))
    tail = (1 - level) / 2
    percentiles = np.nanquantile(np.concatenate(means), [tail, 1 - tail])
    stretched = mean + _stretch(sums_SG, counts_SG, tail) * (percentiles - mean)
    low, high = stretched.clip(np.nanmin(values_SN), np.nanmax(values_SN)).tolist()
    return Estimate(mean, low, high, count)


def paired_permutation_test(
    first: ArrayLike, second: ArrayLike, groups: Groups | None = None, *, draws: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the hypothesis that two runs [n] on the same samples do not differ.

    Under it the sign of each group's summed difference is a coin toss. All tosses are tried when there are at most
    `draws` of them, else `draws` random ones and the observed one. NaN without values. Of answers that are right or
    wrong, each its own group, all tosses are McNemar's exact test.
    """
    difference_N = _paired(first, second)
    index_N, size = _indices(groups, len(difference_N))
    sums_SG, counts_SG = _per_group(difference_N[None], index_N, size)
    sums_G = sums_SG[0, counts_SG[0] > 0]
    if not sums_G.size:
        return float("nan")
    # Sums of equal values in another order differ in the last digits; they must count as equal.
    reached = abs(sums_G.sum()) - 1e-9 * np.abs(sums_G).sum()
    if 2**sums_G.size <= draws:
        signs = np.array(list(product((-1.0, 1.0), repeat=sums_G.size)))
        return float((np.abs(signs @ sums_G) >= reached).mean())
    random, hits = np.random.default_rng(seed), 0
    per_block = max(1, _BLOCK // sums_G.size)
    for start in range(0, draws, per_block):
        signs = random.integers(2, size=(min(per_block, draws - start), sums_G.size)) * 2.0 - 1
        hits += int((np.abs(signs @ sums_G) >= reached).sum())
    return (hits + 1) / (draws + 1)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values of several tests, adjusted so that their family-wise error stays at the level (Holm's step-down).

    NaN is no test: it stays NaN, and the others are adjusted as if it were not there.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    stepped = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _stretch(sums_SG: NDArray[np.float64], counts_SG: NDArray[np.float64], tail: float) -> float:
    """How much wider than the bootstrap's an interval must be for few seeds and groups to cover the truth."""
    from scipy.special import ndtri, stdtrit  # records need only the names in this file

    residual_SG = sums_SG - counts_SG * (sums_SG.sum() / counts_SG.sum())
    scale = np.abs(residual_SG).max()
    if scale == 0:
        return 1.0
    totals = [(residual_SG / scale).sum(axis) for axis in (0, 1)]
    drawn = sum(np.square(total).sum() for total in totals)
    unbiased = [
        (np.square(total).sum() * len(total) / (len(total) - 1), len(total) - 1) for total in totals if len(total) > 1
    ]
    variance = sum(square for square, _ in unbiased)
    if not variance:
        return 1.0
    freedom = variance**2 / sum(square**2 / degrees for square, degrees in unbiased)
    return float(np.sqrt(variance / drawn) * stdtrit(freedom, tail) / ndtri(tail))


def _paired(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"expected two runs on the same samples, got shapes {a.shape} and {b.shape}")
    return a - b


def _indices(groups: Groups | None, length: int) -> tuple[NDArray[np.int64], int]:
    """Number of each value's group, and how many groups there are."""
    if groups is None:
        return np.arange(length), length
    if len(groups) != length:
        raise ValueError(f"expected one group per value, got {len(groups)} for {length}")
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups], dtype=np.int64), len(number)


def _per_group(
    values_SN: NDArray[np.float64], index_N: NDArray[np.int64], size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values that are not NaN, each [S, groups]."""
    sums, counts = np.zeros((len(values_SN), size)), np.zeros((len(values_SN), size))
    for seed, values_N in enumerate(values_SN):
        defined_N = ~np.isnan(values_N)
        sums[seed] = np.bincount(index_N[defined_N], values_N[defined_N], minlength=size)
        counts[seed] = np.bincount(index_N[defined_N], minlength=size)
    return sums, counts
