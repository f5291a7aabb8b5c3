"""Which test questions a report shows side by side: a stated rule, a fixed seed, no one's eye.

Knows predictions; not how they look.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from a3tune.evaluation.results import named_tests
from a3tune.metrics.catalogue import right
from a3tune.types import Prediction


@dataclass(frozen=True, slots=True)
class Choice:
    """A test question to show."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen questions, and the rule in words a reader can check."""

    choices: tuple[Choice, ...]
    rule: str


def select_cases(
    predictions: Mapping[str, Sequence[Prediction]],
    *,
    method: str = "a3tune",
    reference: str = "lora",
    stratum: str = "body",
    per_stratum: int = 2,
    each: int = 3,
    seed: int = 0,
    titles: tuple[str, str] = ("A3Tune", "LoRA"),
) -> Selection:
    """Draw localised test questions at random: `each` that `method` answered better than `reference`, some of every
    stratum, and `each` that it answered worse.

    A question is localised if its true region is known, so that `method`'s prediction holds a finite attention mass.
    The draw of strata never looks at answers, and comes first; the others are of the rest. The choice depends on the
    seed and on the questions, not on their order. Where questions name tests (`meta.test`), the better and the worse
    are of the one that comes first.

    Args:
        predictions: by method; of the same questions.
        titles: how the rule calls `method` and `reference`.
        stratum: key of `Prediction.meta`; questions without it form a stratum of their own.

    Raises:
        KeyError: no predictions of `method` or `reference`.
    """
    localised = {p.id: p for p in predictions[method] if math.isfinite(p.attention.get("attention_mass", math.nan))}
    compared = {p.id: p for p in predictions[reference]}
    ids = sorted(localised.keys() & compared.keys())
    gain = {i: _gain(localised[i], compared[i]) for i in ids}
    rng = np.random.default_rng(seed)
    strata: dict[str, list[str]] = {}
    for i in ids:
        strata.setdefault(localised[i].meta.get(stratum, ""), []).append(i)
    unseen = [
        Choice(i, f"random, {name}" if name else "random")
        for name, members in sorted(strata.items())
        for i in _draw(members, per_stratum, rng)
    ]
    shown = {choice.id for choice in unseen}
    first = next(iter(named_tests(p.meta for p in predictions[method] if p.id in localised)), "")
    tests = {i: localised[i].meta.get("test", "") if first else "" for i in ids}
    worse, better = ([i for i in ids if sign * gain[i] > 0 and tests[i] == first] for sign in (-1, 1))
    lost, won = (
        [Choice(i, f"random among the {name}") for i in _draw([i for i in own if i not in shown], each, rng)]
        for name, own in (("lost", worse), ("won", better))
    )
    rule = (
        f"Of the {len(ids):,} test questions with a true region, {per_stratum} per {stratum.replace('_', ' ')} were "
        f"drawn at random, without looking at answers; then, {f'in the test {first}, ' if first else ''}up to {each} "
        f"of those that {titles[0]} answered worse than {titles[1]} ({len(worse):,} of "
        f"{list(tests.values()).count(first):,}), and as many of those that it answered better ({len(better):,}), "
        f"which stand first. The seed of the draw is {seed}."
    )
    return Selection((*won, *unseen, *lost), rule)


def _gain(of: Prediction, over: Prediction) -> float:
    """How much more right; 0 for what is not right or wrong, as a report."""
    first, second = right(of), right(over)
    return 0.0 if first is None or second is None else first - second


def _draw(ids: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` of `ids`, in their own order."""
    return [ids[i] for i in sorted(rng.permutation(len(ids))[:count])]
