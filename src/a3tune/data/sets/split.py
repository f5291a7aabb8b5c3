"""Seeded splits and samples where a publisher gives none. Knows keys, no files."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from a3tune.types import Sample

SEED = 0
Item = TypeVar("Item")


def by_group(
    samples: Iterable[Sample], key: Callable[[Sample], object], share: float
) -> tuple[list[Sample], list[Sample]]:
    """Two parts, the second with `share` of the groups (rounded); all samples of one key are in one part."""
    samples = list(samples)
    groups = sorted({str(key(sample)) for sample in samples})
    second = set(draw(groups, round(share * len(groups))))
    return (
        [sample for sample in samples if str(key(sample)) not in second],
        [sample for sample in samples if str(key(sample)) in second],
    )


def draw(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, drawn with a fixed seed, in their own order."""
    if count >= len(items):
        return list(items)
    chosen = sorted(random.Random(SEED).sample(range(len(items)), count))
    return [items[index] for index in chosen]
