"""Samples -> training, validation and test without a patient or image in two of them; what leaks where it is given."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from typing import Any

from a3tune.types import Sample

Splits = dict[str, list[Sample]]
NAMES = ("train", "validation", "test")


def split(samples: Sequence[Sample], shares: Sequence[float], key: Callable[[Sample], str]) -> Splits:
    """Parts with these shares of the groups, all samples of one key in one part; in the order of `NAMES`.

    Which group goes where depends on its key alone, not on the order of rows. A part whose share is not 0 gets a group
    where there are enough.
    """
    groups = sorted({key(sample) for sample in samples}, key=lambda name: sha256(name.encode()).hexdigest())
    asked = [name for name, share in zip(NAMES, shares, strict=False) if share > 0]
    parts_of = [share for share in shares if share > 0]
    ends = [round(sum(parts_of[: at + 1]) / sum(parts_of) * len(groups)) for at in range(len(asked))]
    if len(groups) >= len(asked):
        for at in range(len(asked)):  # none empty: each ends after its predecessor and before what the others need
            ends[at] = min(max(ends[at], (ends[at - 1] if at else 0) + 1), len(groups) - (len(asked) - 1 - at))
    place = {
        group: name for name, start, end in zip(asked, [0, *ends], ends, strict=False) for group in groups[start:end]
    }
    parts: Splits = {name: [] for name in asked}
    for sample in samples:
        parts[place[key(sample)]].append(sample)
    return parts


def leaks(splits: Mapping[str, Sequence[Sample]], keys: Mapping[str, Callable[[Sample], Any]]) -> list[str]:
    """A line for each kind of key (`image`, `patient`) that two splits share, with how many; keys of None are none."""
    lines: list[str] = []
    for kind, key in keys.items():
        of: dict[str, set[Any]] = defaultdict(set)
        for name, samples in splits.items():
            of[name] = {key(sample) for sample in samples} - {None}
        for one, other in combinations(splits, 2):
            shared = len(of[one] & of[other])
            if shared:
                lines.append(f"{shared:,} of {len(of[other]):,} {kind}s in {other} are in {one}, too")
    return lines
