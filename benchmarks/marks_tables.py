"""What the cells of `marks_study.py` say: means and differences with intervals, by test, question type and body part.

Knows scores of questions by row and seed; runs nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from measure import table

from a3tune.evaluation.results import clusters
from a3tune.metrics.stats import holm, paired_difference, paired_permutation_test, seeds_interval
from a3tune.metrics.vqa import prior_baseline
from a3tune.types import Sample

Scores = Mapping[str, Mapping[str, Sequence[float | None]]]
"""Test -> "right" or "mass" -> of every question."""
Scored = Mapping[str, Mapping[int, Scores]]
"""Row -> seed -> scores."""
Tests = Mapping[str, Sequence[Sample]]
"""Name -> questions."""
BASE = "base"
Pairs = Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]]
"""Row and test -> scores [seeds, questions] of the row and of what it is compared with, of the same seeds."""


def tables(train: Sequence[Sample], tests: Tests, scored: Scored, reference: str) -> Iterator[str]:
    """Lines of Markdown: what can be had without the lesion, then the rows in their order, against one of them.

    Percent. Intervals are over seeds and patients. A star marks a difference whose interval leaves out 0 and whose test
    does too: permutations over patients of the means over seeds, after Holm over all comparisons of the set.
    """
    yield f"{len(train)} training questions; " + ", ".join(f"{test} {len(own)}" for test, own in tests.items()) + "."
    shares = {test: baselines(train, own) for test, own in tests.items()}
    for kind in ("question only", "mark only"):
        yield (
            f"Right by the {kind}: " + ", ".join(f"{test} {100 * own[kind]:.1f}" for test, own in shares.items()) + "."
        )
    pairs = _pairs(scored, tests, reference)
    p_values = _p_values(pairs, tests)
    rows = [
        [row, len(seeds), *_means(scored, row, tests, pairs, p_values), _mass(seeds, tests)]
        for row, seeds in scored.items()
    ]
    yield from ("", table(["Row", "Seeds", *tests, "mass inside"], rows))
    for field in ("question_type", "body"):
        yield from ("", _breakdown(scored, tests, field))


def baselines(train: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of right answers that the question's type alone, and the type with the mark, would give."""

    def right(*fields: str) -> float:
        """The most frequent training answer to what has the same values of these fields."""

        def seen(rows: Sequence[Sample]) -> list[Sample]:
            return [replace(row, prompt=str([row.meta.get(field) for field in fields])) for row in rows]

        answers = prior_baseline(seen(train), seen(samples))
        return float(np.mean([given == sample.answer for given, sample in zip(answers, samples, strict=True)]))

    return {"question only": right("question_type"), "mark only": right("question_type", "mark")}


def _stacked(seeds: Mapping[int, Scores], test: str, score: str = "right") -> np.ndarray:
    """Scores [seeds, questions], NaN where there is none."""
    return np.array([own[test][score] for own in seeds.values()], dtype=float)


def _pairs(scored: Scored, tests: Tests, reference: str) -> Pairs:
    """Of the seeds that a row and the reference both have."""
    others = [row for row in scored if row not in (reference, BASE)]
    shared = {row: [seed for seed in scored[row] if seed in scored.get(reference, {})] for row in others}

    def of(row: str, seeds: Sequence[int], test: str) -> np.ndarray:
        return _stacked({seed: scored[row][seed] for seed in seeds}, test)

    return {
        (row, test): (of(row, seeds, test), of(reference, seeds, test))
        for row, seeds in shared.items()
        if seeds
        for test in tests
    }


def _p_values(pairs: Pairs, tests: Tests) -> dict[tuple[str, str], float]:
    """Of every comparison with the reference."""
    if not pairs:
        return {}
    raw = [
        paired_permutation_test(first.mean(0), second.mean(0), clusters(tests[test]))
        for (_, test), (first, second) in pairs.items()
    ]
    return dict(zip(pairs, holm(raw).tolist(), strict=True))


def _means(
    scored: Scored, row: str, tests: Tests, pairs: Pairs, p_values: Mapping[tuple[str, str], float]
) -> Iterator[str]:
    """By test, the mean and, behind the semicolon, the difference from the reference."""
    for test, samples in tests.items():
        groups = clusters(samples)
        mean = seeds_interval(_stacked(scored[row], test), groups)
        text = f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
        if (row, test) in pairs:
            change = paired_difference(*pairs[row, test], groups)
            sure = (change.low > 0 or change.high < 0) and p_values[row, test] < 0.05
            text += f"; {100 * change.mean:+.1f}{'&ast;' * sure} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        yield text


def _mass(seeds: Mapping[int, Scores], tests: Tests) -> str:
    """Attention inside the true region, over all tests."""
    return f"{100 * np.nanmean(np.concatenate([_stacked(seeds, test, 'mass') for test in tests], axis=1)):.1f}"


def _breakdown(scored: Scored, tests: Tests, field: str) -> str:
    """Means by a field of `meta`: a column per value, the tests one behind the other."""
    values = sorted({sample.meta[field] for samples in tests.values() for sample in samples})

    def cell(seeds: Mapping[int, Scores], value: str) -> str:
        means = []
        for test, samples in tests.items():
            chosen = [sample.meta[field] == value for sample in samples]
            right = _stacked(seeds, test)[:, chosen]
            means.append(f"{100 * right.mean():.0f}" if right.size else "-")
        return " / ".join(means)

    rows = [[row, *(cell(seeds, value) for value in values)] for row, seeds in scored.items()]
    return table([" / ".join(tests), *values], rows)
