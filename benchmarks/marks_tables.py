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
"""Row -> seed -> scores; the row `REFERENCE` is what the others are compared with."""
Tests = Mapping[str, Sequence[Sample]]
"""Name -> questions."""
REFERENCE = "LoRA"
BASE = "base"


def tables(train: Sequence[Sample], tests: Tests, scored: Scored) -> Iterator[str]:
    """Lines of Markdown: what can be had without the lesion, then the rows in their order.

    Percent. Intervals are over seeds and patients. A star marks a difference whose interval leaves out 0 and whose test
    does too: permutations over patients of the means over seeds, after Holm over all comparisons of the set.
    """
    yield f"{len(train)} training questions; " + ", ".join(f"{test} {len(own)}" for test, own in tests.items()) + "."
    shares = {test: baselines(train, own) for test, own in tests.items()}
    for kind in ("question only", "mark only"):
        yield (
            f"Right by the {kind}: " + ", ".join(f"{test} {100 * own[kind]:.1f}" for test, own in shares.items()) + "."
        )
    p_values = _p_values(scored, tests)
    rows = [
        [row, len(seeds), *_means(scored, row, tests, p_values), _mass(seeds, tests)] for row, seeds in scored.items()
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


def _pair(scored: Scored, row: str, test: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of a row and of the reference, of the seeds that both have."""
    shared = [seed for seed in scored[row] if seed in scored.get(REFERENCE, {})]
    if row in (REFERENCE, BASE) or not shared:
        return None
    first, second = ({seed: scored[name][seed] for seed in shared} for name in (row, REFERENCE))
    return _stacked(first, test), _stacked(second, test)


def _p_values(scored: Scored, tests: Tests) -> dict[tuple[str, str], float]:
    """Of every comparison with the reference."""
    pairs = {(row, test): pair for row in scored for test in tests if (pair := _pair(scored, row, test)) is not None}
    if not pairs:
        return {}
    raw = [
        paired_permutation_test(first.mean(0), second.mean(0), clusters(tests[test]))
        for (_, test), (first, second) in pairs.items()
    ]
    return dict(zip(pairs, holm(raw).tolist(), strict=True))


def _means(scored: Scored, row: str, tests: Tests, p_values: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """By test, the mean and, behind the semicolon, the difference from the reference."""
    for test, samples in tests.items():
        groups = clusters(samples)
        mean = seeds_interval(_stacked(scored[row], test), groups)
        text = f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"
        pair = _pair(scored, row, test)
        if pair is not None:
            change = paired_difference(*pair, groups)
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
